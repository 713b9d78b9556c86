"""Equation (28) against autograd over free vectors in the model's own forward, float64.

Shape letters: T positions, V value width, W vocabulary.
"""

from __future__ import annotations

import random

import pytest
import torch
from support import (
    captured_of,
    encoder,
    random_editor,
    random_questions,
    tiny_model,
    tiny_trunk,
)
from test_refine import FACTS, QUESTIONS, SETTINGS, edited

from malmend.editors import restore
from malmend.editors.refine import RefineSettings, further
from malmend.editors.restore import MOVED, Held, moved, restoring
from malmend.facts.encoded import Encoded
from malmend.models import descent, output
from malmend.patch import shifted
from malmend.processes import Processes


def held_questions(count: int = 12) -> list[Encoded]:
    """Questions, and every other one as a line of text: all tokens but the first are its answer."""
    asked = encoder("none").encode_all(random_questions(random.Random(5), count))
    return [
        Encoded(one.ids, 2, len(one.ids)) if index % 2 else one for index, one in enumerate(asked)
    ]


@pytest.fixture
def disturbed():
    """A model, its trunk, shifts that move much, and what should be held."""
    model = tiny_model()
    trunk = tiny_trunk(model)
    editor = random_editor(SETTINGS, trunk, captured_of(trunk, FACTS, SETTINGS))
    shifts = editor.shifts(captured_of(trunk, FACTS, SETTINGS))
    return model, trunk, editor, shifts, Held.of(trunk, held_questions(), 10)


def kl_of(model, other, one: Encoded, deltas=None, sites=(), at=()) -> torch.Tensor:
    """KL(model || other) at a question's answer tokens, ``deltas`` added to layers' outputs."""
    modules = dict(other.named_modules())

    def adding(delta):
        def hook(_module, _args, output):
            full = torch.zeros_like(output)
            full[0, list(at)] = delta
            return output + full

        return hook

    handles = [
        modules[site.name].register_forward_hook(adding(delta))
        for site, delta in zip(sites, deltas or (), strict=False)
    ]
    ids = torch.tensor([one.ids])
    before = model(ids).logits[0, list(one.sources)].log_softmax(-1).detach()
    after = other(ids).logits[0, list(one.sources)].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return (before.exp() * (before - after)).sum(-1)


def test_what_moved_is_kl_from_the_unedited_model(disturbed):
    model, trunk, _, shifts, held = disturbed
    with shifted(list(trunk.sites), shifts):
        found = moved(trunk, held)
    other = edited(model, trunk, shifts)
    assert len(found) == len(held.questions) == 12
    for one, kl in zip(held.questions, found, strict=True):
        torch.testing.assert_close(kl, kl_of(model, other, one), rtol=1e-9, atol=1e-12)


def test_the_numbers_are_those_of_the_docs():
    assert restore.NUMBERS == (0.15, 0.05, 2, 1.5, 20, 2000, 10)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [({"STEPS": 5, "RATE": 0.9, "BACK": 0.6}, 1), ({}, 100), ({"STEPS": 4, "LONGER": 0.7}, 3)],
)
def test_rows_are_the_descended_keys_and_moves_of_moved_tokens(
    disturbed, monkeypatch, numbers, words
):
    """Each question descended by itself through autograd, in the model with W + S."""
    model, trunk, _, shifts, held = disturbed
    for name, value in numbers.items():
        monkeypatch.setattr(descent if name == "LONGER" else restore, name, value)
    monkeypatch.setattr(output, "LOGITS", words * trunk.words)
    closed = shortened = 0
    with shifted(list(trunk.sites), shifts):
        found = restoring(trunk, held, 1000)
        order = [i for indices, _ in trunk.batches(held.questions) for i in indices]
    other = edited(model, trunk, shifts)
    keys = [[] for _ in trunk.sites]
    moves = [[] for _ in trunk.sites]
    for index in order:
        one = held.questions[index]
        first = kl_of(model, other, one)
        rows = (first > MOVED).nonzero().flatten()
        if not len(rows):
            continue
        at = [one.sources[row] for row in rows]
        deltas = [
            torch.zeros(len(at), s.shape_VK[0], dtype=torch.float64, requires_grad=True)
            for s in trunk.sites
        ]
        longest = None
        for _ in range(restore.STEPS):
            loss = kl_of(model, other, one, deltas, trunk.sites, at)[rows]
            grads = torch.autograd.grad(loss.sum(), deltas)
            norms = [grad.norm(dim=1) for grad in grads]
            is_open = loss.detach() > restore.BACK
            step = restore.RATE * loss.detach() / sum(norms) * is_open
            longest = descent.LONGER * step if longest is None else longest
            closed += int((~is_open).sum())
            shortened += int((step > longest).sum())
            step = torch.minimum(step, longest)
            for delta, grad, norm in zip(deltas, grads, norms, strict=True):
                delta.data -= step[:, None] * grad / norm[:, None]
        modules = dict(other.named_modules())
        for site, delta, key, move in zip(trunk.sites, deltas, keys, moves, strict=True):
            seen = []
            handle = modules[site.name].register_forward_hook(
                lambda _m, args, _o, seen=seen: seen.append(args[0])
            )
            other(torch.tensor([one.ids]))
            handle.remove()
            key.append(seen[0][0, at])
            move.append(delta.detach())
    assert sum(map(len, keys[0])) > 20
    assert closed > 0 or "BACK" not in numbers
    assert shortened > 0 or "LONGER" not in numbers
    for pair, key, move in zip(found, keys, moves, strict=True):
        torch.testing.assert_close(pair.keys_NK, torch.cat(key), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(pair.value_grads_NV, -torch.cat(move), rtol=1e-6, atol=1e-9)


def test_no_second_step_is_longer_than_ten_times_the_first(disturbed, monkeypatch):
    """Of a token whose gradient all but vanishes while its loss stays, as behind a norm."""
    _, trunk, _, shifts, held = disturbed
    real, steps = restore._brought_back, []

    def fading(_trunk, _batch, is_moved_A, before_MX):
        taken = 0

        def kl_from(*given):
            part = output.kl_from(*given)

            def faded(rows, at_AW):
                nonlocal taken
                kl_A, by_AW = part(rows, at_AW)
                taken += 1
                return torch.ones_like(kl_A), by_AW * 1e-6 ** (taken - 1)

            return faded

        found = []
        for count in (1, 2):
            taken = 0
            with monkeypatch.context() as patch:
                patch.setattr(restore, "kl_from", kl_from)
                patch.setattr(restore, "STEPS", count)
                found.append(real(_trunk, _batch, is_moved_A, before_MX))
        steps.append(found)
        return found[-1]

    monkeypatch.setattr(restore, "_brought_back", fading)
    with shifted(list(trunk.sites), shifts):
        restoring(trunk, held, 1000)
    assert steps
    for once, twice in steps:
        for (_, one_MV), (_, two_MV) in zip(once, twice, strict=True):
            first_M, second_M = one_MV.norm(dim=1), (two_MV - one_MV).norm(dim=1)
            torch.testing.assert_close(second_M, 10 * first_M, rtol=1e-9, atol=0)


def test_no_more_rows_than_asked_for_and_the_most_moved_first(disturbed, monkeypatch):
    _, trunk, _, shifts, held = disturbed
    monkeypatch.setattr(restore, "MOVED", 0.7)
    with shifted(list(trunk.sites), shifts):
        kl = torch.cat(moved(trunk, held))
        few = restoring(trunk, held, 5)
        every = restoring(trunk, held, len(kl))
        count = int((kl > 0.7).sum())
        nearly = restoring(trunk, held, count + 1)
    assert len(every[0].keys_NK) == len(nearly[0].keys_NK) == count > 5
    assert count + 1 < len(kl)  # the next in rank has not moved
    assert len(few[0].keys_NK) == 5
    least = kl.sort(descending=True).values[5].item()
    all_keys = {tuple(key.tolist()) for key in every[0].keys_NK}
    assert {tuple(key.tolist()) for key in few[0].keys_NK} <= all_keys
    assert int((kl > least).sum()) == 5


def test_what_did_not_move_has_no_row(disturbed):
    _, trunk, _, _, held = disturbed
    found = restoring(trunk, held, 1000)
    assert [(len(pair.keys_NK), len(pair.value_grads_NV)) for pair in found] == [(0, 0)] * 2
    assert found[0].keys_NK.shape[1] == trunk.sites[0].shape_VK[1]


def test_nothing_held_is_nothing_restored(disturbed):
    _, trunk, _, shifts, _ = disturbed
    with shifted(list(trunk.sites), shifts):
        assert len(restoring(trunk, Held((), ()), 10)[0].keys_NK) == 0


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_a_solve_with_restoring_rows_says_more_of_what_was_said(disturbed, weight):
    """Measured with W + S in the weights of a copy."""
    model, trunk, editor, shifts, held = disturbed
    after = {}
    for given in (None, held):
        refine = RefineSettings(restore=weight)
        _, found = further(editor, trunk, shifts, QUESTIONS, {}, refine, given)
        again = {name: one.shift() for name, one in zip(editor.names, found, strict=True)}
        other = edited(model, trunk, again)
        after[given is held] = sum(kl_of(model, other, one).mean() for one in held.questions)
    assert after[True] < 0.9 * after[False]


def test_weights_and_states_are_left_as_they_were(disturbed):
    model, trunk, _, shifts, held = disturbed
    weights = {name: one.clone() for name, one in model.named_parameters()}
    states = [one.clone() for one in held.states]
    with shifted(list(trunk.sites), shifts):
        restoring(trunk, held, 100)
    assert all(torch.equal(one, weights[name]) for name, one in model.named_parameters())
    assert all(map(torch.equal, held.states, states))


@pytest.mark.parametrize(("edited_tokens", "read"), [(1, 3), (9, 6)])
def test_more_is_held_of_a_larger_edit(monkeypatch, edited_tokens, read):
    monkeypatch.setattr(restore, "EACH", 2)
    monkeypatch.setattr(restore, "FEWEST", 8)
    asked = [Encoded((1, 2, 3), 2, 3)] * 10
    assert len(Held.of(tiny_trunk(tiny_model()), asked, edited_tokens).questions) == read


def test_the_rehearsal_brings_back_every_token_but_the_first(monkeypatch):
    """What a memory budget is planned by: as much as a micro-batch of lines can ask for."""
    trunk = tiny_trunk(tiny_model())
    asked = []

    def seen(_trunk, batch, is_moved_A, before_AX):
        asked.append((batch.tokens.sources, int(is_moved_A.sum()), len(before_AX)))
        return real(_trunk, batch, is_moved_A, before_AX)

    real = restore._brought_back
    monkeypatch.setattr(restore, "_brought_back", seen)
    restore.rehearse(trunk, QUESTIONS)
    lengths = tuple(len(one.ids) - 2 for one in QUESTIONS)
    assert asked == [(lengths, sum(lengths), sum(lengths))]


class Two(Processes):
    """Two processes, the other of which has as much of everything, but held nothing that moved."""

    def total(self, *numbers: float) -> list[float]:
        return [2 * number for number in numbers]

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        self.dtypes.append(values.dtype)
        return torch.cat([values, torch.zeros_like(values)])


def test_of_two_processes_rows_are_as_many_as_both_may_have(disturbed):
    _, trunk, _, shifts, held = disturbed
    both = Two(0, 2)
    object.__setattr__(both, "dtypes", [])
    with shifted(list(trunk.sites), shifts):
        assert len(restoring(trunk, held, 3, processes=both)[0].keys_NK) == 6
        restoring(trunk, Held((), ()), 3, processes=both)
    assert both.dtypes == [torch.float64] * 2  # one sort of numbers, held by it or not
    asked = held_questions()
    assert Held.of(trunk, asked, 10, Processes(1, 2)).questions == tuple(asked[1::2])


def test_a_token_that_no_move_reaches_stays():
    """A final norm of zeros: every logit is the same, whatever the layers put out.

    In float32, where a step by no gradient would be infinite.
    """
    model = tiny_model(dtype=torch.float32)
    trunk = tiny_trunk(model)
    held = Held.of(trunk, held_questions(), 10)
    model.model.norm.weight.data.zero_()
    found = restoring(trunk, held, 1000)
    assert len(found[0].keys_NK) > 20
    assert all((pair.value_grads_NV == 0).all() for pair in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_rows_are_float32(dtype):
    trunk = tiny_trunk(tiny_model(dtype=dtype))
    held = Held.of(trunk, held_questions(), 10)
    noise = torch.Generator().manual_seed(1)
    shifts = {s.name: 0.3 * torch.randn(s.shape_VK, generator=noise) for s in trunk.sites}
    with shifted(list(trunk.sites), shifts):
        found = restoring(trunk, held, 1000)
    assert len(found[0].keys_NK) > 10
    for pair in found:
        assert (pair.keys_NK.dtype, pair.value_grads_NV.dtype) == (torch.float32,) * 2
        assert pair.value_grads_NV.isfinite().all()
        assert (pair.value_grads_NV != 0).any(dim=1).all()
