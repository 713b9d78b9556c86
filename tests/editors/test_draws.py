"""What a step of settling reads: every reading in turn, then what is open; others in turns."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from support import Meeting, Pair, together

from malmend.editors import draws
from malmend.editors.draws import Readings, in_turns, lines_for, steps_for
from malmend.processes import ALONE, Processes


def test_the_steps_of_a_round_and_the_lines_that_they_read():
    assert steps_for(7 * 1024, 3.0, 400) == 192
    assert steps_for(113, 300.0, 400) == 303
    assert steps_for(21, 4.0, 400) == 80
    assert steps_for(8 * 4096, 3.0, 400) == 400
    assert steps_for(21, 4.0, 5) == 5  # what a user gives is held to, however few
    assert lines_for(80) == 1920


@pytest.mark.parametrize(("count", "size"), [(7, 3), (7, 16), (1, 4), (12, 4)])
def test_everything_is_drawn_once_before_anything_is_drawn_again(count, size):
    some = list(islice(in_turns(count, size, Processes()), 3 * count))
    assert {len(draw) for draw in some} == {min(count, size)}
    order = [one for draw in some for one in draw]
    for start in range(0, len(order) - count, count):
        assert sorted(order[start : start + count]) == list(range(count))


def test_processes_draw_what_one_draws():
    one = islice(in_turns(11, 4, Processes()), 20)
    parts = [islice(in_turns(11, 4, Processes(rank, 2)), 20) for rank in range(2)]
    for whole, first, second in zip(one, *parts, strict=True):
        mine = [2 * index for index in first] + [2 * index + 1 for index in second]
        assert sorted(mine) == sorted(whole)


class Way:
    """A question that only has a name and what is open in it."""

    def __init__(self, name: str, nats: float = 1.0):
        self.name, self.nats = name, nats


def ways(facts: int, *nats: float) -> list[list[Way]]:
    return [[Way(f"{fact}{way}", one) for way, one in enumerate(nats)] for fact in range(facts)]


@pytest.fixture
def at_once(monkeypatch):
    return lambda count: monkeypatch.setattr(draws, "READINGS", count)


def drawn(asked, steps: int, processes=ALONE) -> list[list[Way]]:
    readings, found = Readings(asked, processes, steps), []
    for _ in range(steps):
        found.append(readings.draw())
        readings.read(torch.tensor([one.nats for one in found[-1]], dtype=torch.float64))
    return found


def test_a_ranking_that_is_taken_up_draws_as_the_one_that_was_kept(at_once):
    at_once(32)
    asked = ways(40, 0.0, 3.0)
    first = Readings(asked, ALONE, 18)
    for _ in range(9):
        first.read(torch.tensor([one.nats for one in first.draw()], dtype=torch.float64))
    second = Readings(asked, ALONE, 18)
    second.go_on({name: one.clone() for name, one in first.state().items()})
    for _ in range(9):
        names = [one.name for one in first.draw()]
        assert [one.name for one in second.draw()] == names
        for readings in (first, second):
            readings.read(torch.rand(len(names), generator=torch.Generator().manual_seed(1)))


def test_everything_is_read_once_before_anything_is_read_again(at_once):
    at_once(48)
    asked = ways(50, 1.0, 1.0, 1.0)
    del asked[7][1:]  # too long in any frame
    steps = drawn(asked, 4)
    assert [len(step) for step in steps] == [48, 48, 48, 48]
    names = [one.name for step in steps for one in step]
    assert len(set(names[:144])) == 144
    assert len(set(names)) == 148 == sum(map(len, asked))


@pytest.mark.parametrize(("facts", "steps"), [(48, 12), (48, 11), (48, 4), (48, 3), (40, 2)])
def test_where_not_all_can_be_read_the_facts_own_prompts_are(at_once, facts, steps):
    at_once(16)
    taken = [[one.name for one in step] for step in drawn(ways(facts, 1.0, 1.0, 1.0, 1.0), steps)]
    names = [name for step in taken for name in step]
    assert len(set(names)) == 16 * steps  # none twice while others wait
    plain = {f"{fact}0" for fact in range(facts)}
    assert plain <= set(names) or set(names) < plain
    if steps == 11:  # neither all of them at first nor all at last
        assert 0 < sum(name in plain for name in names[:48]) < 24
        assert 0 < sum(name in plain for name in names[-48:]) < 24


def test_what_is_open_is_read_the_more_often_and_what_is_said_now_and_then(at_once):
    at_once(64)
    counts = {0.0: 0, 0.3: 0, 3.0: 0, 30.0: 0}
    steps = drawn(ways(64, *counts), 400)
    for one in (one for step in steps[4:] for one in step):
        counts[one.nats] += 1
    assert len({one.name for step in steps[4:] for one in step if not one.nats}) == 64
    assert 0 < 4 * counts[0.0] < counts[0.3]
    assert 3 * counts[0.3] < counts[3.0]
    assert abs(counts[30.0] - counts[3.0]) < 0.05 * counts[3.0]  # beyond the most it counts with


def test_what_was_read_long_ago_is_read_before_what_was_just_read(at_once):
    at_once(16)
    steps = drawn(ways(64, 1.0), 100)
    last, pauses = {}, []
    for number, step in enumerate(steps):
        for one in step:
            pauses.append(number - last.get(one.name, number - 4))
            last[one.name] = number
    assert min(pauses) >= 2
    assert max(pauses) <= 8  # 4 is the mean


def test_what_is_alike_is_read_in_another_order_each_round(at_once):
    at_once(16)
    steps = [[one.name for one in step] for step in drawn(ways(64, 1.0), 12)]
    rounds = [steps[start : start + 4] for start in (0, 4, 8)]
    first = [{name: at for at, step in enumerate(one) for name in step} for one in rounds]
    assert first[0] != first[1] != first[2]


def test_what_is_drawn_weighs_seven_together_however_many_ways_a_fact_has():
    for facts, many in ((64, 1), (64, 3), (5, 2)):
        readings = Readings(ways(facts, *[1.0] * many), Processes(), 9)
        assert readings.weight * len(readings.draw()) == pytest.approx(7)
    asked = ways(8, 1.0, 1.0)
    del asked[3][1:]  # which then weighs half of what the others do
    assert Readings(asked, Processes(), 9).weight == pytest.approx(7 / 15)


def test_processes_read_what_one_reads(at_once):
    at_once(48)
    asked = ways(51, 0.1, 2.0, 0.5)
    for some in asked[::2]:  # the first process has fewer ways than the other
        del some[2:]
    alone = [[one.name for one in step] for step in drawn(asked, 30)]
    meeting, found = Meeting(), {}

    def run(rank: int) -> None:
        found[rank] = drawn(asked[rank::2], 30, Pair(rank, meeting))

    together(run)
    for step, first, second in zip(alone, found[0], found[1], strict=True):
        assert sorted(step) == sorted(one.name for one in [*first, *second])
