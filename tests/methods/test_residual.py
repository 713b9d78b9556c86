"""How far a shift misses what was asked: each token by itself, on models edited by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import command_support
import malmend
from command_support import CALIBRATION, make_facts
from malmend.editors.mend import Mend
from malmend.editors.pseudo import Pseudo
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import training_free
from malmend.memory import Room
from malmend.methods.solves import Solves
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.numerics.prior import Prior
from malmend.processes import ALONE, Processes
from malmend.progress import silent
from malmend.workbench import lay_out

tiny = command_support.tiny
cache = command_support.cache

FACTS = make_facts(5)


def test_what_a_token_asks_of_a_sum_is_its_own_shift_times_its_key():
    """Equation (9), of pseudo rows that are none of the captured ones."""
    made = torch.Generator().manual_seed(0)
    rows = {"dtype": torch.float64, "generator": made}
    keys_NK, other_NK = torch.randn(4, 5, **rows), torch.randn(4, 5, **rows)
    grads_NV = torch.randn(4, 3, **rows)
    summed = Mend(keys_NK, torch.empty(4, 3, dtype=torch.float64), Prior(ridge=1.0))
    for part in (slice(0, 3), slice(3, 4)):
        summed.add(part, Pseudo(other_NK[part], grads_NV[part]))
    for key, other, grad, asked in zip(keys_NK, other_NK, grads_NV, summed.diffs_NV, strict=True):
        torch.testing.assert_close(asked, -torch.outer(grad, other) @ key)


ETA = 0.8


def last_keys(model, name, question):
    """What the layer reads where the answer is said, by the model's own forward."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, a, _o: seen.append(a[0]))
    try:
        model(torch.tensor([question.ids]))
    finally:
        handle.remove()
    return seen[0][0, question.answer_start - 1 : len(question.ids) - 1].double()


@pytest.mark.parametrize("method", ["malmen", "mend"])
def test_residuals_before_and_after_against_a_loop_over_tokens(method, tiny):
    settings = replace(training_free(method), layers=2, eta=ETA, descent=Descent())
    done = malmend.edit(
        tiny.loaded,
        FACTS,
        settings=settings,
        refine=RefineSettings(passes=1),
        calibrate=tiny.calibrate,
        text=tiny.text,
        calibration=CALIBRATION,
    )
    said, shifts = done.patch.provenance, {n: done.patch.shift(n) for n in done.patch.factors}
    sites = settings.sites_in(tiny.loaded.model)
    bench = lay_out(tiny.loaded, sites)
    questions = [bench.encoder.encode(fact.question) for fact in FACTS]
    edited = copy.deepcopy(tiny.loaded.model)
    for name, shift in shifts.items():
        edited.get_submodule(name).weight.data += shift
    for key, model in (("mean_residual", tiny.loaded.model), ("residual_after", edited)):
        by_site = []
        captured = capture(bench.trunk, questions, "answer", settings.descent)
        for site, pair in zip(sites, captured, strict=True):
            keys = torch.cat([last_keys(model, site.name, one) for one in questions])
            # Without a network each token asks for minus eta g (12).
            asked = [-ETA * grad for grad in pair.value_grads_NV.double()]
            shift = shifts[site.name].double()
            ratios = [
                ((shift @ u - d).norm() / d.norm()).item()
                for u, d in zip(keys, asked, strict=True)
                if d.norm() > 0
            ]
            by_site.append(sum(ratios) / len(ratios))
        assert said[key] == pytest.approx(sum(by_site) / len(by_site), rel=1e-3)
    assert said["residual_after"] != pytest.approx(said["mean_residual"], rel=1e-3)


def test_of_a_solve_in_further_frames_the_plain_prompts_tokens_count_alone():
    """They come first."""
    made = torch.Generator().manual_seed(0)
    shift_VK, keys_NK, diffs_NV = (
        torch.randn(*shape, dtype=torch.float64, generator=made)
        for shape in ((3, 4), (7, 4), (7, 3))
    )
    editor = SimpleNamespace(names=["one"], device=torch.device("cpu"), settings=training_free())
    solved = Solves(editor, [3], silent, ALONE).solve(
        [SimpleNamespace(keys_NK=keys_NK, room=Room())],
        [SimpleNamespace(shift=lambda: shift_VK, diffs_NV=diffs_NV)],
    )
    plain = zip(keys_NK[:3], diffs_NV[:3], strict=True)
    ratios = [((shift_VK @ u - d).norm() / d.norm()).item() for u, d in plain]
    assert solved.mean_residual == pytest.approx(sum(ratios) / 3, rel=1e-12)
    assert torch.equal(solved.diffs[0], diffs_NV[:3])
    assert (solved.tokens, solved.rank) == (7, 7)


def test_of_several_processes_it_is_the_same_where_tokens_that_ask_nothing_are_spread_unevenly():
    made = torch.Generator().manual_seed(0)
    shift_VK, keys_NK, diffs_NV = (
        torch.randn(*shape, dtype=torch.float64, generator=made)
        for shape in ((3, 4), (8, 4), (8, 3))
    )
    diffs_NV[2::2] = 0  # all but one of the first process's
    editor = SimpleNamespace(names=["one"], device=torch.device("cpu"), settings=training_free())
    told: list[tuple[float, ...]] = []

    class Noted(Processes):
        def total(self, *numbers: float) -> list[float]:
            told.append(numbers)
            return list(numbers)

    def of(rows: slice, processes: Processes) -> float:
        solves = Solves(editor, [len(keys_NK[rows])], silent, processes)
        return solves.mean_residual({"one": shift_VK}, [keys_NK[rows]], [diffs_NV[rows]])

    for rank in range(2):
        of(slice(rank, None, 2), Noted(rank, 2))
    total, count = (sum(one) for one in zip(*told, strict=True))
    assert total / count == pytest.approx(of(slice(None), ALONE), rel=1e-12)
