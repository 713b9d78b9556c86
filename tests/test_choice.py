"""Which editor an edit uses, and the editor that a package carries for a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import command_support
import malmend
from command_support import CALIBRATION, make_facts
from malmend import workbench
from malmend.commands.learn import learn
from malmend.editors.checkpoint import load_editor, save_editor, seen_in_training
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import subject_hash
from malmend.facts.readers import read_facts
from malmend.material import calibrated
from malmend.methods import editor_choice, editor_method
from malmend.methods.editor_choice import choose
from malmend.methods.trained import TRAINED
from malmend.models.sites import find_sites
from malmend.workbench import lay_out, shipped

tiny = command_support.tiny
cache = command_support.cache

SETTINGS = EditorSettings(layers=1, eta=1.0, network=NetworkSettings(rank=3))
FEW = make_facts(3)

ONCE = RefineSettings(passes=1)


def trained(tiny, seed: int = 0):
    """An editor away from its start, calibrated as a shipped one is, and its bench."""
    sites = find_sites(tiny.loaded.model, 1, None)
    bench = lay_out(tiny.loaded, sites)
    editor = calibrated(bench, SETTINGS, settings=CALIBRATION).editor(SETTINGS, bench.trunk)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in editor.named_parameters():
            if name.endswith(("up_FR", "bias_F")):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return editor, bench


@pytest.fixture
def carried(tiny, tmp_path, monkeypatch):
    """A package that carries an editor for the tiny model, and the editor in full."""
    editor, bench = trained(tiny)
    about = {"base": tiny.loaded.fingerprint, "subjects": subject_hash(FEW[0].prompt)}
    folder = tmp_path / "package" / "editors" / "tiny-1"
    save_editor(editor, about, folder, slim=True)
    real = workbench.shipped
    inside = {"editors": tmp_path / "package" / "editors"}
    monkeypatch.setattr(workbench, "shipped", lambda name: inside.get(name) or real(name))
    return editor, bench, folder


def test_auto_is_the_editor_that_the_package_carries(tiny, carried):
    done = malmend.edit(tiny.loaded, FEW, refine=ONCE)
    assert done.patch.provenance["editor"] == "shipped:tiny-1"
    assert done.patch.provenance["trained_on"] == 1
    full = malmend.edit(tiny.loaded, FEW, editor=carried[0], refine=ONCE)
    for name in full.patch.factors:
        wanted, found = full.patch.shift(name), done.patch.shift(name)
        # The text's moment, of rank 64 in the package, is wider than that here.
        assert 0 < (found - wanted).norm() < 0.15 * wanted.norm()


def test_a_model_that_none_is_carried_for_is_edited_without(tiny):
    choice = choose("auto")
    assert choice.may_ship
    assert choice.on(tiny.loaded) is choice
    assert (choice.name, choice.settings) == ("none", training_free())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"settings": training_free()}, "the settings given"),
        ({"own_data": True}, "the calibration data or settings given"),
    ],
)
def test_what_keeps_the_carried_editor_out_is_said(tiny, carried, given, why):
    said = choose("auto", **given).on(tiny.loaded).said()
    assert said == (
        "Editor: none; the model is edited without training, for "
        f"{why} rule out shipped:tiny-1, the editor for this model."
    )
    assert choose("none", **given).on(tiny.loaded).said().endswith("edited without training.")
    carried[2].rename(carried[2].parent.parent / "away")
    assert choose("auto", **given).on(tiny.loaded).said().endswith("edited without training.")


def test_settings_beside_an_editor_are_refused(tiny, carried):
    for editor in (str(carried[2]), carried[0]):
        with pytest.raises(MalmendError, match="give an editor or settings, not both"):
            choose(editor, training_free())


def test_an_editor_for_another_base_is_refused(tiny, carried):
    about = carried[2] / "editor.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base": "f" * 64}))
    with pytest.raises(EditorError, match="was trained for a base with fingerprint ffffffffffff"):
        choose(carried[2]).on(tiny.loaded)


def test_subjects_are_known_whatever_their_case_and_blanks():
    assert subject_hash(" New  York") == subject_hash("new york")
    assert subject_hash("new york") != subject_hash("newyork")


def test_how_many_facts_were_trained_on(tiny, carried, tmp_path):
    saved = load_editor(carried[2])
    assert saved.seen(FEW) == seen_in_training(carried[2], saved.identity, FEW) == 1
    assert seen_in_training(carried[2], "", FEW) is None
    assert seen_in_training(tmp_path / "nowhere", saved.identity, FEW) is None
    patch = malmend.edit(tiny.loaded, FEW).patch
    assert patch.provenance["editor_id"] == saved.identity
    assert malmend.eval(tiny.loaded, FEW[1:], patch).about["trained_on"] == 0
    assert malmend.eval(tiny.loaded, FEW, patch).about["trained_on"] == 1


def saying(patch, **changes):
    return malmend.Patch(patch.factors, {**patch.provenance, **changes})


def test_a_newer_editor_of_the_same_name_does_not_answer_for_an_older_one(tiny, carried):
    """What the older one was trained on is not known any more, which is not the same as nothing."""
    folder = carried[2]
    shipped_one = malmend.edit(tiny.loaded, FEW).patch
    own = malmend.edit(tiny.loaded, FEW, editor=folder).patch
    newer, _ = trained(tiny, seed=1)
    save_editor(newer, {"base": tiny.loaded.fingerprint, "subjects": ""}, folder, slim=True)
    for patch in (shipped_one, own):
        assert malmend.eval(tiny.loaded, FEW, patch).about["trained_on"] is None
    again = malmend.edit(tiny.loaded, FEW).patch
    assert malmend.eval(tiny.loaded, FEW, again).about["trained_on"] == 0


def test_a_carried_editor_is_found_under_another_name(tiny, carried):
    patch = malmend.edit(tiny.loaded, FEW).patch
    carried[2].rename(carried[2].with_name("tiny-renamed"))
    assert malmend.eval(tiny.loaded, FEW, patch).about["trained_on"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shipped:../../outside", "shipped:", "a\0b", 7, None])
def test_a_name_in_a_patch_leads_nowhere_outside(tiny, carried, tmp_path, name):
    shutil.copytree(carried[2], tmp_path / "outside")
    shutil.rmtree(carried[2])
    identity = load_editor(tmp_path / "outside").identity
    patch = malmend.edit(tiny.loaded, FEW, editor=tmp_path / "outside").patch
    for changes in ({"editor": name}, {"editor": name, "editor_id": identity[:5]}):
        assert malmend.eval(tiny.loaded, FEW, saying(patch, **changes)).about["trained_on"] is None


def test_a_patch_without_an_identity_says_nothing_of_training(tiny, carried):
    """As patches of earlier versions are; what lies in the folder now may be another editor."""
    patch = malmend.edit(tiny.loaded, FEW, editor=carried[2]).patch
    old = {key: said for key, said in patch.provenance.items() if key != "editor_id"}
    report = malmend.eval(tiny.loaded, FEW, malmend.Patch(patch.factors, old))
    assert report.about["trained_on"] is None


def test_a_patch_does_not_say_what_its_editor_does_not(tiny, carried):
    about = carried[2] / "editor.json"
    said = json.loads(about.read_text())
    del said["subjects"]
    about.write_text(json.dumps(said))
    patch = malmend.edit(tiny.loaded, FEW).patch
    assert "trained_on" not in patch.provenance
    assert malmend.eval(tiny.loaded, FEW, patch).about["trained_on"] is None


def test_the_editors_of_the_package_can_be_read_and_saw_no_test_fact():
    folders = [about.parent for about in sorted(shipped("editors").glob("*/editor.json"))]
    assert [folder.name for folder in folders] == ["smollm2-135m"]
    saved = load_editor(folders[0])
    assert sum(p.stat().st_size for p in folders[0].iterdir()) < 20e6
    known = read_facts(shipped("facts.jsonl"))
    test, train = ([f for f in known if tag in f.tags] for tag in ("test", "train"))
    assert saved.seen(test) == 0
    assert saved.seen(train) > 0.3 * len(train)


@pytest.mark.parametrize("name", TRAINED)
def test_another_trained_method_says_what_it_was_trained_on_too(name, tiny, tmp_path):
    small = {"enn": {"inner_steps": 1}, "ke": {"hidden": 4, "facts_per_step": 2}}[name]
    facts = make_facts(4, seed=5)
    settings = TRAINED[name].settings(steps=1, layers=2, **small)
    learn(tiny.loaded, facts[:3], tmp_path, name, settings)
    patch = malmend.edit(tiny.loaded, facts, editor=tmp_path).patch
    assert patch.provenance["trained_on"] == 3
    assert malmend.eval(tiny.loaded, facts, patch).about["trained_on"] == 3
    assert malmend.eval(tiny.loaded, facts[3:], patch).about["trained_on"] == 0


def test_the_seconds_of_an_edit_are_without_what_is_done_once_for_a_model(tiny, monkeypatch):
    """By a clock that only what is made once moves."""
    clock, asked = [0.0], list[str]()

    def slow(module, name):
        own = getattr(module, name)

        def slowed(*given, **named):
            clock[0] += 100.0
            asked.append(name)
            return own(*given, **named)

        monkeypatch.setattr(module, name, slowed)

    slow(editor_method, "known_facts")
    slow(editor_method, "around_sites")
    slow(editor_choice, "calibrated")
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    data = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    settled = RefineSettings(rounds=0.01, steps=1)
    assert malmend.edit(tiny.loaded, FEW, refine=settled, **data).seconds == 0.0
    assert asked == ["calibrated", "around_sites", "known_facts"]
