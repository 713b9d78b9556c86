"""The decoupled meta-gradient of encoders with classes and of encoder-decoders.

As test_metagradient.py has it of decoders: autograd through the whole edit, one unpadded question
at a time (edit_reference.py).  New here are sites that see unlike many tokens, in two halves of
which the edit of one changes what the other reads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from edit_reference import BATCHINGS, compare, decoupled, through_the_edit
from support import TERMS, random_editor
from torch import Tensor
from transformers import PreTrainedModel

import forms_support as forms
from malmend.editors.editor import SiteStatistics
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.facts.encoded import Encoded
from malmend.models.capture import Captured, capture
from malmend.models.descent import Descent
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.numerics.moments import RunningMoments

FACTS = 5


@dataclass(frozen=True)
class Case:
    family: str
    side: str = "both"
    method: str = "malmen"
    prior: str = "wording"
    tokens: str = "answer"
    linear: str = "second"
    form: str = "residual"
    descent: bool = False

    @property
    def settings(self) -> EditorSettings:
        return EditorSettings(
            method=self.method,
            form=self.form,
            layers=2,
            linear=self.linear,
            side=self.side,
            tokens=self.tokens,
            descent=Descent(steps=3) if self.descent else None,
            prior=self.prior,
            network=NetworkSettings(rank=4),
        )

    def __str__(self) -> str:
        named = [str(value) for value in vars(self).values() if not isinstance(value, bool)]
        return "-".join(named + ["descent"] * self.descent)


def _cases() -> list[Case]:
    models = [("bert", "both"), ("t5", "both"), ("t5", "encoder"), ("t5", "decoder")]
    models += [("bart", "both")]
    ways = [("malmen", "wording"), ("malmen", "identity"), ("mend", "wording")]
    cases = [Case(*model, *way) for model in models for way in ways]
    # Of T5's decoder every token outputs an answer's.
    cases += [Case(family, "both", *way, "all") for family in ("bert", "bart") for way in ways]
    cases += [Case("t5", linear="first"), Case("bert", method="mend", linear="first")]
    cases += [Case("bart", form="published"), Case("t5-gated", "decoder", tokens="all")]
    return [*cases, Case("t5", descent=True), Case("bert", descent=True, tokens="all")]


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_metagradient_of_every_parameter(case):
    model = forms.model_of(case.family)
    edits, asked = questions(case.family)
    trunk = trunk_of(model, case.settings)
    captured = capture(trunk, edits, case.tokens, case.settings.descent)
    editor = random_editor(
        case.settings,
        trunk,
        captured,
        eta=0.5 if case.form == "residual" else 0.01,
        statistics=random_statistics(trunk, captured, TERMS[case.prior]),
    ).double()
    # The descended gradients have their own tests; the plain ones are taken anew.
    pairs = captured if case.descent else captured_alone(model, trunk, edits, case.tokens)
    logs = functools.partial(answer_logs, model)
    wanted_loss, wanted = through_the_edit(model, editor, pairs, asked, logs)
    check_not_vacuous(case, trunk, wanted)
    for batch_tokens, chunk in BATCHINGS:
        again = trunk_of(model, case.settings, batch_tokens)
        loss, found = decoupled(editor, again, edits, asked, chunk)
        assert loss == pytest.approx(wanted_loss, rel=1e-10)
        compare(found, wanted)


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_shift_depends_on_neither_batching_nor_order(family):
    settings = Case(family, descent=True).settings
    model, (edits, _) = forms.model_of(family), questions(family)
    trunk = trunk_of(model, settings)
    captured = capture(trunk, edits, settings.tokens, settings.descent)
    known = random_statistics(trunk, captured, TERMS["wording"])
    editor = random_editor(settings, trunk, captured, statistics=known).double()
    wanted = editor.shifts(captured)
    for batch_tokens, chunk in BATCHINGS:
        for order in (edits, edits[::-1], edits[2:] + edits[:2]):
            again = trunk_of(model, settings, batch_tokens)
            pairs = capture(again, order, settings.tokens, settings.descent)
            for name, shift_VK in editor.shifts(pairs, chunk).items():
                assert (shift_VK - wanted[name]).norm() <= 1e-9 * wanted[name].norm()


# --- questions, statistics, and captures one by one


def questions(family: str) -> tuple[list[Encoded], list[tuple[Encoded, Encoded]]]:
    """Edits; and for each one an equivalent and an unrelated question, one without an answer."""
    found = forms.questions(family, 3 * FACTS, seed=3)
    edits, equivalents, unrelated = (found[at::3] for at in range(3))
    bare = unrelated[0]
    cut = bare.answer_start
    unrelated[0] = replace(bare, ids=bare.ids[:cut], answer_end=cut)
    return edits, list(zip(equivalents, unrelated, strict=True))


def trunk_of(model: PreTrainedModel, settings: EditorSettings, batch_tokens: int = 4096) -> Trunk:
    return Trunk(model, settings.sites_in(model), TrunkSettings(batch_tokens))


def random_statistics(
    trunk: Trunk, captured: Sequence[Captured], terms: Sequence[str]
) -> dict[str, SiteStatistics]:
    """Moments of what was captured; any positive matrices for the terms of the prior."""
    generator = torch.Generator().manual_seed(7)
    known = {}
    for site, pair in zip(trunk.sites, captured, strict=True):
        value_width, key_width = site.shape_VK
        priors = {}
        for term in terms:
            rows = torch.randn(9, key_width, generator=generator, dtype=torch.float64)
            priors[term] = rows.T @ rows / 9
        one = SiteStatistics(RunningMoments(key_width), RunningMoments(value_width), priors)
        one.keys.add(pair.keys_NK)
        one.value_grads.add(pair.value_grads_NV)
        known[site.name] = one
    return known


def answer_logs(model: PreTrainedModel, weights: dict[str, Tensor], asked: Encoded) -> Tensor:
    return forms.logits_alone(model, [asked], weights).log_softmax(-1)


def captured_alone(
    model: PreTrainedModel, trunk: Trunk, edits: Sequence[Encoded], tokens: str
) -> list[Captured]:
    """Keys and plain value gradients: the whole model on one question at a time."""
    found = [forms.pairs_alone(model, trunk.sites, question) for question in edits]
    pairs = []
    for index, site in enumerate(trunk.sites):
        at = [forms.places(site, question, tokens) for question in edits]
        keys = [one[0][index][here] for one, here in zip(found, at, strict=True)]
        grads = [one[1][index][here] for one, here in zip(found, at, strict=True)]
        has_end = edits[0].form == "seq2seq" and not site.in_encoder
        # The last token of a decoder outputs the end of the answer.
        ends = [has_end and one == here[-1] for here in at for one in here]
        pairs.append(Captured(torch.cat(keys), torch.cat(grads), torch.tensor(ends)))
    return pairs


def check_not_vacuous(case: Case, trunk: Trunk, wanted: dict[str, Tensor]) -> None:
    """Every gradient that the case should have is there, at every site that should have it."""
    absent = set()
    if case.method == "mend":
        absent = {"log_weights_SP", "powers_SP", "log_ridge_S", "log_end_weight_S"}
    elif case.prior == "identity":
        absent = {"log_weights_SP", "powers_SP"}
    count = len(trunk.sites)
    assert count == (4 if case.side == "both" and case.family in forms.PAIRS else 2)
    says_end = [case.family in forms.PAIRS and not site.in_encoder for site in trunk.sites]
    for name, grad in wanted.items():
        here = torch.full((count,), name not in absent)
        if name == "log_end_weight_S":
            here &= torch.tensor(says_end)
        assert bool(grad.norm() > 1e-9) == bool(here.any()), name
        if name.endswith(("_S", "_SP")):
            assert ((grad.reshape(count, -1).abs() > 1e-9).all(1) == here).all() or not here.any()
        if name.endswith(("scale_SF", "offset_SF")):
            assert (grad.norm(dim=1) > 0).all(), f"a site of {name} is not reached"
