"""ENN against its equations: autograd through the inner steps of the whole model, unpadded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import chain

import pytest
import torch
from methods_support import FACTS, answer_log_probs, bench_of, bytes_of, encoded, nll, with_shifts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import malmend.methods.enn as enn
import tiny
from command_support import make_facts
from helpers import weights_of
from malmend.editors.folder import identity_of
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Question
from malmend.methods.enn import Enn, EnnSettings
from malmend.methods.enn_training import EnnTrainer
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.progress import silent
from malmend.workbench import Workbench

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
# Two blocks, so that the upper one's attention lies between edited layers.
SETTINGS = EnnSettings(
    layers=2,
    inner_steps=2,
    inner_rate=0.03,
    c_edit=0.7,
    c_loc=0.4,
    rate=1e-2,
    facts_per_step=3,
    steps=6,
    save_every=2,
)


def trainer_of(family="llama", settings=SETTINGS, facts=FACTS, batch_tokens=1024, **more):
    bench = bench_of(family, settings)
    model = bench.loaded.model
    model.__class__ = tiny.in_float64(type(model))  # norms too, which round by the batch
    grouping = TrunkSettings(batch_tokens)
    trunk = Trunk(model, bench.trunk.sites, grouping)
    return EnnTrainer(settings, Workbench(bench.loaded, trunk, bench.encoder), facts, **more)


def moved(trainer, seed=0):
    """The same away from its start, where L_base and its gradient vanish; unlike rates."""
    generator = torch.Generator().manual_seed(seed)
    for one in trainer.weights:
        one.data += 0.03 * torch.randn(one.shape, generator=generator, dtype=one.dtype)
    trainer.log_rates_S.data += torch.randn(len(trainer.weights), generator=generator).double() / 3
    return trainer


def parts_by_hand(trainer, drawn, weights, log_rates):
    """L_base, L_edit and L_loc in one graph over the whole model."""
    settings, encode = trainer.settings, trainer.bench.encoder.encode_all
    original = trainer.bench.loaded.model
    model = copy.deepcopy(original)
    model.set_attn_implementation("eager")
    names = [f"{site.name}.weight" for site in trainer.trunk.sites]

    def says(here, question):
        asked = {"input_ids": torch.tensor([question.ids]), "use_cache": False}
        out = functional_call(model, dict(zip(names, here, strict=True)), kwargs=asked)
        return out.logits[0][list(question.sources)].log_softmax(-1)

    def loss(here, questions):
        labels = [torch.tensor(one.labels)[:, None] for one in questions]
        each = [
            -says(here, one).gather(1, label).sum()
            for one, label in zip(questions, labels, strict=True)
        ]
        return sum(each) / len(each)

    def kl(before, after):
        return (before.exp() * (before - after)).sum() / len(drawn)

    prompts, equivalents, unrelated = (encode(side) for side in zip(*drawn, strict=True))
    there = list(weights)
    for _ in range(settings.inner_steps):
        grads = torch.autograd.grad(loss(there, prompts), there, create_graph=True)
        there = [
            one - log_rate.exp() * grad
            for one, log_rate, grad in zip(there, log_rates, grads, strict=True)
        ]
    known = [answer_log_probs(original, one) for one in unrelated]
    base = sum(kl(was, says(weights, one)) for was, one in zip(known, unrelated, strict=True))
    loc = sum(kl(says(weights, one), says(there, one)) for one in unrelated)
    return base, loss(there, equivalents), loc, there


def total(settings, parts):
    return parts[0] + settings.c_edit * parts[1] + settings.c_loc * parts[2]


@FAMILIES
@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_is_that_of_the_whole_graph(family, steps):
    trainer = moved(trainer_of(family, replace(SETTINGS, inner_steps=steps)))
    drawn = trainer.draw(0)
    with torch.no_grad():  # whatever stands around it
        found = trainer.differentiate(drawn)
    weights = [one.detach().clone().requires_grad_() for one in trainer.weights]
    log_rates = trainer.log_rates_S.detach().clone().requires_grad_()
    parts = parts_by_hand(trainer, drawn, weights, log_rates)
    wanted = torch.autograd.grad(total(trainer.settings, parts), [*weights, log_rates])
    assert len(weights) == 4  # both layers of two blocks
    assert all(part > 1e-3 for part in found)
    torch.testing.assert_close(torch.tensor(found), torch.stack(parts[:3]).detach().float())
    for parameter, grad in zip(trainer.parameters, wanted, strict=True):
        assert grad.norm() > 1e-3
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-7, atol=1e-9)


def test_the_gradient_goes_through_the_inner_steps():
    trainer = moved(trainer_of())
    drawn = trainer.draw(0)
    trainer.differentiate(drawn)
    weights = [one.detach().clone().requires_grad_() for one in trainer.weights]
    parts = parts_by_hand(trainer, drawn, weights, trainer.log_rates_S.detach())
    first_order = torch.autograd.grad(parts[1], parts[3])
    assert all(
        (parameter.grad - 0.7 * one).norm() > 0.1 * parameter.grad.norm()
        for parameter, one in zip(trainer.weights, first_order, strict=True)
    )


def test_the_gradient_is_that_of_finite_differences():
    trainer = moved(trainer_of())
    drawn, generator = trainer.draw(0), torch.Generator().manual_seed(5)
    trainer.differentiate(drawn)
    grads = [one.grad.clone() for one in trainer.parameters]
    for parameter, grad in zip(trainer.parameters, grads, strict=True):
        along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sides = []
        for step in (1e-5, -2e-5):
            parameter.data += step * along
            sides.append(total(trainer.settings, trainer.differentiate(drawn)))
        parameter.data += 1e-5 * along
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx((grad * along).sum().item(), rel=1e-6)


@FAMILIES
def test_micro_batches_change_nothing(family):
    gradients = []
    for batch_tokens in (1, 60, 1024):
        trainer = moved(trainer_of(family, batch_tokens=batch_tokens))
        losses = trainer.differentiate(trainer.draw(0))
        gradients.append([torch.tensor(losses).double(), *(p.grad for p in trainer.parameters)])
    for other in gradients[1:]:
        for one, same in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-9, atol=1e-11)


def test_a_step_is_adams():
    trainer = moved(trainer_of())
    before = [one.detach().clone() for one in trainer.parameters]
    record = trainer.take_step()
    assert (record.step, trainer.step) == (1, 1)
    for one, was in zip(trainer.parameters, before, strict=True):
        rate = SETTINGS.scalar_rate if one is trainer.log_rates_S else SETTINGS.rate
        assert (one - was).abs().max().item() == pytest.approx(rate, rel=1e-3)
    norm = torch.stack([one.grad.norm() for one in trainer.parameters]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)  # clipped
    still = trainer_of(settings=replace(SETTINGS, clip=1e-30))  # far below Adam's epsilon
    still.take_step()
    assert all(torch.equal(a, b) for a, b in zip(still.weights, trainer_of().weights, strict=True))


def test_a_model_in_low_precision_is_trained_in_float32():
    bench = bench_of("llama", SETTINGS)
    model = bench.loaded.model.to(torch.bfloat16)
    low = Workbench(bench.loaded, Trunk(model, bench.trunk.sites), bench.encoder)
    trainer = EnnTrainer(SETTINGS, low, FACTS)
    trainer.take_step()
    assert all(one.dtype == one.grad.dtype == torch.float32 for one in trainer.parameters)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


@FAMILIES
def test_training_makes_edits_succeed(family, tmp_path):
    settings = replace(SETTINGS, inner_steps=1, steps=25, facts_per_step=1, c_edit=1.0)
    trainer = trainer_of(family, settings)
    seen, bench = [trainer.draw(step) for step in range(5)], trainer.bench

    def losses():
        return sum(total(settings, trainer.differentiate(drawn)) for drawn in seen)

    before = losses()
    records = list(trainer.run())
    assert [one.step for one in records] == list(range(1, 26))
    for one in records:
        parts = (one.base, one.edit, one.loc)
        assert one.loss == pytest.approx(total(settings, parts), rel=1e-12)
    assert losses() < 0.8 * before
    trainer.save(tmp_path)
    rates = trainer.log_rates_S.detach().exp()
    nlls = []
    for fact, question in zip(FACTS, encoded(bench), strict=True):
        plain = by_hand(bench, [question], rates, 1)[0]  # of equal rates, from the original
        trained = Enn(str(tmp_path)).find(bench, [fact], silent).shifts
        nlls.append([nll(with_shifts(bench, one), [question]) for one in (plain, trained)])
    assert all(trained < plain for plain, trained in nlls)
    assert sum(trained for _, trained in nlls) < 0.9 * sum(plain for plain, _ in nlls)


def by_hand(bench, questions, rates, steps, shifts=None):
    """Shifts of plain gradient descent on all questions, from the base or from the base shifted."""
    model = copy.deepcopy(bench.loaded.model) if shifts is None else with_shifts(bench, shifts)
    parameters = dict(model.named_parameters())
    weights = [parameters[f"{site.name}.weight"].requires_grad_() for site in bench.trunk.sites]
    losses = []
    for _ in range(steps):
        loss = nll(model, questions)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, weights)
        for weight, rate, grad in zip(weights, rates, grads, strict=True):
            weight.data -= rate * grad
    return {
        site.name: site.oriented(weight.detach() - site.weight)
        for site, weight in zip(bench.trunk.sites, weights, strict=True)
    }, losses


@FAMILIES
def test_an_edit_is_trained_minus_original_and_the_inner_steps(family, tmp_path):
    trainer = moved(trainer_of(family))
    trainer.save(tmp_path / "enn")
    bench, method = trainer.bench, Enn(str(tmp_path / "enn"))
    found = method.find(bench, FACTS, silent)
    base = load_file(weights_of(tmp_path / "enn"))
    rates = base.pop("log_rates").exp()
    assert all(one.dtype == torch.float32 for one in base.values())
    for site, weight in zip(bench.trunk.sites, trainer.weights, strict=True):
        assert tuple(base[site.name].shape) == site.shape_VK
        shift_VK = site.oriented(weight.detach() - site.weight)
        torch.testing.assert_close(base[site.name], shift_VK.float(), rtol=0, atol=0)
    base = {name: one.double() for name, one in base.items()}
    wanted, losses = by_hand(bench, encoded(bench), rates, SETTINGS.inner_steps, base)
    assert set(found.shifts) == set(wanted)
    for name, shift_VK in found.shifts.items():
        assert shift_VK.dtype == torch.float64
        assert (shift_VK - base[name]).norm() > 1e-2 * base[name].norm()
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-8, atol=1e-10)
    assert found.said["losses"] == pytest.approx(losses)
    assert found.said["inner_rates"] == pytest.approx(rates.tolist())
    assert found.said["settings"]["end_of_answer"] == method.end_of_answer == "eos"
    assert found.rank >= max(torch.linalg.matrix_rank(one) for one in found.shifts.values())
    assert (method.name, [site.name for site in method.sites_in(bench.loaded.model)]) == (
        "enn",
        list(wanted),
    )


def test_the_folder_says_what_it_is(tmp_path):
    trainer = trainer_of()
    next(trainer.run())
    trainer.save(tmp_path / "enn")
    about = json.loads((tmp_path / "enn" / "editor.json").read_text())
    assert (about["method"], about["step"], about["seed"]) == ("enn", 1, 0)
    assert about["base"] == trainer.bench.loaded.fingerprint
    assert EnnSettings(**about["settings"]) == SETTINGS
    assert about["sites"] == {one.name: list(one.shape_VK) for one in trainer.trunk.sites}
    files = {"editor.json", about["weights"], "training.safetensors"}
    assert {one.name for one in (tmp_path / "enn").iterdir()} == files


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, first = trainer_of(), trainer_of()
    straight = [replace(one, seconds=0.0) for one in whole.run()]
    parts = [replace(first.take_step(), seconds=0.0) for _ in range(3)]
    first.save(tmp_path)
    second = trainer_of(settings=replace(SETTINGS, steps=5, save_every=1))
    second.resume(tmp_path)
    parts += [replace(one, seconds=0.0) for one in second.run()]
    second.save(tmp_path)
    third = trainer_of()
    third.resume(tmp_path)
    assert third.step == 5
    parts += [replace(one, seconds=0.0) for one in third.run()]
    assert parts == straight
    for one, other in zip(whole.parameters, third.parameters, strict=True):
        assert torch.equal(one, other)
    whole.save(tmp_path / "whole")
    third.save(tmp_path / "parts")
    folders = [tmp_path / "whole", tmp_path / "parts"]
    files = [(one / "training.safetensors", weights_of(one)) for one in folders]
    assert len({tuple(path.read_bytes() for path in one) for one in files}) == 1
    start = trainer_of()
    start.save(tmp_path / "start")
    third.resume(tmp_path / "start")
    assert third.step == 0
    assert [replace(one, seconds=0.0) for one in third.run()] == straight


def test_what_a_step_draws_depends_on_seed_and_step():
    facts, others = make_facts(7, seed=1), [Question("Lake Ora lies"), Question("Ora is", "Lima")]
    settings = replace(SETTINGS, facts_per_step=2)
    trainer = trainer_of(settings=settings, facts=facts, locality=others)
    drawn = [trainer.draw(step) for step in range(9)]
    assert all(len({one[0].prompt for one in chain(*drawn[at : at + 3])}) == 6 for at in (0, 3, 6))
    by_prompt = {fact.prompt: fact for fact in facts}
    for prompt, equivalent, unrelated in chain(*drawn):
        assert prompt == by_prompt[prompt.prompt].question
        assert equivalent in by_prompt[prompt.prompt].equivalents
        assert unrelated in others
    assert len({tuple(sorted(one[0].prompt for one in step)) for step in drawn}) > 5
    other = trainer_of(settings=settings, facts=facts, locality=others)
    assert [other.draw(step) for step in reversed(range(9))] == drawn[::-1]
    seeded = trainer_of(settings=replace(settings, seed=1), facts=facts, locality=others)
    assert [seeded.draw(step) for step in range(9)] != drawn
    alone = [replace(settings, facts_per_step=1, seed=seed) for seed in (0, 1)]  # no order
    lonely = [trainer_of(settings=one, facts=facts[:1], locality=others) for one in alone]
    assert len({repr([one.draw(step) for step in range(9)]) for one in lonely}) == 2
    own = trainer_of(settings=settings, facts=facts)
    assert all(one[2] in by_prompt[one[0].prompt].unrelated for one in own.draw(0))


@FAMILIES
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(family, fails, tmp_path, monkeypatch):
    trainer = moved(trainer_of(family))
    trainer.save(tmp_path)
    model = trainer.bench.loaded.model
    parameters, before = dict(model.named_parameters()), bytes_of(model)
    own, attention = (
        [bytes(one.detach().numpy()) for one in trainer.weights],
        model.config._attn_implementation,
    )
    if fails:
        calls = []

        def answer_nll(logits_AW, labels_A):
            calls.append(torch.backends.cuda.flash_sdp_enabled())
            raise RuntimeError("no memory")

        monkeypatch.setattr(enn, "answer_nll", answer_nll)
        for work in (
            trainer.take_step,
            lambda: Enn(str(tmp_path)).find(trainer.bench, FACTS, silent),
        ):
            with pytest.raises(RuntimeError, match="no memory"):
                work()
        assert calls == [False, False]  # it failed inside
        assert [bytes(one.detach().numpy()) for one in trainer.weights] == own
        assert trainer.step == 0
    else:
        trainer.take_step()
        assert [bytes(one.detach().numpy()) for one in trainer.weights] != own
        Enn(str(tmp_path)).find(trainer.bench, FACTS, silent)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is one for name, one in parameters.items())
    assert not any(one.requires_grad or one.grad is not None for one in after.values())
    assert bytes_of(model) == before
    assert model.config._attn_implementation == attention
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in enn.COUNTS),
        ("inner_rate", 0.0),
        ("inner_rate", float("inf")),
        *((name, -1.0) for name in ("c_edit", "c_loc", "rate", "scalar_rate", "clip")),
        ("c_edit", float("nan")),
    ],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(EditorError, match=rf"enn\.{field} is .*, expected"):
        EnnSettings(**{field: value})


def test_of_a_fused_first_layer_the_second_alone_is_edited():
    sites = EnnSettings(layers=2).sites_in(tiny.model_of("phi3"))
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    both = EnnSettings(layers=2).sites_in(tiny.model_of("llama"))
    assert [site.name.rpartition(".")[2] for site in both] == ["up_proj", "down_proj"] * 2


def test_facts_that_do_not_serve():
    with pytest.raises(EditorError, match=r"Facts to train on: 2, .* at least 3"):
        trainer_of(facts=FACTS[:2])
    bare = [*FACTS[:3], replace(FACTS[3], unrelated=())]
    with pytest.raises(EditorError, match=r"The fact 'f3' has no unrelated question"):
        trainer_of(facts=bare)
    trainer_of(facts=bare, locality=[Question("Lake Ora lies")])


def test_a_run_that_diverges_stops_before_it_writes():
    trainer = trainer_of()
    trainer.log_rates_S.data += 800.0
    before = [one.detach().clone() for one in trainer.parameters]
    with pytest.raises(MalmendError, match=r"at step 1 .* lower enn\.rate.* another --out"):
        trainer.take_step()
    assert trainer.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_an_edit_of_another_base_is_refused(tmp_path):
    trainer = trainer_of()
    trainer.save(tmp_path)
    bench = trainer.bench
    other = replace(bench.loaded, name="other", fingerprint="f" * 64)
    with pytest.raises(
        EditorError, match=r"trained for a base with fingerprint .* the model other"
    ):
        Enn(str(tmp_path)).find(Workbench(other, bench.trunk, bench.encoder), FACTS, silent)
    cut = Trunk(bench.trunk.model, bench.trunk.sites[:1])
    with pytest.raises(EditorError, match="is for other layers"):
        Enn(str(tmp_path)).find(Workbench(bench.loaded, cut, bench.encoder), FACTS, silent)


def _saved(tmp_path):
    trainer = trainer_of()
    trainer.take_step()
    trainer.save(tmp_path)
    return trainer


def test_a_folder_that_is_damaged(tmp_path):
    about = tmp_path / "editor.json"
    with pytest.raises(EditorError, match=r"There is no editor in .* \(no editor.json\)"):
        _ = Enn(str(tmp_path)).end_of_answer
    bench = _saved(tmp_path).bench
    weights = weights_of(tmp_path)
    good, raw = json.loads(about.read_text()), weights.read_bytes()

    def refused(match):
        with pytest.raises(EditorError, match=match) as caught:
            Enn(str(tmp_path)).find(bench, FACTS, silent)
        assert "\n" not in str(caught.value)

    for text in ("", "{", "[]", "null", json.dumps({**good, "settings": {"odd": 1}})):
        about.write_text(text)
        refused("is damaged")
    for base in ({}, {"base": None}):
        about.write_text(json.dumps({n: o for n, o in good.items() if n != "base"} | base))
        refused("is damaged .*base")
    about.write_text(json.dumps({**good, "method": "malmen"}))
    refused("is none of ENN")
    about.write_text(json.dumps({**good, "settings": {**good["settings"], "layers": 0}}))
    refused(r"enn\.layers is 0")
    about.write_text(json.dumps(good))
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused("not those that it names")
    weights.unlink()
    refused("is damaged")
    weights.write_bytes(raw)
    tensors = load_file(weights)
    for name, spoilt in (
        ("log_rates", tensors["log_rates"][:1]),
        ("log_rates", tensors["log_rates"] * float("nan")),
    ):
        save_file({**tensors, name: spoilt.contiguous()}, weights)
        about.write_text(json.dumps({**good, "identity": identity_of(weights)}))
        refused("is damaged .*(shapes|NaN)")


def test_a_run_that_cannot_be_resumed(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "training.safetensors"
    raw = path.read_bytes()

    def refused(trainer, match):
        before = [one.detach().clone() for one in trainer.parameters]
        with pytest.raises(EditorError, match=match) as caught:
            trainer.resume(tmp_path)
        assert "\n" not in str(caught.value)
        assert trainer.step == 0
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))

    changed = trainer_of(settings=replace(SETTINGS, rate=0.5))
    refused(changed, "with rate = 0.01, now 0.5")
    refused(trainer_of("gpt2"), "on other model; give the same model")
    refused(trainer_of(facts=make_facts(5, seed=8)), "on other facts")
    path.write_bytes(raw[:-40])
    refused(trainer_of(), "is damaged")
    path.write_bytes(b"no such thing")
    refused(trainer_of(), "is damaged")
    path.unlink()
    refused(trainer_of(), "is damaged")
    path.write_bytes(raw)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    for spoilt in (
        {name: one for name, one in tensors.items() if name != "optimiser.0.exp_avg"},
        {**tensors, "1.value": tensors["1.value"][:1].clone()},
        {**tensors, (name := "optimiser.1.exp_avg_sq"): tensors[name] * float("nan")},
    ):
        save_file(spoilt, path, header)
        refused(trainer_of(), "is damaged .*(shapes|NaN|lacks a moment)")
