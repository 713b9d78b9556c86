"""The decoupled meta-gradient equals autograd through the whole edit.

The reference (edit_reference.py) shares no code with the pipeline; it is given captures of one
question at a time, and runs the whole edited model on one unpadded question at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from edit_reference import BATCHINGS, compare, decoupled, picked, through_the_edit
from support import (
    TERMS,
    captured_of,
    copies,
    encoder,
    random_editor,
    random_facts,
    statistics_of,
    tiny_model,
    tiny_trunk,
)
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from malmend.editors.editor import Editor
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.models.capture import Captured
from malmend.models.descent import Descent
from malmend.models.trunk import Trunk


@dataclass(frozen=True)
class Case:
    method: str = "malmen"
    family: str = "llama"
    many: bool = False
    prior: str = "wording"
    form: str = "residual"
    placement: str = "before"
    tokens: str = "answer"
    descent: bool = False

    @property
    def settings(self) -> EditorSettings:
        return EditorSettings(
            method=self.method,
            form=self.form,
            layers=2,
            tokens=self.tokens,
            descent=Descent(steps=4) if self.descent else None,
            prior=self.prior,
            network=NetworkSettings(rank=5, placement=self.placement),
        )

    @property
    def eta(self) -> float:
        return 0.5 if self.form == "residual" else 0.01


def _cases() -> list[Case]:
    """Sixteen of the 256 cases, in which every three choices meet in every combination."""
    cases = []
    for a, b, c, d in itertools.product((0, 1), repeat=4):
        e, f, g, h = b ^ c ^ d, a ^ c ^ d, a ^ b ^ c, a ^ b ^ d
        cases.append(
            Case(
                method=("malmen", "mend")[a],
                family=("llama", "gpt2")[b],
                many=bool(c),
                prior=("wording", "identity")[d],
                form=("residual", "published")[e],
                placement=("before", "after")[f],
                tokens=("answer", "all")[g],
                descent=bool(h),
            )
        )
    return cases


def test_the_cases_meet_in_threes():
    rows = [list(vars(case).values()) for case in _cases()]
    for three in itertools.combinations(range(8), 3):
        assert len({tuple(row[i] for i in three) for row in rows}) == 8


# The third prior, with fewer tokens than K and with more.
ALL = [*_cases(), Case(prior="text"), Case(prior="text", many=True, family="gpt2")]


@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, vars(case).values())))
def test_metagradient_of_every_parameter(case):
    facts = random_facts(14 if case.many else 3, seed=1)
    model = tiny_model(case.family)
    captured = captured_of(tiny_trunk(model), facts, case.settings)
    count, width = captured[0].keys_NK.shape
    assert (count > width) == case.many
    editor = random_editor(case.settings, tiny_trunk(model), captured, eta=case.eta).double()
    # The descended gradients have their own tests; the plain ones are taken anew.
    pairs = captured if case.descent else _captured_alone(model, editor.names, facts, case.tokens)
    wanted_loss, wanted = _through_the_edit(model, editor, pairs, facts)
    _check_not_vacuous(case, wanted)
    for batch_tokens, chunk in BATCHINGS:
        loss, found = _decoupled(editor, tiny_trunk(model, batch_tokens=batch_tokens), facts, chunk)
        assert loss == pytest.approx(wanted_loss, rel=1e-10)
        compare(found, wanted)


@pytest.mark.parametrize("method", ["mend", "malmen"])  # the first case is `make test`'s for MEND
@pytest.mark.parametrize("placement", ["before", "after"])
def test_metagradient_at_the_identity_start(method, placement):
    """Where every pre-activation is exactly 0, the last block's U has a gradient all the same."""
    case = Case(method=method, placement=placement, descent=True)
    facts, model = random_facts(4, seed=2), tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, facts, case.settings)
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    fresh = Editor(case.settings, shapes, statistics_of(trunk, captured), eta=0.7).double()
    _, wanted = _through_the_edit(model, fresh, captured, facts)
    for name, grad in wanted.items():
        if name.endswith("up_FR"):
            assert grad.norm() > 1e-6, name
    for batch_tokens, chunk in BATCHINGS:
        _, found = _decoupled(fresh, tiny_trunk(model, batch_tokens=batch_tokens), facts, chunk)
        compare(found, wanted)


@pytest.mark.parametrize("method", ["malmen", "mend"])
def test_metagradient_with_two_shapes_and_several_sites_in_the_first_block(method):
    settings = EditorSettings(
        method=method, descent=None, network=NetworkSettings(rank=5, placement="after")
    )
    facts, model = random_facts(8, seed=3), tiny_model("gpt2")
    pattern = "transformer.h.[12].mlp.c_*"
    trunk = tiny_trunk(model, pattern=pattern)
    captured = captured_of(trunk, facts, settings)
    editor = random_editor(settings, trunk, captured, eta=0.3).double()
    assert len(editor.names) == 4
    assert set(editor.networks) == {"32x16", "16x32"}
    pairs = _captured_alone(model, editor.names, facts, "answer")
    wanted_loss, wanted = _through_the_edit(model, editor, pairs, facts)
    for batch_tokens, chunk in BATCHINGS:
        cut = tiny_trunk(model, pattern=pattern, batch_tokens=batch_tokens)
        loss, found = _decoupled(editor, cut, facts, chunk)
        assert loss == pytest.approx(wanted_loss, rel=1e-10)
        compare(found, wanted)


@pytest.mark.parametrize("form", ["residual", "published"])
def test_metagradient_without_a_network(form):
    settings = EditorSettings(form=form, descent=None, network=NetworkSettings(blocks=0))
    facts, model = random_facts(5, seed=4), tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, facts, settings)
    editor = random_editor(settings, trunk, captured, eta=0.05).double()
    _, wanted = _through_the_edit(model, editor, captured, facts)
    assert set(wanted) >= {"log_eta_S", "log_weights_SP", "log_ridge_S"}
    assert not any(name.startswith("networks") for name in wanted)
    compare(_decoupled(editor, trunk, facts, 4)[1], wanted)


def test_backward_adds_to_gradients_that_are_there():
    case = Case()
    facts, model = random_facts(4, seed=5), tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, facts, case.settings)
    editor = random_editor(case.settings, trunk, captured).double()
    aggregations = editor.aggregate(captured)
    grads = {name: torch.randn_like(one.shift()) for name, one in _named(editor, aggregations)}
    editor.backward(captured, aggregations, grads)
    once = copies({name: p.grad for name, p in editor.named_parameters()})
    editor.backward(captured, aggregations, grads)
    for name, parameter in editor.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["malmen", "mend"])
@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("descent", [None, Descent(steps=5)], ids=["plain", "descent"])
def test_shift_depends_on_neither_batching_nor_order(method, tokens, descent):
    settings = EditorSettings(
        method=method, tokens=tokens, descent=descent, network=NetworkSettings(rank=5)
    )
    facts, model = random_facts(12, seed=6), tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, facts, settings)
    editor = random_editor(settings, trunk, captured).double()
    wanted = editor.shifts(captured)
    for batch_tokens, chunk in BATCHINGS:
        for order in (facts, facts[::-1], facts[5:] + facts[:5]):
            again = captured_of(tiny_trunk(model, batch_tokens=batch_tokens), order, settings)
            for name, shift_VK in editor.shifts(again, chunk).items():
                assert (shift_VK - wanted[name]).norm() <= 1e-10 * wanted[name].norm()


@pytest.mark.parametrize("tokens", [1, 512, 700, 2048, 4096, 9000])
def test_weights_follow_the_size_of_an_edit_within_bounds(tokens):
    settings = EditorSettings(layers=2, network=NetworkSettings(rank=3))
    trunk = tiny_trunk(tiny_model())
    editor = random_editor(settings, trunk, captured_of(trunk, random_facts(4), settings))
    with torch.no_grad():
        editor.powers_SP[1] = torch.tensor([0.5, -0.7, -1.2])
    n = sorted((512, tokens, 4096))[1]
    wanted = [
        w * (n / 2048) ** b
        for w, b in zip(editor.log_weights_SP[1].exp().tolist(), (0.5, -0.7, -1.2), strict=True)
    ]
    wanted[2] *= tokens
    assert editor.prior(1, tokens).weights == pytest.approx(wanted, rel=1e-5)


# --- questions of these facts ---------------------------------------------------------------------


def _asked(editor: Editor, facts: Sequence[Fact]) -> list[tuple[Encoded, Encoded]]:
    encode = encoder(editor.settings.end_of_answer).encode
    return [(encode(fact.equivalents[0]), encode(fact.unrelated[0])) for fact in facts]


def _decoupled(
    editor: Editor, trunk: Trunk, facts: Sequence[Fact], chunk: int
) -> tuple[float, dict[str, Tensor | None]]:
    edits = encoder(editor.settings.end_of_answer).encode_all(fact.question for fact in facts)
    return decoupled(editor, trunk, edits, _asked(editor, facts), chunk)


def _named(editor: Editor, aggregations: Sequence) -> list:
    return list(zip(editor.names, aggregations, strict=True))


def _through_the_edit(
    model: PreTrainedModel, editor: Editor, pairs: Sequence[Captured], facts: Sequence[Fact]
) -> tuple[float, dict[str, Tensor]]:
    logs = functools.partial(_answer_logs, model)
    return through_the_edit(model, editor, pairs, _asked(editor, facts), logs)


def _answer_logs(model: PreTrainedModel, weights: dict[str, Tensor], asked: Encoded) -> Tensor:
    """Log-probabilities at the positions before each answer token, one question, no padding."""
    inputs = {"input_ids": torch.tensor([asked.ids]), "use_cache": False}
    logits = functional_call(model, weights, (), inputs).logits[0]
    return logits[asked.answer_start - 1 : len(asked.ids) - 1].log_softmax(-1)


def _captured_alone(
    model: PreTrainedModel, names: Sequence[str], facts: Sequence[Fact], tokens: str
) -> list[Captured]:
    """Keys and plain value gradients: the whole model on one question at a time."""
    rows: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in names]
    ends: list[bool] = []
    for asked in encoder().encode_all(fact.question for fact in facts):
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name, module, args, output, inputs=inputs, outputs=outputs):
            inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])  # OPT flattens
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            outputs[name].retain_grad()
            return outputs[name].clone()  # Falcon adds to it in place

        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda *found, name=name, keep=keep: keep(name, *found)
            )
            for name in names
        ]
        with torch.enable_grad():
            logs = _answer_logs(model, {}, asked)
        for handle in handles:
            handle.remove()
        (-logs[picked(asked)].sum()).backward()
        start = asked.answer_start - 1 if tokens == "answer" else 1
        stop = len(asked.ids) - 1 if tokens == "answer" else len(asked.ids)
        # The token before the last id outputs the end of the answer, which is the last id.
        ends += [at == len(asked.ids) - 2 for at in range(start, stop)]
        for (keys, grads), name in zip(rows, names, strict=True):
            keys.append(inputs[name][start:stop])
            grad = outputs[name].grad
            grads.append(grad.reshape(-1, grad.shape[-1])[start:stop])
    marked = torch.tensor(ends)
    return [Captured(torch.cat(keys), torch.cat(grads), marked) for keys, grads in rows]


def _check_not_vacuous(case: Case, wanted: dict[str, Tensor]) -> None:
    """Every gradient that the case should have is there."""
    absent = set()
    if case.method == "mend":
        absent = {"log_weights_SP", "powers_SP", "log_ridge_S", "log_end_weight_S"}
    elif case.prior == "identity":
        absent = {"log_weights_SP", "powers_SP"}
    for name, grad in wanted.items():
        assert bool(grad.norm() > 1e-9) == (name not in absent), name
        if name.endswith(("scale_SF", "offset_SF", "_S")) and name not in absent:
            assert (grad.reshape(2, -1).norm(dim=1) > 0).all(), f"a site of {name} is not reached"
    weights_SP = wanted["log_weights_SP"]
    assert weights_SP.shape == (2, 0 if "log_weights_SP" in absent else len(TERMS[case.prior]))
    assert (weights_SP.abs() > 1e-9).all()
