from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    captured_of,
    random_editor,
    random_facts,
    same,
    statistics_of,
    tiny_model,
    tiny_trunk,
)

from helpers import weights_of
from malmend.editors import checkpoint
from malmend.editors import folder as editor_folder
from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.editor import Editor
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, published, training_free
from malmend.errors import EditorError, MalmendError
from malmend.models.capture import Captured

SETTINGS = EditorSettings(layers=2, network=NetworkSettings(rank=4))


def an_editor(
    settings: EditorSettings = SETTINGS, seed: int = 0, **kinds
) -> tuple[Editor, list[Captured]]:
    trunk = tiny_trunk(tiny_model(dtype=torch.float32, **kinds))
    captured = captured_of(trunk, random_facts(3), settings)
    return random_editor(settings, trunk, captured, seed=seed), captured


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "editor.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.fixture
def folder(tmp_path):
    save_editor(an_editor()[0], {"base": "abc", "model": "tiny"}, tmp_path / "editor")
    return tmp_path / "editor"


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, method="mend", form="published", tokens="all", end_of_answer="none"),
        replace(published(), network=replace(published().network, rank=4), layers=2),
        training_free(),
    ],
    ids=["default", "changed", "published", "training-free"],
)
@pytest.mark.parametrize("prior", ["wording", "text", "identity"])
def test_a_loaded_editor_is_the_saved_one(tmp_path, settings, prior):
    settings = replace(settings, prior=prior)
    editor, captured = an_editor(settings)
    save_editor(editor, {"base": "abc", "step": 7, "curve": [{"gen": 1.5}]}, tmp_path)
    saved = load_editor(tmp_path)
    assert saved.editor.settings == settings
    assert saved.editor.shapes == editor.shapes
    assert saved.editor.names == editor.names
    assert same(saved.editor.state_dict(), editor.state_dict())
    assert (saved.base, saved.about["step"]) == ("abc", 7)
    assert saved.about["curve"] == [{"gen": 1.5}]
    again = saved.editor.shifts(captured)
    for name, shift in editor.shifts(captured).items():
        assert torch.equal(shift, again[name])


def test_an_editor_with_a_term_of_weight_zero_comes_back(tmp_path):
    """Its logarithm is minus infinity, which is no damage."""
    trunk = tiny_trunk(tiny_model(dtype=torch.float32))
    captured = captured_of(trunk, random_facts(3), SETTINGS)
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    editor = Editor(SETTINGS, shapes, statistics_of(trunk, captured), weights=(2.0, 0.0, 0.1))
    save_editor(editor, {}, tmp_path)
    loaded = load_editor(tmp_path).editor
    assert loaded.prior(0, 3).weights == pytest.approx((2.0, 0.0, 0.3), rel=1e-6)
    again = loaded.shifts(captured)
    for name, shift in editor.shifts(captured).items():
        assert torch.equal(shift, again[name])


def test_an_editor_without_lambda_comes_back(tmp_path):
    trunk = tiny_trunk(tiny_model(dtype=torch.float32))
    captured = captured_of(trunk, random_facts(3), SETTINGS)
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    editor = Editor(SETTINGS, shapes, statistics_of(trunk, captured), ridge=0.0)
    save_editor(editor, {}, tmp_path)
    assert load_editor(tmp_path).editor.prior(0, 3).ridge == 0.0


def test_an_editor_of_several_shapes_comes_back(tmp_path):
    trunk = tiny_trunk(tiny_model("gpt2", torch.float32), pattern="transformer.h.[12].mlp.*")
    captured = captured_of(trunk, random_facts(3), SETTINGS)
    editor = random_editor(SETTINGS, trunk, captured)
    save_editor(editor, {}, tmp_path)
    loaded = load_editor(str(tmp_path)).editor
    loaded.check_fits(trunk.sites)
    assert same(loaded.state_dict(), editor.state_dict())


def test_saving_again_replaces_and_leaves_two_files(folder):
    first = weights_of(folder).name
    other = an_editor(seed=1)[0]
    save_editor(other, {"base": "def"}, folder)
    assert weights_of(folder).name != first
    assert len(list(folder.iterdir())) == 2
    saved = load_editor(folder)
    assert saved.base == "def"
    assert same(saved.editor.state_dict(), other.state_dict())


def test_no_other_file_is_removed(folder):
    """A copy that somebody put aside under a name of their own, say."""
    aside = folder / "editor-backup.safetensors"
    aside.write_bytes(weights_of(folder).read_bytes())
    save_editor(load_editor(folder).editor, {"base": "print"}, folder)
    assert aside.is_file()


def test_an_editor_can_be_saved_with_what_was_said_of_it(folder, tmp_path):
    """What a folder says names its own weights, which another folder does not hold."""
    saved = load_editor(folder)
    for place in (tmp_path / "copy", folder):
        save_editor(saved.editor, saved.about, place)
        again = load_editor(place)
        assert again.base == "abc"
        assert same(again.editor.state_dict(), saved.editor.state_dict())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["weights", "json"])
def test_an_interrupted_save_leaves_the_previous_editor(folder, monkeypatch, error, part):
    before = load_editor(folder).editor.state_dict()

    def fails(*rest, **_):
        if part == "weights":
            Path(rest[1]).write_bytes(b"half")
        raise error

    if part == "weights":
        monkeypatch.setattr(editor_folder, "save_file", fails)
    else:
        monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises((MalmendError, KeyboardInterrupt)):
        save_editor(an_editor(seed=1)[0], {"base": "def"}, folder)
    monkeypatch.undo()
    saved = load_editor(folder)
    assert saved.base == "abc"
    assert same(saved.editor.state_dict(), before)
    assert not list(folder.glob(".*"))
    save_editor(an_editor(seed=1)[0], {"base": "def"}, folder)
    assert len(list(folder.iterdir())) == 2, "what the interrupted save left is gone"


def one_sentence(error: MalmendError) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and ". " not in text


def test_no_editor(tmp_path):
    with pytest.raises(EditorError, match=r"There is no editor in .*nowhere") as found:
        load_editor(tmp_path / "nowhere")
    assert one_sentence(found.value)
    with pytest.raises(EditorError, match="There is no editor in"):
        load_editor(tmp_path)


def test_an_editor_that_is_written_anew_while_it_is_read(folder, monkeypatch):
    load, other = editor_folder.load_file, an_editor(seed=1)[0]

    def late(path):
        if not writing:
            writing.append(path)
            save_editor(other, {"base": "def"}, folder)
        return load(path)

    writing = []
    monkeypatch.setattr(editor_folder, "load_file", late)
    saved = load_editor(folder)
    assert len(writing) == 1
    assert saved.base == "def"
    assert same(saved.editor.state_dict(), other.state_dict())


def _drop(name: str) -> Callable[[dict], None]:
    return lambda about: about.pop(name) and None


DAMAGES: dict[str, Callable[[dict], object]] = {
    "no format": _drop("format"),
    "no weights": _drop("weights"),
    "no settings": _drop("settings"),
    "no sites": _drop("sites"),
    "weights of a number": lambda about: about.update(weights=3),
    "weights elsewhere": lambda about: about.update(weights="editor-00000000.safetensors"),
    "weights above": lambda about: about.update(weights=".."),
    "settings as a list": lambda about: about.update(settings=[1]),
    "settings as null": lambda about: about.update(settings=None),
    "network as null": lambda about: about["settings"].update(network=None),
    "rank of text": lambda about: about["settings"]["network"].update(rank="many"),
    "rank of another size": lambda about: about["settings"]["network"].update(rank=3),
    "more blocks": lambda about: about["settings"]["network"].update(blocks=3),
    "fewer blocks": lambda about: about["settings"]["network"].update(blocks=1),
    "descent of text": lambda about: about["settings"].update(descent="deep"),
    "sites as a list": lambda about: about.update(sites=[1, 2]),
    "sites as null": lambda about: about.update(sites=None),
    "no site": lambda about: about.update(sites={}),
    "shape of one number": lambda about: about["sites"].update({next(iter(about["sites"])): [16]}),
    "shape of nothing": lambda about: about["sites"].update({next(iter(about["sites"])): []}),
    "shape of null": lambda about: about["sites"].update({next(iter(about["sites"])): None}),
    "shape of text": lambda about: about["sites"].update({next(iter(about["sites"])): "ab"}),
    "negative shape": lambda about: about["sites"].update({next(iter(about["sites"])): [-1, 2]}),
    "other shape": lambda about: about["sites"].update({next(iter(about["sites"])): [16, 31]}),
    "a prior with fewer terms": lambda about: about["settings"].update(prior="text"),
    "a prior without terms": lambda about: about["settings"].update(prior="identity"),
    "an unknown prior": lambda about: about["settings"].update(prior="zzz"),
    "one more site": lambda about: about["sites"].update(another=[16, 32]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_description_is_refused(folder, damage):
    rewrite(folder, damage)
    with pytest.raises(
        EditorError, match=r"editor in .* is damaged \(.+\); train it again"
    ) as found:
        load_editor(folder)
    assert one_sentence(found.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"3", b'"format"'])
def test_what_is_no_description_is_refused(folder, raw):
    (folder / "editor.json").write_bytes(raw)
    with pytest.raises(EditorError, match="is damaged"):
        load_editor(folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "flipped", "folder", "text"])
def test_damaged_weights_are_refused(folder, damage):
    path = weights_of(folder)
    raw = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(raw[:-8])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(raw[:12] + b"\xff" + raw[13:])
    elif damage == "folder":
        path.mkdir()
    elif damage == "text":
        path.write_text("no weights here at all")
    with pytest.raises(EditorError, match=r"is damaged \(.+\); train it again") as found:
        load_editor(folder)
    assert "\n" not in str(found.value)


def test_weights_of_another_writing_are_refused(folder, tmp_path):
    save_editor(an_editor(seed=1)[0], {"base": "abc"}, tmp_path / "other")
    weights_of(folder).write_bytes(weights_of(tmp_path / "other").read_bytes())
    with pytest.raises(EditorError, match="its weights are not those that it names"):
        load_editor(folder)


@pytest.mark.parametrize("change", ["lost", "lost prior", "added", "reshaped"])
def test_weights_with_other_tensors_are_refused(folder, change):
    path = weights_of(folder)
    tensors = load_file(path)
    if change == "lost":
        del tensors["log_eta_S"]
    elif change == "lost prior":
        del tensors["prior_asked_1"]
    elif change == "added":
        tensors["more"] = torch.zeros(2)
    else:
        tensors["log_eta_S"] = torch.zeros(5)
    save_file(tensors, path)
    rewrite(folder, _drop("identity"))
    with pytest.raises(EditorError, match=r"is damaged \(.+\); train it again") as found:
        load_editor(folder)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["networks.16x32.blocks.1.up_FR", "log_eta_S", "log_weights_SP", "prior_text_0"]
)
def test_weights_that_are_not_finite_are_refused(folder, value, name):
    path = weights_of(folder)
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    rewrite(folder, _drop("identity"))  # as earlier versions wrote it
    with pytest.raises(EditorError, match=r"is damaged .*NaN or infinity"):
        load_editor(folder)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "deeper/a.safetensors"])
def test_weights_outside_the_folder_are_refused(folder, place):
    other = folder / place
    if "etc" not in place:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(weights_of(folder).read_bytes())
    rewrite(folder, lambda about: about.update(weights=place))
    with pytest.raises(EditorError, match="outside its folder") as found:
        load_editor(folder)
    assert one_sentence(found.value)


@pytest.mark.parametrize(
    "format_", [checkpoint.FORMAT + 1, checkpoint.FORMAT - 1, 0, str(checkpoint.FORMAT), None]
)
def test_another_format_is_refused(folder, format_):
    rewrite(folder, lambda about: about.update(format=format_))
    with pytest.raises(
        EditorError, match=r"editor format .*, this version reads \d+; use"
    ) as found:
        load_editor(folder)
    assert one_sentence(found.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("metod", "; did you mean 'method'?"), ("zzz", "")], ids=["near", "far"]
)
def test_an_unknown_setting_is_named_with_the_nearest(folder, name, hint):
    rewrite(folder, lambda about: about["settings"].update({name: 1}))
    with pytest.raises(EditorError) as found:
        load_editor(folder)
    assert f"unknown setting {name!r}{hint}; it was written by a newer" in str(found.value)
    assert one_sentence(found.value)


@pytest.mark.parametrize("part", ["network", "descent"])
def test_an_unknown_setting_of_a_part_is_named(folder, part):
    rewrite(folder, lambda about: about["settings"][part].update(steeps=1))
    with pytest.raises(EditorError, match="steeps"):
        load_editor(folder)


def test_a_setting_that_is_not_there_has_its_default(folder):
    """An editor of an earlier version lacks the settings that came later."""
    rewrite(folder, lambda about: about["settings"].pop("tokens") and None)
    assert load_editor(folder).editor.settings == SETTINGS
