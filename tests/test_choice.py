"""Which editor an edit uses, and the editor that a package carries for a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import command_support
import malmend
from command_support import make_facts
from malmend import workbench
from malmend.commands.choice import choose
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import load_editor, save_editor, seen_in_training
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Question, subject_hash
from malmend.facts.readers import read_facts
from malmend.models.sites import find_sites
from malmend.workbench import (
    calibrated,
    calibration_data,
    completed,
    lay_out,
    moments_digest,
    shipped,
)

tiny = command_support.tiny
cache = command_support.cache

SETTINGS = EditorSettings(layers=1, eta=1.0, network=NetworkSettings(rank=3))
FEW = make_facts(3)


def trained(tiny, seed: int = 0):
    """An editor away from its start, calibrated as a shipped one is, and its bench."""
    sites = find_sites(tiny.loaded.model, 1, None)
    bench = lay_out(tiny.loaded, sites)
    editor = calibrated(bench, SETTINGS).editor(SETTINGS, bench.trunk)
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
    done = malmend.edit(tiny.loaded, FEW)
    assert done.patch.provenance["editor"] == "shipped:tiny-1"
    assert done.patch.provenance["trained_on"] == 1
    full = malmend.edit(tiny.loaded, FEW, editor=carried[0])
    for name in full.patch.factors:
        wanted, found = full.patch.shift(name), done.patch.shift(name)
        # float16 rounds the network by 2^-11 of each weight; what it adds is part of the shift.
        assert 0 < (found - wanted).norm() < 5e-3 * wanted.norm()


def test_a_model_that_none_is_carried_for_is_edited_without(tiny):
    choice = choose("auto")
    assert choice.may_ship
    assert choice.on(tiny.loaded) is choice
    assert (choice.name, choice.settings) == ("none", training_free())


def test_settings_beside_an_editor_are_refused(tiny, carried):
    for editor in (str(carried[2]), carried[0]):
        with pytest.raises(MalmendError, match="give an editor or settings, not both"):
            choose(editor, training_free())


def test_an_editor_for_another_base_is_refused(tiny, carried):
    about = carried[2] / "editor.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base": "f" * 64}))
    with pytest.raises(EditorError, match="was trained for a base with fingerprint ffffffffffff"):
        choose(carried[2]).on(tiny.loaded)


def test_a_slim_editor_is_half_as_large_and_lacks_what_is_made_again(tiny, carried, tmp_path):
    editor, bench, folder = carried
    save_editor(editor, {}, tmp_path / "full")
    small, large = (
        {p.name: p for p in f.glob("*.safetensors")} for f in (folder, tmp_path / "full")
    )
    sizes = [sum(p.stat().st_size for p in files.values()) for files in (small, large)]
    assert sizes[0] < 0.6 * sizes[1]
    slim = load_editor(folder).editor
    assert slim.lacks_moments
    with pytest.raises(EditorError, match="lacks the moments of its prior"):
        slim.prior(0, 1)
    for (name, found), (_, wanted) in zip(
        slim.named_parameters(), editor.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2**-10, atol=1e-7, msg=name)
    again = completed(slim, bench)
    assert not again.lacks_moments
    for term in again.terms:
        torch.testing.assert_close(
            getattr(again, f"prior_{term}_0"), getattr(editor, f"prior_{term}_0")
        )


def test_moments_are_kept_and_a_damaged_copy_is_made_again(tiny, carried, tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    slim = completed(load_editor(carried[2]).editor, carried[1])
    (path,) = (tmp_path / "cache" / "moments").glob("*.safetensors")
    assert {one.dtype for one in load_file(path).values()} == {torch.float32}, "as editors take it"
    path.write_bytes(b"broken")
    again = completed(load_editor(carried[2]).editor, carried[1])
    assert torch.equal(again.prior_text_0, slim.prior_text_0)
    assert path.stat().st_size > 100


def test_an_editor_that_was_trained_with_other_moments_is_refused(tiny, carried, monkeypatch):
    """Else changed facts of the package would be paired with weights that never saw them."""
    editor, bench, folder = carried
    data = calibration_data(bench, None, None, CalibrationSettings())
    digest = moments_digest(SETTINGS, CalibrationSettings(), *data)
    about = json.loads((folder / "editor.json").read_text())
    wanted = malmend.edit(tiny.loaded, FEW).patch
    (folder / "editor.json").write_text(json.dumps({**about, "moments": digest}))
    found = malmend.edit(tiny.loaded, FEW).patch
    assert all(torch.equal(found.shift(name), wanted.shift(name)) for name in wanted.factors)
    monkeypatch.setattr(workbench, "read_text", lambda path: data[1] + "\nOne more line of text.")
    with pytest.raises(EditorError, match=f"trained with other calibration .*{digest}"):
        malmend.edit(tiny.loaded, FEW)
    save_editor(editor, {**about, "moments": digest}, folder)  # with its moments nothing is made
    malmend.edit(tiny.loaded, FEW)


@pytest.mark.parametrize("what", ["terms", "end", "facts", "others", "text", "tokens", "general"])
def test_moments_are_told_apart_by_all_they_are_taken_over(what):
    settings, sizes = SETTINGS, CalibrationSettings()
    facts, text, general = FEW, "some text", [Question("Who?", "Nobody")]
    first = moments_digest(settings, sizes, facts, text, general)
    if what == "terms":
        settings = replace(settings, prior="text")
    elif what == "end":
        settings = replace(settings, end_of_answer="none")
    elif what == "facts":
        facts = FEW[:2]
    elif what == "others":
        facts = [replace(FEW[0], neighbours=(Question("Where?", "Here"),)), *FEW[1:]]
    elif what == "text":
        text = "other text"
    elif what == "tokens":
        sizes = replace(sizes, text_tokens=7)
    else:
        general = []
    assert moments_digest(settings, sizes, facts, text, general) != first


def test_what_moments_do_not_depend_on_keeps_their_digest():
    other = replace(SETTINGS, layers=3, eta=None, network=NetworkSettings(rank=9))
    sizes = CalibrationSettings(etas=(1.0,), search_facts=3, ridge=0.5)
    given = (FEW, "text", [])
    assert moments_digest(SETTINGS, CalibrationSettings(), *given) == moments_digest(
        other, sizes, *given
    )
    plain = replace(SETTINGS, prior="identity")
    assert moments_digest(plain, CalibrationSettings(), *given) is None


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


def test_the_carried_editors_of_the_package_can_be_read():
    folders = sorted(shipped("editors").glob("*/editor.json"))
    for about in folders:
        saved = load_editor(about.parent)
        assert saved.editor.lacks_moments
        assert sum(p.stat().st_size for p in about.parent.iterdir()) < 20e6
        known = read_facts(shipped("facts.jsonl"))
        test, train = ([f for f in known if tag in f.tags] for tag in ("test", "train"))
        # Facts of other files are about some test subjects too, a few in the same relation: a leak.
        assert saved.seen(test) < 0.05 * len(test)
        assert saved.seen(train) > 0.3 * len(train)
