"""What an editor says of the subjects it was trained on, and the questions it is calibrated on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import command_support
import malmend
from command_support import CALIBRATION, make_facts
from malmend import material
from malmend.commands.train import train
from malmend.editors.checkpoint import SavedEditor, load_editor, seen_in_training
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.editors.train_settings import TrainSettings
from malmend.facts.fact import Fact, Question, subject_hash
from malmend.material import calibrated
from malmend.models.sites import find_sites
from malmend.workbench import lay_out

tiny = command_support.tiny
cache = command_support.cache

FACTS = make_facts(6)


@given(st.lists(st.text("abcXYZäß é", min_size=1), min_size=1, max_size=4))
def test_a_hash_ignores_case_and_blanks(parts):
    plain = subject_hash(" ".join(parts))
    assert len(plain) == 10
    assert int(plain, 16) >= 0
    for other in (
        "  " + "\t ".join(parts) + "\n",
        "\u00a0".join(parts),
        " ".join(parts).upper().lower(),
        " ".join(parts).upper(),
    ):
        assert subject_hash(other) == plain


def test_a_hash_is_of_the_words_in_their_order():
    """Spelt out once, for editors are kept for long."""
    assert subject_hash(" Lake  ORA ") == hashlib.sha256(b"lake ora").hexdigest()[:10]
    names = ["lake ora", "ora lake", "lakeora", "lake ora.", "lake öra", ""]
    assert len({subject_hash(name) for name in names}) == len(names)


def saved(*subjects: str) -> SavedEditor:
    joined = "".join(subject_hash(subject) for subject in subjects)
    return SavedEditor(None, {"subjects": joined})


def test_seen_counts_facts_by_subject_and_else_by_prompt():
    def fact(prompt: str, subject: str | None) -> Fact:
        return Fact(prompt, prompt, "an answer", subject)

    editor = saved("Peru", "the capital of france is", "Lake Ora")
    facts = [
        fact("p1", "peru"),
        fact("p2", " PERU "),  # another fact of the same subject counts too
        fact("p3", "Chile"),
        fact("The capital of  France is", None),
        fact("The capital of France is", "France"),  # a subject goes before the prompt
        fact("Lake Ora", "Lake"),
    ]
    assert editor.seen(facts) == 3
    assert editor.seen([]) == 0
    assert SavedEditor(None, {"subjects": ""}).seen(facts) == 0
    assert SavedEditor(None, {}).seen(facts) is None, "not known is not none"


def test_seen_knows_whole_hashes_only():
    """Two neighbouring ones hold others across their border."""
    editor = saved("one", "two")
    joined = editor.about["subjects"]
    inner = {joined[at : at + 10] for at in range(1, 10)}
    assert not inner & {joined[:10], joined[10:]}
    assert sum(subject_hash(str(index)) in inner for index in range(1000)) == 0
    assert editor.seen([Fact("a", "p", "x", "onetwo"), Fact("b", "p", "x", "TWO")]) == 1


def test_a_trained_editor_says_which_subjects_it_saw(tiny, tmp_path):
    facts = [replace(fact, subject=f"Subject {index // 2}") for index, fact in enumerate(FACTS)]
    facts[5] = replace(facts[5], subject=None)
    train(
        tiny.loaded,
        facts,
        tmp_path / "editor",
        training=TrainSettings(facts_per_step=3, steps=1),
        settings=EditorSettings(layers=1, eta=1.0, network=NetworkSettings(rank=3)),
        calibrate=tiny.calibrate,
        text=tiny.text,
        calibration=CALIBRATION,
    )
    about = json.loads((tmp_path / "editor" / "editor.json").read_text())
    wanted = {subject_hash(f"subject {index}") for index in range(3)}
    wanted.add(subject_hash(facts[5].prompt))
    found = about["subjects"]
    assert [found[at : at + 10] for at in range(0, len(found), 10)] == sorted(wanted)
    others = [replace(fact, id=f"other {fact.id}") for fact in make_facts(4, seed=3)]
    for mixed, count in ((facts, 6), (others, 0), ([*others, facts[0], facts[5]], 2)):
        saved = load_editor(tmp_path / "editor")
        assert saved.seen(mixed) == count
        assert seen_in_training(tmp_path / "editor", saved.identity, mixed) == count
    done = malmend.edit(tiny.loaded, [*others, facts[0]], editor=tmp_path / "editor")
    assert done.patch.provenance["trained_on"] == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null"])
def test_what_a_damaged_folder_saw_is_not_known(tmp_path, content):
    (tmp_path / "editor.json").write_bytes(content)
    assert seen_in_training(tmp_path, "0" * 24, FACTS) is None


@pytest.mark.parametrize("weights", ["../w", "/dev/null", "nowhere", "", None, 3])
def test_weights_outside_or_missing_tell_nothing(tmp_path, weights):
    (tmp_path / "w").write_bytes(b"weights")
    folder = tmp_path / "editor"
    folder.mkdir()
    (folder / "editor.json").write_text(json.dumps({"weights": weights, "subjects": ""}))
    for content in (b"weights", b""):
        identity = hashlib.sha256(content).hexdigest()[:24]
        assert seen_in_training(folder, identity, FACTS) is None


@pytest.mark.parametrize("count", [2, 12])
def test_general_questions_are_the_first_that_can_be_said(tiny, tmp_path, monkeypatch, count):
    """As many as facts; ones without an answer, or too long, and the last are left out."""
    last = {"prompt": "Who is kept back?", "answer": "The last"}
    lines = [
        {"prompt": f"Who is number {index}?", "answer": f"Number {index}"} for index in range(5)
    ]
    lines.insert(1, {"prompt": "Who has no answer?"})
    lines.insert(2, {"prompt": "long " * 600, "answer": "yes"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, [*lines, last])))
    monkeypatch.setattr(material, "KEPT_BACK", 1)
    real, given_to = material.shipped, []
    monkeypatch.setattr(
        material,
        "shipped",
        lambda name: tmp_path / name if name == "questions.jsonl" else real(name),
    )
    whole = material.calibrate

    def calibrate(*rest):
        given_to.append(rest[-2:])
        return whole(*rest)

    monkeypatch.setattr(material, "calibrate", calibrate)
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    bench = lay_out(tiny.loaded, find_sites(tiny.loaded.model, 1, None))
    free = replace(training_free(), layers=1, eta=1.0)
    sizes = replace(CALIBRATION, moment_facts=count, prior_facts=count)
    calibrated(bench, free, tiny.calibrate, tiny.text, sizes)
    wanted = [Question(f"Who is number {index}?", f"Number {index}") for index in range(5)]
    assert given_to == [(wanted[:count], wanted[count:])]
    # Kept under a name that the questions are a part of.
    calibrated(bench, free, tiny.calibrate, tiny.text, sizes)
    assert len(given_to) == 1
    lines = [lines[0] | {"answer": "Another"}, last]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    calibrated(bench, free, tiny.calibrate, tiny.text, sizes)
    assert given_to[1:] == [([Question("Who is number 0?", "Another")], [])]
