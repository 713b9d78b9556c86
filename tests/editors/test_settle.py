"""Equation (29) against autograd through the whole model by E itself, float64.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import (
    Meeting,
    Pair,
    captured_of,
    random_editor,
    statistics_of,
    tiny_model,
    tiny_trunk,
    together,
)
from test_refine import FACTS, OTHERS, QUESTIONS, SETTINGS, edited, nll
from test_restore import held_questions, kl_of
from torch.func import functional_call

from malmend.editors import draws
from malmend.editors import halfway as halfway_module
from malmend.editors import settle as module
from malmend.editors.draws import Readings
from malmend.editors.editor import Editor
from malmend.editors.halfway import Halfway
from malmend.editors.refine import SETTLING, RefineSettings
from malmend.editors.restore import Held
from malmend.editors.settings import EditorSettings
from malmend.editors.settle import Keeping, settle
from malmend.editors.wordings import LEFT_OUT
from malmend.errors import MalmendError
from malmend.numerics.prior import Prior

ROWS = [list(rows) for rows in zip(QUESTIONS, OTHERS, strict=True)]


class Case:
    """A model, its trunk, an editor and the shifts of its first solve."""

    def __init__(self, settings: EditorSettings = SETTINGS, layers: int = 2):
        self.model = tiny_model()
        self.trunk = tiny_trunk(self.model, layers)
        captured = captured_of(self.trunk, FACTS, settings)
        self.editor = random_editor(settings, self.trunk, captured)
        self.tokens = len(captured[0].keys_NK)  # N of the prior: of the prompts, not of frames
        self.shifts = self.editor.shifts(captured)
        self.held = Held.of(self.trunk, held_questions(), 10)

    @property
    def priors(self) -> dict[str, Prior]:
        names = enumerate(self.editor.names)
        return {name: self.editor.prior(site, self.tokens) for site, name in names}

    def settled(self, steps: int, hold: float = 3.0, rows=ROWS, **more):
        keeping = [Keeping(self.held, draws.HELD_EACH, hold)] if hold else []
        return settle(self.trunk, self.priors, self.shifts, rows, steps, keeping, **more)


def test_no_wide_factor_outlives_what_is_made_of_it():
    """They were kept by the priors as long as an edit settled, in no plan of its memory."""
    case = Case()
    priors = case.priors
    settle(case.trunk, priors, case.shifts, ROWS, 1)
    assert not any(one.is_identity or "factor_KK" in vars(one) for one in priors.values())


def said_by(model, weights, one):
    """The log probabilities at a question's answer tokens."""
    logits = functional_call(model, weights, (torch.tensor([one.ids]),)).logits[0]
    return logits[list(one.sources)].log_softmax(-1)


def reference(case: Case, hold: float, steps: int, enough: float, known: Held | None = None):
    """E by torch's Adam on (29) written out, every fact and every held question in each step.

    It starts from half the shift, in steps by the whole one; a site without one starts at zero, in
    steps by (30).
    """
    readings = [one for rows in ROWS for one in rows]
    sites = list(case.trunk.sites)
    roots, free = [], []
    for index, site in enumerate(sites):
        prior = case.editor.prior(index, case.tokens)
        precision = prior.add_to(torch.zeros(site.shape_VK[1], site.shape_VK[1]).double())
        roots.append(torch.linalg.cholesky(precision))
        start = case.shifts.get(site.name, torch.zeros(site.shape_VK).double())
        free.append((start @ roots[-1]).requires_grad_(True))
    rates = [0.06 * one.detach().pow(2).mean().sqrt().item() for one in free]
    wholes = [
        (site.weight.detach() @ root).pow(2).mean().sqrt().item()
        for site, root in zip(sites, roots, strict=True)
    ]
    parts = [rate / whole for rate, whole in zip(rates, wholes, strict=True) if rate]
    rates = [
        rate or whole * sum(parts) / len(parts) for rate, whole in zip(rates, wholes, strict=True)
    ]
    for one in free:
        one.data.mul_(0.5)
    adam = torch.optim.Adam(
        [{"params": [one], "lr": lr} for one, lr in zip(free, rates, strict=True)],
        betas=(0.9, 0.98),
    )
    holds = [(case.held, hold)] + ([(known, hold / 4)] if known else [])
    for step in range(steps):
        weights = {
            f"{site.name}.weight": site.weight.detach() + one @ torch.linalg.inv(root)
            for site, one, root in zip(sites, free, roots, strict=True)
        }
        loss = torch.zeros((), dtype=torch.float64)
        for one in readings:
            labels = torch.tensor(one.labels)
            nll_A = -said_by(case.model, weights, one).gather(1, labels[:, None])[:, 0]
            loss = loss + 7 * nll_A[nll_A > enough].sum() / len(readings)
        for held, weight in holds:
            tokens = sum(len(one.sources) for one in held.questions)
            for one in held.questions:
                after = said_by(case.model, weights, one)
                before = said_by(case.model, {}, one).detach()
                loss = loss + weight * (before.exp() * (before - after)).sum() / tokens
        adam.zero_grad()
        loss.backward()
        for group, lr in zip(adam.param_groups, rates, strict=True):
            group["lr"] = lr * (1 - step / steps)
            if step == 0:
                group["eps"] = 1e-6 * group["params"][0].grad.pow(2).mean().sqrt().item()
        adam.step()
    pairs = zip(sites, free, roots, strict=True)
    return {site.name: (one @ torch.linalg.inv(root)).detach() for site, one, root in pairs}


@pytest.mark.parametrize("enough", [0.05, 3.0])
def test_it_is_adam_on_the_losses_in_the_metric_of_the_prior(monkeypatch, enough):
    monkeypatch.setattr(module, "SAID", enough)
    case = Case()
    found = case.settled(4)
    wanted = reference(case, 3.0, 4, enough)
    for name, shift_VK in found.items():
        assert shift_VK.dtype == torch.float64
        assert (shift_VK - case.shifts[name]).abs().max() > 1e-3  # of the order of its steps
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-8, atol=1e-10)


def test_each_thing_that_is_kept_is_a_mean_of_its_own():
    case = Case()
    known = Held.of_all(case.trunk, held_questions()[:1])
    case.held = Held.of_all(case.trunk, held_questions()[1:])
    keeping = [Keeping(case.held, 48, 3.0), Keeping(known, 16, 0.75)]
    found = settle(case.trunk, case.priors, case.shifts, ROWS, 4, keeping)
    wanted, plain = reference(case, 3.0, 4, 0.05, known), reference(case, 3.0, 4, 0.05)
    for name, shift_VK in found.items():
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-8, atol=1e-10)
        assert (wanted[name] - plain[name]).abs().max() > 1e-4


def test_a_site_that_was_not_solved_for_settles_from_zero():
    case = Case(layers=3)
    first, *solved = case.shifts
    assert len(solved) == 2  # so that their mean is told from either
    del case.shifts[first]
    found = case.settled(4)
    wanted = reference(case, 3.0, 4, 0.05)
    assert found.keys() == wanted.keys()
    assert found[first].abs().max() > 1e-3
    for name, shift_VK in found.items():
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-8, atol=1e-10)


def test_the_metric_is_the_prior_of_the_solves():
    """Of an editor of all tokens N counts them all, as in the solves before."""
    case = Case(replace(SETTINGS, tokens="all"))
    assert case.tokens > Case().tokens
    found = case.settled(3)
    wanted = reference(case, 3.0, 3, 0.05)
    for name, shift_VK in found.items():
        torch.testing.assert_close(shift_VK, wanted[name], rtol=1e-8, atol=1e-10)


def test_a_singular_prior_is_refused():
    case = Case()
    width = case.trunk.sites[0].shape_VK[1]
    singular = Prior(0.0, (1.0,), (torch.zeros(width, width, dtype=torch.float64),))
    case.editor.prior = lambda _site, _tokens: singular
    with pytest.raises(MalmendError, match="singular"):
        case.settled(1)


def test_what_it_holds_beside_micro_batches_is_planned():
    trunk = tiny_trunk(tiny_model())
    v, k = trunk.sites[0].shape_VK
    assert module.settling_bytes(trunk, ()) == 2 * 8 * (7 * v * k + k * k)


def test_of_what_lies_on_an_accelerator_only_the_copies_are_planned(monkeypatch):
    """--memory is of the system's memory; gigabytes of another were counted."""
    trunk, asked = tiny_trunk(tiny_model()), ROWS[0]
    states = module.settling_bytes(trunk, asked) - module.settling_bytes(trunk, ())
    monkeypatch.setattr(type(trunk.model), "device", torch.device("meta"))
    v, k = trunk.sites[0].shape_VK
    assert module.settling_bytes(trunk, asked) == 2 * 8 * 3 * v * k + states
    assert states > 0


def test_the_numbers_are_those_of_the_docs():
    read, kept = (112, 80, 7, 0.02, 3.0, 0.5, 1.5), (48, 2, 96, 0.05)
    assert (*read, *kept, 0.5, 0.06, 0.9, 0.98, 1e-6) == module.NUMBERS
    assert (RefineSettings.hold, RefineSettings.wordings, LEFT_OUT) == (150.0, 8, 0.3)
    assert [150.0, 8, 128, 3.0, 400, True, 2, 0.3, 1, 6, *module.NUMBERS] == SETTLING


def test_what_is_asked_is_said_and_what_is_held_stays():
    case = Case()
    found = case.settled(40, hold=10.0)
    before, after = (edited(case.model, case.trunk, one) for one in (case.shifts, found))
    assert nll(after, QUESTIONS) < nll(before, QUESTIONS)
    assert nll(after, OTHERS) < nll(before, OTHERS)

    def moved(other) -> float:
        return sum(kl_of(case.model, other, one).sum().item() for one in case.held.questions)

    assert moved(after) < moved(before)
    assert moved(after) < moved(edited(case.model, case.trunk, case.settled(40, hold=0.0)))


def test_what_is_said_surely_enough_pulls_no_more(monkeypatch):
    """Without anything held nothing is left to ask: the shift stays as it starts, which is half."""
    monkeypatch.setattr(module, "SAID", 1e9)
    case = Case()
    found = case.settled(40, hold=0.0)
    for name, shift_VK in found.items():
        torch.testing.assert_close(shift_VK, case.shifts[name] / 2, rtol=1e-9, atol=1e-12)


def test_an_identity_for_prior_is_plain_adam():
    case = Case()
    captured = captured_of(case.trunk, FACTS, SETTINGS)
    case.editor = Editor(
        replace(SETTINGS, prior="identity"),
        {site.name: site.shape_VK for site in case.trunk.sites},
        statistics_of(case.trunk, captured),
        ridge=0.7,
    )
    found = case.settled(1, hold=0.0)
    for name, shift_VK in found.items():
        size = case.shifts[name].square().mean().sqrt()
        step = (shift_VK - case.shifts[name] / 2).abs()
        torch.testing.assert_close(step.max(), 0.06 * size, rtol=1e-4, atol=0.0)


def test_the_weights_stay_and_the_same_is_found_again():
    case = Case()
    kept = {name: one.clone() for name, one in case.model.state_dict().items()}
    generator = torch.random.get_rng_state()
    counts = []
    first = case.settled(3, progress=counts.append)
    assert counts == [1, 1, 1]
    second = case.settled(3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(kept[name], one) for name, one in case.model.state_dict().items())
    assert not any(one.requires_grad for one in case.model.parameters())
    assert torch.equal(generator, torch.random.get_rng_state())


def test_a_step_that_gives_nan_is_the_last(monkeypatch, tmp_path):
    """All others were taken too, and what they gave was kept to be gone on from."""
    case, counts, real = Case(), [], module.weight_grads
    halfway = Halfway(tmp_path / "kept")

    def third_breaks(trunk, terms):
        losses, grads = real(trunk, terms)
        if len(counts) == 2:
            next(iter(grads.values()))[0, 0] = torch.inf
        return losses, grads

    monkeypatch.setattr(module, "weight_grads", third_breaks)
    monkeypatch.setattr(halfway_module, "EVERY", 3)
    found = case.settled(9, progress=counts.append, halfway=halfway)
    assert len(counts) == 2
    assert not all(shift_VK.isfinite().all() for shift_VK in found.values())
    assert halfway.found() == (0, {})


def test_two_processes_settle_as_one_does(monkeypatch):
    """With two facts and one held line in each step, which one process has none of."""
    monkeypatch.setattr(draws, "READINGS", 4)
    monkeypatch.setattr(draws, "HELD_EACH", 1)
    wanted, meeting, found = Case().settled(7), Meeting(), {}

    cases = Case(), Case()  # a model is made by the one generator of all threads

    def run(rank: int) -> None:
        case, mine = cases[rank], Pair(rank, meeting)
        case.held = Held(case.held.questions[rank::2], case.held.states[rank::2])
        found[rank] = case.settled(7, rows=ROWS[rank::2], processes=mine)

    together(run)
    for name, shift_VK in wanted.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], shift_VK, rtol=1e-8, atol=1e-10)


def test_what_is_open_in_each_reading_is_told_to_what_ranks_them(monkeypatch):
    case, told, read, draw = Case(), [], [], Readings.draw

    def noted(readings):
        read.extend(found := draw(readings))
        return found

    monkeypatch.setattr(module, "SAID", 0.0)
    monkeypatch.setattr(Readings, "draw", noted)
    monkeypatch.setattr(Readings, "read", lambda _self, losses_Q: told.append(losses_Q))
    case.settled(1)
    half = {name: shift_VK / 2 for name, shift_VK in case.shifts.items()}
    model, wanted = edited(case.model, case.trunk, half), []
    assert len(read) == sum(map(len, ROWS))
    for one in read:
        said_A = said_by(model, {}, one).gather(1, torch.tensor(one.labels)[:, None])
        wanted.append(-said_A.sum().item())
    torch.testing.assert_close(
        told[0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
