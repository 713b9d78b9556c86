"""A descent that was stopped goes on to what it would have come to, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support import Meeting, Pair, tiny_model, together
from test_settle import ROWS, Case

from malmend.editors import draws
from malmend.editors import halfway as module
from malmend.editors.halfway import Halfway


class Stopped(Exception):
    pass


def stop_after(steps: int):
    taken = []

    def count(more: int) -> None:
        taken.append(more)
        if sum(taken) >= steps:
            raise Stopped

    return count


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 3)
    monkeypatch.setattr(draws, "READINGS", 4)
    monkeypatch.setattr(draws, "HELD_EACH", 1)


@pytest.mark.parametrize("stopped", [4, 6, 7])
def test_what_was_stopped_ends_as_what_was_not(tmp_path, stopped):
    wanted, place = Case().settled(11), Halfway.of(tmp_path, ("a", 1))
    with pytest.raises(Stopped):
        Case().settled(11, halfway=place, progress=stop_after(stopped))
    counts = []
    found = Case().settled(11, halfway=place, progress=counts.append)
    before = (stopped - 1) // 3 * 3  # the step that was stopped in was not kept
    assert counts == [before, *[1] * (11 - before)]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_was_never_kept_starts_at_the_first_step(tmp_path):
    counts = []
    Case().settled(4, halfway=Halfway.of(tmp_path, ("a",)), progress=counts.append)
    assert counts == [1, 1, 1, 1]


def test_another_descent_has_another_place(tmp_path):
    parts = ("model", ROWS, torch.ones(2, 3), 60.0)
    place = Halfway.of(tmp_path, parts)
    assert Halfway.of(tmp_path, parts).path == place.path
    for index, other in enumerate(("mode", ROWS[1:], torch.ones(2, 3) + 1e-6, 61.0)):
        changed = [*parts[:index], other, *parts[index + 1 :]]
        assert Halfway.of(tmp_path, changed).path != place.path


def test_a_descent_that_has_ended_is_kept_whole_until_its_patch_is_written(tmp_path):
    place, counts = Halfway.of(tmp_path, ("a",)), []
    wanted = Case().settled(5, halfway=place)
    found = Case().settled(5, halfway=place, progress=counts.append)
    assert counts == [5]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_one_process_keeps_removes_no_part_of_another(tmp_path, monkeypatch):
    """Each has read its own share."""
    monkeypatch.setattr(module, "MOST_KEPT", 0)
    older = Halfway.of(tmp_path, ("b",))
    older.keep(3, lambda: {"one": torch.ones(2)})
    meeting, places = Meeting(), {}

    def run(rank: int) -> None:
        places[rank] = Halfway.of(tmp_path, ROWS[rank::2], Pair(rank, meeting))

    together(run)
    for place in places.values():
        place.keep(3, lambda: {"one": torch.ones(2)})
    assert sorted(tmp_path.iterdir()) == sorted(place.path for place in places.values())


def test_a_damaged_one_and_a_folder_that_cannot_be_made_start_anew(tmp_path):
    place = Halfway.of(tmp_path, ("a",))
    place.keep(3, lambda: {"one": torch.ones(2)})
    place.path.write_bytes(place.path.read_bytes()[:20])
    assert place.found() == (0, {})
    (tmp_path / "file").write_text("")
    nowhere = Halfway.of(tmp_path / "file", ("a",))
    nowhere.keep(3, lambda: {"one": torch.ones(2)})
    assert nowhere.found() == (0, {})


def test_one_that_lacks_a_part_starts_anew(tmp_path):
    place, counts = Halfway.of(tmp_path, ("a",)), []
    wanted = Case().settled(5, halfway=place)
    steps, whole = place.found()
    for name in ("readings open", next(n for n in whole if n.endswith(" free"))):
        place.keep(steps, lambda name=name: {n: t for n, t in whole.items() if n != name}, True)
        found = Case().settled(5, halfway=place, progress=counts.append)
        assert all(torch.equal(found[n], one) for n, one in wanted.items())
    assert counts == [1] * 10


@pytest.mark.parametrize("second", [0, 3, 6])
def test_processes_go_on_from_the_same_step_or_start_anew(tmp_path, second):
    """One was killed before it had kept what the other had."""
    meeting, found = Meeting(), {}

    def run(rank: int) -> None:
        place = Halfway.of(tmp_path, ("a",), Pair(rank, meeting))
        steps = (6, second)[rank]
        if steps:
            place.keep(steps, lambda: {"one": torch.ones(2)})
        found[rank] = place.found()[0]

    together(run)
    assert found == ({0: 6, 1: 6} if second == 6 else {0: 0, 1: 0})


def test_two_processes_that_were_stopped_end_as_two_that_were_not(tmp_path):
    def settled(folder, steps=None):
        cases, meeting, found = (Case(), Case()), Meeting(), {}

        def run(rank: int) -> None:
            case, mine = cases[rank], Pair(rank, meeting)
            case.held = type(case.held)(case.held.questions[rank::2], case.held.states[rank::2])
            place = Halfway.of(folder, ("a",), mine)
            more = {"progress": stop_after(steps)} if steps else {}
            try:
                found[rank] = case.settled(
                    8, rows=ROWS[rank::2], processes=mine, halfway=place, **more
                )
            except Stopped:
                found[rank] = None

        together(run)
        return found

    wanted = settled(tmp_path / "whole")
    assert settled(tmp_path / "parts", 5) == {0: None, 1: None}
    assert len(list((tmp_path / "parts").iterdir())) == 2
    found = settled(tmp_path / "parts")
    for rank in range(2):
        assert all(torch.equal(found[rank][name], wanted[rank][name]) for name in wanted[rank])


def test_the_model_is_as_it_was(tmp_path):
    plain, case = tiny_model().state_dict(), Case()
    with pytest.raises(Stopped):
        case.settled(8, halfway=Halfway.of(tmp_path, ("a",)), progress=stop_after(5))
    assert all(torch.equal(plain[name], one) for name, one in case.model.state_dict().items())
