"""Every way to say which editor an edit uses, in process and from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import command_support
import helpers
import malmend
from command_support import CALIBRATION, make_facts, make_model
from command_support import malmend as command
from malmend import workbench
from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import subject_hash
from malmend.material import calibrated
from malmend.methods.editor_choice import choose
from malmend.models.load import prepared
from malmend.models.sites import LAYERS, find_sites
from malmend.workbench import lay_out, shipped_editor

tiny = command_support.tiny
cache = command_support.cache

# No ends, so that an edit by the carried editor can be told by the number of its tokens.
SETTINGS = EditorSettings(layers=1, eta=1.0, end_of_answer="none", network=NetworkSettings(rank=3))
FREE = replace(training_free(), layers=2, eta=0.9)
FEW = make_facts(3)


def bench_of(tiny):
    return lay_out(tiny.loaded, find_sites(tiny.loaded.model, 1, None), "none")


@pytest.fixture
def editor(tiny):
    """An editor as training starts with, in full; its calibration is kept between tests."""
    bench = bench_of(tiny)
    return calibrated(bench, SETTINGS, settings=CALIBRATION).editor(SETTINGS, bench.trunk)


def save_slim(editor, folder: Path, base: str) -> Path:
    subjects = "".join(sorted({subject_hash(fact.prompt) for fact in FEW[:2]}))
    save_editor(editor, {"base": base, "subjects": subjects}, folder, slim=True)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Where the package's editors lie; none is there yet."""
    real, place = workbench.shipped, tmp_path / "package"
    monkeypatch.setattr(
        workbench, "shipped", lambda name: place if name == "editors" else real(name)
    )
    return place


@pytest.fixture
def carried(tiny, editor, package) -> Path:
    """The editor that the package carries for the tiny model, between two for other models."""
    save_slim(editor, package / "a-model", "0" * 64)
    save_slim(editor, package / "z-model", "1" * 64)
    return save_slim(editor, package / "mine", tiny.loaded.fingerprint)


@pytest.mark.parametrize("own_data", [False, True])
@pytest.mark.parametrize("settings", [None, FREE], ids=["no settings", "settings"])
@pytest.mark.parametrize("word", ["auto", "none"])
def test_only_auto_without_anything_else_looks_for_an_editor(word, settings, own_data):
    choice = choose(word, settings, own_data)
    assert choice.may_ship == (word == "auto" and settings is None and not own_data)
    assert (choice.name, choice.saved, choice.in_hand) == ("none", None, None)
    assert choice.settings == (settings or training_free())


def test_a_choice_of_a_folder_or_an_editor_is_that(editor, carried):
    for place in (carried, str(carried)):
        choice = choose(place)
        assert (choice.name, choice.may_ship) == (str(carried), False)
        assert choice.settings == choice.saved.editor.settings == SETTINGS
    choice = choose(editor)
    assert (choice.name, choice.may_ship, choice.saved) == ("in memory", False, None)
    assert choice.in_hand is editor
    assert choice.settings == SETTINGS


@pytest.mark.parametrize("what", ["calibrate", "text", "calibration"])
def test_data_beside_a_trained_editor_are_refused(tiny, editor, carried, what):
    """They would be ignored: it is calibrated already."""
    given = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}[what]
    for trained in (carried, str(carried), editor):
        with pytest.raises(MalmendError, match="brings its own calibration; leave out --calibrate"):
            malmend.edit(tiny.loaded, FEW, editor=trained, **{what: given})


def test_a_word_that_is_neither_is_a_folder():
    for given in ("any", Path("auto"), Path("none")):
        with pytest.raises(EditorError, match=f"There is no editor in {given} "):
            choose(given)
    with pytest.raises(EditorError, match=r"There is no editor in Auto; did you mean 'auto'\?"):
        choose("Auto")


def test_settings_beside_an_editor_are_refused_before_it_is_read(editor, tmp_path):
    for given in (editor, tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(MalmendError, match=r"give an editor or settings, not both\."):
            choose(given, FREE)


def test_the_editor_for_the_models_weights_is_found_among_others(tiny, carried):
    assert shipped_editor(tiny.loaded.fingerprint) == carried
    assert shipped_editor("2" * 64) is None
    choice = choose("auto").on(tiny.loaded)
    assert (choice.name, choice.may_ship) == ("shipped:mine", False)
    assert choice.settings == SETTINGS
    assert choice.saved.base == tiny.loaded.fingerprint


def test_a_model_of_other_weights_gets_none(carried):
    tokenizer = helpers.byte_level()
    other = prepared(make_model(tokenizer, seed=5), tokenizer, "other")
    choice = choose("auto")
    assert choice.on(other) is choice
    with pytest.raises(EditorError, match=r"The editor .*mine was trained for .* model other has"):
        choose(carried).on(other)


def test_a_package_without_editors_gives_none(tiny, package):
    assert not package.exists()
    assert shipped_editor(tiny.loaded.fingerprint) is None
    assert choose("auto").on(tiny.loaded).name == "none"


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["nothing", "none", "settings", "calibrate", "text", "calibration"]
)
def test_each_of_them_alone_decides(tiny, carried, what):
    given = {
        "nothing": {},
        "none": {"editor": "none"},
        "settings": {"settings": FREE},
        "calibrate": {"calibrate": tiny.calibrate},
        "text": {"text": tiny.text},
        "calibration": {"calibration": CALIBRATION},
    }[what]
    told = []
    done = malmend.edit(tiny.loaded, FEW, told=told.append, **given)
    said = done.patch.provenance
    if what == "nothing":
        assert (said["editor"], said["trained_on"]) == ("shipped:mine", 2)
        assert told == ["Editor: shipped:mine."]
        assert said["settings"]["network"]["blocks"] > 0
    else:
        assert said["editor"] == "none"
        assert "trained_on" not in said
        why = "the settings" if what == "settings" else "the calibration data or settings"
        why = f", for {why} given rule out shipped:mine, the editor for this model"
        why *= what != "none"  # which asks for no editor
        assert told == [f"Editor: none; the model is edited without training{why}."]
        assert said["settings"]["network"]["blocks"] == 0
        assert len(said["eta"]) == (FREE.layers if what == "settings" else LAYERS)


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"passes": 1, "rounds": 1.0, "steps": 2, "hold": 3.0}, []),
        ({"passes": 2, "gain": 1.2, "wordings": 8}, []),
        (
            {"passes": 2, "steps": 2, "hold": 3.0, "wordings": 3},
            ["--refine.steps, --refine.wordings, --refine.hold: this edit is not settled."],
        ),
        (
            {"rounds": 1.0, "steps": 2, "gain": 2.0, "chat_gain": 2.0, "restore": 0.5},
            ["--refine.gain, --refine.chat-gain, --refine.restore: this edit is solved once."],
        ),
        (
            {"passes": 1, "hold": 3.0, "gain": 2.0},
            [
                "--refine.hold: this edit is not settled.",
                "--refine.gain: this edit is solved once.",
            ],
        ),
        ({"rounds": 1.0, "steps": 2, "frames": ("Well: {prompt}",)}, []),
        ({"passes": 1, "rounds": 0.0, "frames": ()}, []),
        ({"passes": 1, "frames": ("Well: {prompt}",)}, []),
    ],
)
def test_what_is_given_and_not_read_is_told(tiny, carried, given, idle):
    told = []
    malmend.edit(tiny.loaded, FEW, told=told.append, refine=RefineSettings(**given))
    assert told == ["Editor: shipped:mine.", *(f"No use is made of {one}" for one in idle)]


def test_the_same_of_a_sum_which_never_solves_again(tiny):
    told, settings = [], replace(FREE, method="mend")
    refine = RefineSettings(steps=3, gain=2.0, frames=("Well: {prompt}",))
    malmend.edit(tiny.loaded, FEW, settings=settings, told=told.append, refine=refine)
    assert told[1:] == [
        "No use is made of --refine.steps: this edit is not settled.",
        "No use is made of --refine.gain: this edit is solved once.",
        "No use is made of --refine.frames: this edit is solved once and not settled.",
    ]


SUMS = "this edit sums shifts or takes plain gradients, which is done once"


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"passes": 4, "rounds": 3.0}, ["--refine.passes, --refine.rounds"]),
        ({"rounds": 3.0}, ["--refine.rounds"]),
        ({"passes": 1, "rounds": 0.0}, []),
        ({}, []),
    ],
)
@pytest.mark.parametrize("change", [{"method": "mend"}, {"descent": None}])
def test_that_a_sum_is_solved_once_whatever_is_asked_is_told(
    change, given, idle, count, tiny, monkeypatch
):
    monkeypatch.setattr("malmend.editors.refine.UNSETTLED", 4)  # more would settle
    told, settings = [], replace(FREE, **change)
    malmend.edit(
        tiny.loaded,
        make_facts(count),
        settings=settings,
        told=told.append,
        refine=RefineSettings(**given),
    )
    assert told[1:] == [f"No use is made of {one}: {SUMS}." for one in idle]


def test_the_carried_editor_brings_its_own_layers_and_end(tiny, carried):
    done = malmend.edit(tiny.loaded, FEW, refine=RefineSettings(passes=1))
    assert len(done.patch.factors) == 1
    assert done.patch.provenance["settings"]["end_of_answer"] == "none"
    tokenizer = helpers.byte_level()
    answers = [len(tokenizer(" " + fact.answer)["input_ids"]) for fact in FEW]
    assert done.patch.provenance["tokens"] == sum(answers)


def test_its_folder_and_the_editor_in_hand_give_the_same_edit(tiny, carried):
    auto = malmend.edit(tiny.loaded, FEW).patch
    folder = malmend.edit(tiny.loaded, FEW, editor=carried).patch
    in_hand = malmend.edit(tiny.loaded, FEW, editor=load_editor(carried).editor).patch
    assert folder.provenance["editor"] == str(carried)
    assert folder.provenance["trained_on"] == 2
    assert in_hand.provenance["editor"] == "in memory"
    assert "trained_on" not in in_hand.provenance
    for name in auto.factors:
        assert torch.equal(auto.shift(name), folder.shift(name))
        assert torch.equal(auto.shift(name), in_hand.shift(name))


def test_an_editor_for_other_layers_is_refused(tiny, carried):
    about = json.loads((carried / "editor.json").read_text())
    (name,) = about["sites"]
    about["sites"] = {name.replace("5", "4"): about["sites"][name]}
    (carried / "editor.json").write_text(json.dumps(about))
    slim = load_editor(carried).editor
    for given in ("auto", carried, slim):
        with pytest.raises(EditorError, match="made for the layers"):
            malmend.edit(tiny.loaded, FEW, editor=given)


def edited(tiny, path: Path, *options: object) -> dict:
    assert command("edit", tiny.model, tiny.facts, "--limit=3", "--out", path, *options) == 0
    return dict(malmend.load_patch(path).provenance)


@pytest.mark.slow
def test_the_command_line_says_which(tiny, carried, tmp_path, capsys):
    """The first facts of the file are FEW: the editor was trained on two of them."""
    out = tmp_path / "patch"
    for options in ((), ("--editor", "auto")):
        said = edited(tiny, out, *options)
        assert (said["editor"], said["trained_on"], said["facts"]) == ("shipped:mine", 2, 3)
        shown = capsys.readouterr()
        assert "Editor: shipped:mine." in shown.err
        told = " ".join(shown.out.split())
        assert "trained on the subjects of 2 of 3 facts" in told
    said = edited(tiny, out, "--editor", carried)
    assert (said["editor"], said["trained_on"]) == (str(carried), 2)
    capsys.readouterr()
    for options in (
        ("--editor", "none", *tiny.fast),
        ("--editor=auto", *tiny.fast),
        ("--layers=1", "--eta=0.9"),
    ):
        said = edited(tiny, out, *options)
        assert said["editor"] == "none"
        assert "trained_on" not in said
        shown = capsys.readouterr()
        assert "Editor: none;" in shown.err
        assert "trained on" not in shown.out


def test_the_command_line_refuses_settings_beside_a_folder(tiny, carried, tmp_path, capsys):
    out = tmp_path / "patch"
    options = ("--out", out, "--editor", carried, "--layers=1")
    assert command("edit", tiny.model, tiny.facts, *options) == 2
    assert "brings its own settings" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
