"""A memory budget: what it is spent on, that it is kept, and that it changes no result."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import malmend
import tiny
from malmend.errors import MalmendError
from malmend.memory import Room, held
from malmend.models import budget
from malmend.models.budget import (
    MemoryPlan,
    Work,
    check_memory,
    plan_memory,
    rows_of,
    sums_of,
    watched,
    within,
)
from malmend.models.capture import capture, keys_of
from malmend.models.descent import Descent
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's accounting")
QUESTIONS = tiny.questions(40)


def trunk_of(**settings) -> Trunk:
    model = tiny.model_of("llama")
    return Trunk(model, find_sites(model, 2), TrunkSettings(**settings))


def bytes_of(room: int) -> str:
    """A budget of so much beyond what is held now."""
    return str((held() or 0) + room)


def test_half_of_what_is_left_is_for_micro_batches_and_half_for_rows(monkeypatch):
    trunk = trunk_of()
    width = max(len(one.ids) for one in QUESTIONS)
    some = max(1, budget.REHEARSED // width)
    monkeypatch.setattr(budget, "held", lambda: 1_000_000_000)
    monkeypatch.setattr(budget, "_taken", lambda run: 5_000 * width * min(some, len(QUESTIONS)))
    plan = plan_memory(trunk, "1.2GB", Work(QUESTIONS, extra=10_000_000))
    sums = sums_of(trunk.sites, rows_of(trunk, QUESTIONS, "auto"))
    left = 0.9 * 1.2e9 - 1e9 - 1e7 - sums
    assert plan.rows == int(left / 2)
    assert plan.positions <= left / 2 / 5_000 < 2 * plan.positions
    assert plan.positions & (plan.positions - 1) == 0  # a power of two
    assert "1.00 of 1.20 GB is held" in plan.said
    assert f"{plan.positions:,} positions" in plan.said


@pytest.mark.parametrize("taken", range(10_000_000, 110_000_000, 10_000_000))
def test_less_than_the_work_needs_is_refused_and_what_is_asked_for_then_suffices(
    taken, monkeypatch
):
    trunk = trunk_of()
    monkeypatch.setattr(budget, "held", lambda: 1_000_000_000)
    monkeypatch.setattr(budget, "_taken", lambda run: taken)
    with pytest.raises(MalmendError, match=r"expected at least (\d\.\d)GB") as refused:
        plan_memory(trunk, "1GB", Work(QUESTIONS))
    least = str(refused.value).split("at least ")[1].split(":")[0]
    plan_memory(trunk, least, Work(QUESTIONS))


def test_room_for_less_than_one_question_forth_and_back_is_refused(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: 1_000_000_000)
    monkeypatch.setattr(budget, "_taken", lambda run: 2_000_000_000)
    with pytest.raises(MalmendError, match="expected at least"):
        plan_memory(trunk_of(), "1.2GB", Work(QUESTIONS))  # some of which is left


def test_micro_batches_on_an_accelerator_stay_as_they_are(monkeypatch):
    """What they take there is no memory of the system's: near nothing would be measured."""
    trunk = trunk_of(batch_tokens=300)
    monkeypatch.setattr(type(trunk.model), "device", torch.device("meta"))
    monkeypatch.setattr(budget, "held", lambda: 1_000_000_000)
    monkeypatch.setattr(budget, "_taken", lambda run: 1)
    plan = plan_memory(trunk, "1.2GB", Work(QUESTIONS, extra=10_000_000))
    sums = sums_of(trunk.sites, rows_of(trunk, QUESTIONS, "auto"), solved_here=False)
    assert plan.positions == 300
    assert plan.rows == int((0.9 * 1.2e9 - 1e9 - 1e7 - sums) / 2)
    with pytest.raises(MalmendError, match="expected at least"):
        plan_memory(trunk, "1.1GB", Work(QUESTIONS))  # of which nothing is left


def test_a_system_without_accounting_is_told_so(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: None)
    with pytest.raises(MalmendError, match="Linux"):
        plan_memory(trunk_of(), "4GB", Work(QUESTIONS))


@pytest.mark.parametrize("descent", [None, Descent(3)])
def test_what_is_captured_is_the_same_in_files(descent, tmp_path):
    plain = trunk_of()
    wanted = capture(plain, QUESTIONS, "answer", descent)
    plan = plan_memory(plain, bytes_of(2_000_000_000), Work(QUESTIONS))
    other = within(plain, replace(plan, rows=0, positions=30), tmp_path / "spill")
    found = capture(other, QUESTIONS, "answer", descent)
    assert other.room.on_disk > 0 == other.room.in_memory
    assert other.settings.batch_tokens == 30
    assert (
        plain.settings.batch_tokens == TrunkSettings().batch_tokens
    )  # the first trunk is as it was
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.keys_NK, theirs.keys_NK, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.value_grads_NV, theirs.value_grads_NV, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(keys_of(other, QUESTIONS), wanted, strict=True):
        torch.testing.assert_close(mine, theirs.keys_NK, rtol=1e-9, atol=1e-12)
    assert isinstance(found[0].room, Room)
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize("rows", [5, 10_000])
def test_the_least_squares_are_planned_with_all_that_stands_at_once(rows):
    """Two sites: factor and prior's factor and two shifts of each, and what one is made with."""
    trunk = trunk_of()
    v, k = trunk.sites[0].shape_VK
    at_once = 2 * (2 * k * k + 2 * v * k) + k * k + 2 * min(rows, 4096) * (v + k)
    assert sums_of(trunk.sites, rows) == 8 * at_once


def test_rows_are_the_tokens_that_are_captured():
    trunk = trunk_of()
    for tokens in ("answer", "all"):
        wanted = len(capture(trunk, QUESTIONS, tokens)[0].keys_NK)
        assert rows_of(trunk, QUESTIONS, tokens) == wanted


def test_what_is_solved_elsewhere_takes_the_shifts_alone():
    sites = trunk_of().sites
    shifts = 8 * sum(2 * one.shape_VK[0] * one.shape_VK[1] for one in sites)
    assert sums_of(sites, 100, solved_here=False) == shifts < sums_of(sites, 100)


def test_less_than_is_held_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: 2_000_000_000)
    with pytest.raises(MalmendError, match=r"--memory is 1KB, expected more than 2\.0GB"):
        check_memory("1KB")
    check_memory("3GB")
    monkeypatch.setattr("malmend.commands.train.opened", None)
    with pytest.raises(MalmendError, match=r"--memory is 1KB, expected more than 2\.0GB"):
        malmend.train("no model", "no facts", "no folder", memory="1KB")


def test_what_else_is_done_with_micro_batches_is_rehearsed_and_the_greater_counts(monkeypatch):
    monkeypatch.setattr(budget, "held", lambda: 1_000_000_000)
    taken = {"capture": 100_000_000, "loss": 400_000_000}
    seen = []

    def measured(run):
        seen.clear()
        run()
        return taken["loss" if seen else "capture"]

    monkeypatch.setattr(budget, "_taken", measured)
    trunk = trunk_of()
    alone = plan_memory(trunk, "4GB", Work(QUESTIONS))
    both = plan_memory(trunk, "4GB", Work(QUESTIONS, also=seen.append))
    assert both.positions * 4 == alone.positions
    taken["loss"] = 1
    assert plan_memory(trunk, "4GB", Work(QUESTIONS, also=seen.append)).positions == alone.positions


@pytest.mark.parametrize("over", [False, True])
def test_more_than_the_budget_is_told(over):
    """A model's first edit held a fifth more than it was given, and nothing said so."""
    said, now = [], held()
    plan = MemoryPlan(now + (100 if over else 400) * 10**6, now, 64, 10**6)
    with watched(plan, said.append) as peak:
        taken = torch.ones(50, 10**6)
        assert taken.numel() == 5 * 10**7
    assert peak() > now + 150 * 10**6
    assert said[0] == plan.said
    assert [one.endswith("is kept for later ones.") for one in said[1:]] == [True] * over
