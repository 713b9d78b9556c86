"""What `edit` makes of further passes: which are kept, who has them, what is refused early."""

from __future__ import annotations

import sys

import pytest
import torch

import command_support
import malmend
from command_support import CALIBRATION, make_facts
from malmend.editors.refine import WITH_CHAT, RefineSettings
from malmend.editors.settings import training_free
from malmend.errors import EditorError
from malmend.methods import by_editor
from malmend.methods.ultraedit import UltraEdit

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(3)
ONCE = RefineSettings(passes=1)
FRAMES = ("Well: {prompt}",)


def own(tiny) -> dict:
    return {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}


def counting(monkeypatch, *counts: float) -> None:
    """Lets the solves miss such a share of the tokens, in turn."""
    left = list(counts)
    monkeypatch.setattr(by_editor, "missed", lambda *_args: left.pop(0))


def same(one, other) -> bool:
    return all(torch.equal(one.shift(name), other.shift(name)) for name in one.factors)


def test_a_pass_that_misses_more_is_taken_back(tiny, monkeypatch):
    once = malmend.edit(tiny.loaded, FEW, refine=ONCE, **own(tiny)).patch
    counting(monkeypatch, 0.2, 0.3, 0.201)
    refine = RefineSettings(passes=3, frames=FRAMES)
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert same(found, once)
    assert (found.provenance["passes"], found.provenance["frames"]) == (1, [])
    assert found.provenance["tokens"] == once.provenance["tokens"]


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.2), (0.0, 0.3, 0.01), (0.2, 0.1, 0.1)])
def test_a_pass_may_mend_what_the_one_before_it_broke(tiny, monkeypatch, shares):
    """Eight facts once lost their edit in chat to end tokens that a third solve brings back."""
    counting(monkeypatch, *shares)
    refine = RefineSettings(passes=3, frames=FRAMES)
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert found.provenance["passes"] == 3


def test_a_framed_edit_keeps_the_rank_of_all_its_rows(tiny, monkeypatch):
    """It was once cut to the plain prompts' tokens, which is less where these are few."""
    counting(monkeypatch, 0.0, 0.0)
    few = make_facts(2)
    once = malmend.edit(tiny.loaded, few, refine=ONCE, **own(tiny)).patch
    tokens = once.provenance["tokens"]
    refine = RefineSettings(passes=2, frames=(*FRAMES, "Now {prompt}"), restore=0.0)
    found = malmend.edit(tiny.loaded, few, refine=refine, **own(tiny)).patch
    assert found.provenance["tokens"] == 3 * tokens
    for name in found.factors:
        assert torch.linalg.matrix_rank(once.shift(name)) <= tokens
        assert torch.linalg.matrix_rank(found.shift(name), rtol=1e-5) > tokens


def test_the_header_says_what_was_asked_and_weighed(tiny, monkeypatch):
    counting(monkeypatch, 0.0, 0.0)
    refine = RefineSettings(passes=2, frames=FRAMES, gain=1.1, chat_gain=2.2, restore=0.4)
    said = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch.provenance
    assert (said["gain"], said["chat_gain"], said["restore"]) == (1.1, 2.2, 0.4)


def test_a_frame_that_holds_no_prompt_is_no_frame(tiny, monkeypatch):
    longer = "{{ 'word ' * 600 }}{{ messages[0]['content'] }} "
    monkeypatch.setattr(tiny.loaded.tokenizer, "chat_template", longer, raising=False)
    counting(monkeypatch, *[0.0] * 4)
    said = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch.provenance
    assert said["frames"] == [WITH_CHAT[0]]


@pytest.mark.parametrize(("second", "solves"), [(0.01, 2), (0.011, 1)])
def test_a_pass_that_misses_next_to_nothing_is_kept(tiny, monkeypatch, second, solves):
    """It once cost 256 facts the pass that brings retention back: one token in 1,100."""
    counting(monkeypatch, 0.0, second)
    refine = RefineSettings(passes=2, frames=FRAMES)
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert found.provenance["passes"] == solves


def test_a_later_pass_is_measured_by_the_one_before_it(tiny, monkeypatch):
    kept = []
    for shares in ((0.3, 0.1), (0.3, 0.1, 0.2)):
        counting(monkeypatch, *shares)
        refine = RefineSettings(passes=len(shares), frames=FRAMES)
        kept.append(malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch)
        assert kept[-1].provenance["passes"] == 2
    assert same(*kept)


def test_passes_that_miss_no_more_are_kept_and_said(tiny, monkeypatch):
    once = malmend.edit(tiny.loaded, FEW, refine=ONCE, **own(tiny)).patch
    counting(monkeypatch, 0.2, 0.2, 0.1)
    refine = RefineSettings(passes=3, frames=FRAMES)
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert not same(found, once)
    assert (found.provenance["passes"], found.provenance["frames"]) == (3, list(FRAMES))


@pytest.mark.parametrize(("shares", "solves"), [((0.01, 0.01, 0.01), 3), ((0.5, 0.4, 0.3, 0.2), 4)])
def test_by_default_solves_go_on_while_much_is_missed(tiny, monkeypatch, shares, solves):
    counting(monkeypatch, *shares)
    refine = RefineSettings(frames=())
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert found.provenance["passes"] == solves


@pytest.mark.parametrize(("in_chat", "solves"), [(0.01, 3), (0.011, 4)])
def test_solves_go_on_for_what_is_missed_in_chat(tiny, monkeypatch, in_chat, solves):
    """Of each solve the plain prompts are asked first, then those in chat."""
    template = "{{ messages[0]['content'] }} "
    monkeypatch.setattr(tiny.loaded.tokenizer, "chat_template", template, raising=False)
    counting(monkeypatch, *[0.0, in_chat] * 4)
    found = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    assert found.provenance["passes"] == solves
    assert found.provenance["frames"] == list(WITH_CHAT)


def test_what_is_missed_in_chat_takes_no_solve_back(tiny, monkeypatch):
    template = "{{ messages[0]['content'] }} "
    monkeypatch.setattr(tiny.loaded.tokenizer, "chat_template", template, raising=False)
    counting(monkeypatch, 0.2, 0.1, 0.1, 0.9)
    refine = RefineSettings(passes=2)
    found = malmend.edit(tiny.loaded, FEW, refine=refine, **own(tiny)).patch
    assert found.provenance["passes"] == 2


def test_a_sum_solves_once(tiny):
    chosen = own(tiny) | {"settings": training_free("mend")}
    found = malmend.edit(tiny.loaded, FEW, refine=RefineSettings(passes=3), **chosen).patch
    assert found.provenance["passes"] == 1
    assert same(found, malmend.edit(tiny.loaded, FEW, refine=ONCE, **chosen).patch)


def test_chat_without_a_template_is_refused_before_the_model_is_read(tiny, monkeypatch):
    monkeypatch.setattr("malmend.workbench.load_model", None)
    with pytest.raises(EditorError, match="no chat template"):
        malmend.edit(tiny.model, FEW, refine=RefineSettings(frames=("chat",)), **own(tiny))


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's accounting")
def test_within_a_budget_the_patch_is_the_same_and_the_peak_is_said(tiny, monkeypatch):
    from malmend import memory
    from malmend.models import budget

    twice = own(tiny) | {"refine": RefineSettings(passes=2)}
    plain = malmend.edit(tiny.loaded, make_facts(9), **twice)
    assert plain.peak is None
    rooms = []

    class Small(memory.Room):
        """Everything on disk."""

        def __init__(self, _budget=None, folder=None):
            super().__init__(0, folder)
            rooms.append(self)

    monkeypatch.setattr(budget, "Room", Small)
    said = []
    tight = malmend.edit(tiny.loaded, make_facts(9), memory="6GB", told=said.append, **twice)
    assert rooms[0].on_disk > 0
    assert any(line.startswith("Memory: ") for line in said)
    assert 0 < tight.peak < 6 * 10**9
    for name in plain.patch.factors:
        shift = plain.patch.shift(name)
        size = shift.abs().max().item()
        # Micro-batches of another size round otherwise, which a further pass makes grow.
        torch.testing.assert_close(tight.patch.shift(name), shift, rtol=0, atol=1e-4 * size)


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's accounting")
@pytest.mark.parametrize(
    ("refine", "is_rehearsed"),
    [
        (RefineSettings(passes=2, frames=()), True),
        (ONCE, False),
        (RefineSettings(passes=2, frames=(), restore=0.0), False),
    ],
)
def test_a_budget_is_planned_with_what_is_restored(tiny, monkeypatch, refine, is_rehearsed):
    from malmend.commands import edit as edit_module

    seen = []
    monkeypatch.setattr(edit_module, "rehearse", lambda trunk, some: seen.append((trunk, some)))
    malmend.edit(tiny.loaded, FEW, memory="6GB", refine=refine, **own(tiny))
    assert bool(seen) is is_rehearsed


def test_a_budget_that_is_no_size_is_refused(tiny):
    for run in (malmend.edit, malmend.train):
        with pytest.raises(malmend.MalmendError, match="4GB"):  # before any model is read
            run("no such model", FEW, "out", memory="plenty")


def test_a_method_that_is_no_editor_takes_no_budget(tiny):
    with pytest.raises(malmend.MalmendError, match=r"leave out .*--memory"):
        malmend.edit(tiny.loaded, FEW, memory="4GB", method=UltraEdit())


def test_no_pass_keeps_a_graph(tiny):
    """The weight of end tokens is learned: what is solved with it would hold all that led there."""
    found = malmend.edit(tiny.loaded, FEW, refine=RefineSettings(passes=2), **own(tiny)).patch
    assert found.provenance["passes"] == 2
    assert not any(part.requires_grad for pair in found.factors.values() for part in pair)
