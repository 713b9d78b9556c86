"""Fine-tuning against torch's AdamW on a copy of the model, its weights tuned in place."""

from __future__ import annotations

import copy

import pytest
import torch
from methods_support import FACTS, answer_log_probs, bench_of, encoded, nll, with_shifts

import tiny
from malmend.editors.keymoments import end_of, first_of, passages_of
from malmend.editors.training_facts import batches
from malmend.errors import EditorError
from malmend.facts.readers import read_text
from malmend.material import general_text
from malmend.methods import ft
from malmend.methods.ft import FineTuning, FineTuningKL
from malmend.progress import silent
from malmend.workbench import shipped

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
TUNED = FineTuning(layers=1, rate=2e-2, decay=0.3, epochs=3, batch=2)
HELD = FineTuningKL(layers=1, rate=2e-2, decay=0.3, epochs=3, batch=2, locality=0.7)


def passages(bench):
    lines = passages_of(bench.encoder, read_text(shipped("text.txt")))
    return [end_of(one, ft.LAST) for one in lines]


def by_hand(bench, method, held=()):
    """The tuned weights, by autograd through the whole model."""
    model, questions = copy.deepcopy(bench.loaded.model), encoded(bench)
    before = copy.deepcopy(model)
    names = [f"{site.name}.weight" for site in bench.trunk.sites]
    weights = [dict(model.named_parameters())[name].requires_grad_(True) for name in names]
    optimiser = torch.optim.AdamW(weights, method.rate, weight_decay=method.decay)
    order = batches(len(questions), method.batch, method.epochs, method.seed)
    turn = 0  # each in its turn, after a short last batch too
    for batch in order:
        loss = nll(model, [questions[i] for i in batch])
        for _ in batch if held else ():
            passage, turn = held[turn % len(held)], turn + 1
            here, there = (answer_log_probs(one, passage) for one in (model, before))
            kl = (there.exp() * (there - here)).sum()
            loss = loss + method.locality * kl / len(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    start = dict(before.named_parameters())
    return {
        site.name: site.oriented((weight - start[name]).detach())
        for site, weight, name in zip(bench.trunk.sites, weights, names, strict=True)
    }


@FAMILIES
def test_the_shift_is_what_adamw_moves_the_weights_by(family):
    bench = bench_of(family, TUNED)
    found = TUNED.find(bench, FACTS, silent)
    wanted = by_hand(bench, TUNED)
    assert len(wanted) == 2  # both layers of the last block
    for name, shift_VK in found.shifts.items():
        assert shift_VK.abs().max() > 1e-2
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-7, atol=1e-9)


@FAMILIES
def test_text_is_held_by_the_kl_of_its_ends(family, monkeypatch):
    bench = bench_of(family, HELD)
    few = passages(bench)[:3]
    monkeypatch.setattr(ft, "general_text", lambda encoder: general_text(encoder)[:3])
    found = HELD.find(bench, FACTS, silent)
    wanted = by_hand(bench, HELD, few)
    free = by_hand(bench, TUNED)
    for name, shift_VK in found.shifts.items():
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-6, atol=1e-8)
        assert (shift_VK - free[name]).norm() > 1e-2 * shift_VK.norm()  # the KL had a say


def test_the_text_that_is_held_is_what_a_prior_reads():
    bench = bench_of("llama", HELD)
    held = HELD._passages(bench)
    lines = passages_of(bench.encoder, read_text(shipped("text.txt")))
    assert [one.equivalent.ids for one in held] == [one.ids for one in first_of(lines, 16_000)]
    assert len(held) < len(lines)  # the rest is left for perplexity


def test_answers_become_likely():
    method = FineTuning(layers=2, rate=2e-2, epochs=60)
    bench = bench_of("llama", method)
    found, questions = method.find(bench, FACTS, silent), encoded(bench)
    before, after = (
        nll(bench.loaded.model, questions),
        nll(with_shifts(bench, found.shifts), questions),
    )
    assert after < 0.5 * before
    assert found.said["losses"][-1] < 0.5 * found.said["losses"][0]


def test_an_epoch_sees_every_fact_once_and_each_in_another_order():
    seen = list(batches(5, 2, 3, seed=1))
    assert [len(one) for one in seen] == [2, 2, 1] * 3
    epochs = [[i for batch in seen[at : at + 3] for i in batch] for at in (0, 3, 6)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in epochs)
    assert len({tuple(one) for one in epochs}) == 3
    assert seen == list(batches(5, 2, 3, seed=1))
    assert seen != list(batches(5, 2, 3, seed=2))


def test_of_a_fused_first_layer_the_second_alone_is_tuned():
    sites = FineTuning(layers=2).sites_in(tiny.model_of("phi3"))
    assert [site.name for site in sites] == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    both = FineTuning(layers=2).sites_in(tiny.model_of("llama"))
    assert [site.name.rpartition(".")[2] for site in both] == ["up_proj", "down_proj"] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("layers", 0), ("batch", 0), ("rate", -1.0), ("locality", float("nan"))],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(EditorError, match=rf"ft\.{field} is .*, expected"):
        FineTuning(**{field: value})


def test_names():
    assert (FineTuning().name, FineTuningKL().name) == ("ft", "ft-kl")
