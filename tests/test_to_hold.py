"""What an edit by default asks to leave as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

import command_support
import malmend
from malmend.editors import draws
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import training_free
from malmend.facts.fact import Fact
from malmend.facts.readers import read_text
from malmend.facts.tokens import Encoder, Reading
from malmend.material import held_out_questions, to_hold
from malmend.methods.editor_choice import choose
from malmend.methods.editor_method import ByEditor
from malmend.workbench import encoder_for, shipped

CALIBRATION = command_support.CALIBRATION

tiny = command_support.tiny
cache = command_support.cache
whole = command_support.whole
pytestmark = pytest.mark.usefixtures("whole")

KIRIBATI = Fact("k", "The capital of Kiribati is", "South Tarawa")


@pytest.fixture(scope="module")
def smollm2() -> Encoder:
    return encoder_for("smollm2-135m")


def test_questions_without_end_and_lines_without_their_first_token_in_turns(smollm2):
    held = to_hold(smollm2, [KIRIBATI])
    end = smollm2.tokenizer.eos_token_id
    assert len(held) > 1500
    assert not any(end in one.ids for one in held)
    assert all(one.sources[0] > 0 and one.labels for one in held)
    lines = [one.answer_start == 2 for one in held[:200]]
    assert lines == [False, True] * 100
    assert smollm2.said(held[0].ids).startswith("nq question: what is the month of fasting")


def test_no_more_of_the_text_than_a_prior_reads(smollm2):
    """The rest is what the perplexity of an edited model is taken of."""
    lines = [smollm2.said(one.ids) for one in to_hold(smollm2, []) if one.answer_start == 2]
    everything = [line.strip() for line in read_text(shipped("text.txt")).splitlines()]
    assert lines == [line for line in everything[: len(lines)] if line]
    assert 15_000 < sum(len(smollm2.passage_ids(line)) - 1 for line in lines) < 16_500


def test_nothing_that_is_of_an_edited_fact(smollm2):
    titanic = Fact("t", "The Titanic sank in", "1913")
    every, without = (
        {smollm2.said(one.ids) for one in to_hold(smollm2, some)} for some in ([], [titanic])
    )
    assert every - without
    assert all("titanic" in said.casefold() for said in every - without)
    assert not any("titanic" in said.casefold() for said in without)


def test_nothing_whose_answer_names_an_edited_subject(smollm2):
    cleopatra = Fact("c", "She ruled", "Egypt", subject="Cleopatra")
    every, without = (
        {smollm2.said(one.ids) for one in to_hold(smollm2, some)} for some in ([], [cleopatra])
    )
    assert any(said.startswith("Who was the queen of Egypt") for said in every - without)


def test_a_name_that_no_more_than_two_texts_have_tells_by_itself(smollm2, tmp_path):
    names = ["Zorvath"] * 2 + ["Quillmere"] * 3
    lines = [f"{name} lies by the sea, {index}." for index, name in enumerate(names)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    edited = Fact("e", "It was founded by", "Ada", subject="Zorvath Quillmere")
    held = to_hold(smollm2, [edited], tmp_path / "text.txt")
    assert [smollm2.said(one.ids) for one in held if one.answer_start == 2] == lines[2:]


def test_what_is_kept_back_to_measure_by_is_not_held(smollm2):
    held = {smollm2.said(one.ids) for one in to_hold(smollm2, [])}
    back = held_out_questions(smollm2, 200)
    assert len(back) == 200
    assert not any(said.startswith(one.prompt) for one in back for said in held)


def test_lines_of_wikipedia_come_in_turns_where_they_are_asked_for(smollm2):
    plain, more = (to_hold(smollm2, [KIRIBATI], more=more) for more in (False, True))
    lines = {line.strip() for line in read_text(shipped("wikipedia.txt")).splitlines()}
    third = [smollm2.said(one.ids) for one in more[2:300:3]]
    assert set(third) <= lines
    assert len(third) == 100
    assert [one for one in more if smollm2.said(one.ids) not in lines] == plain
    assert all(one.answer_start == 2 for one in more[2:300:3])


def test_a_users_text_stands_for_the_projects_own(smollm2, tmp_path):
    (tmp_path / "text.txt").write_text("Cranes nest on the northern shore.\nIt rained.\n")
    held = to_hold(smollm2, [], tmp_path / "text.txt")
    lines = [smollm2.said(one.ids) for one in held if one.answer_start == 2]
    assert lines == ["Cranes nest on the northern shore.", "It rained."]


@pytest.mark.parametrize("form", ["causal", "classes", "seq2seq"])
def test_only_a_decoders_edits_restore(smollm2, form):
    reading = Reading(form, ("yes", "no") if form == "classes" else (), start=0)
    encoder = Encoder(smollm2.tokenizer, "none", 64, reading=reading)
    assert ByEditor(choose("none")).restores(encoder) is (form == "causal")


@pytest.mark.parametrize(
    "settings", [training_free("mend"), replace(training_free(), descent=None)]
)
def test_an_editor_that_solves_once_restores_nothing(smollm2, settings):
    assert not ByEditor(choose("none", settings)).restores(smollm2)


@pytest.mark.parametrize("rounds", [0.0, 2.0])
def test_lines_of_wikipedia_are_held_while_an_edit_settles(tiny, monkeypatch, rounds):
    asked = []
    monkeypatch.setattr(
        "malmend.methods.editor_method.to_hold",
        lambda *_given, more=False: asked.append(more) or [],
    )
    own = {
        "calibrate": tiny.calibrate,
        "text": tiny.text,
        "calibration": command_support.CALIBRATION,
    }
    monkeypatch.setattr(draws, "FEWEST", 3)
    refine = RefineSettings(passes=2, frames=(), rounds=rounds)
    malmend.edit(tiny.loaded, command_support.make_facts(3), refine=refine, **own)
    assert asked == [False, True][: 1 + (rounds > 0)]


@pytest.mark.parametrize(
    "refine",
    [
        RefineSettings(passes=1),
        RefineSettings(restore=0.0),
        RefineSettings(passes=1, rounds=1.0, hold=0.0),
    ],
)
def test_nothing_is_read_where_nothing_will_be_restored(tiny, monkeypatch, refine):
    def no(*_args):
        raise AssertionError("held without need")

    monkeypatch.setattr("malmend.methods.editor_method.to_hold", no)
    monkeypatch.setattr(draws, "FEWEST", 3)
    own = {
        "calibrate": tiny.calibrate,
        "text": tiny.text,
        "calibration": command_support.CALIBRATION,
    }
    found = malmend.edit(tiny.loaded, command_support.make_facts(3), refine=refine, **own)
    assert found.patch.provenance["restore"] == 0.0
