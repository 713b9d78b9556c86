"""An editor as it is shipped: networks in float16, moments of its prior in low rank."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import captured_of, random_editor, random_facts, same, tiny_model, tiny_trunk

from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.models.capture import Captured
from malmend.numerics.moments import RunningMoments

SETTINGS = EditorSettings(layers=2, network=NetworkSettings(rank=8))


def an_editor(settings: EditorSettings = SETTINGS) -> tuple[Editor, list[Captured]]:
    trunk = tiny_trunk(tiny_model(dtype=torch.float32))
    captured = captured_of(trunk, random_facts(5), settings)
    return random_editor(settings, trunk, captured), captured


def weights_of(folder) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def moments_of(editor: Editor) -> dict[str, list[torch.Tensor]]:
    known = dict(editor.named_buffers())
    return {
        term: [known[f"prior_{term}_{site}"].double() for site in range(len(editor.names))]
        for term in editor.terms
    }


@pytest.fixture
def slim(tmp_path):
    editor, captured = an_editor()
    save_editor(editor, {"base": "abc", "subjects": ""}, tmp_path / "slim", slim=True)
    return editor, captured, tmp_path / "slim"


def test_networks_take_half_the_room(tmp_path):
    """Of an editor whose network is most of it, as in any real one."""
    settings = EditorSettings(prior="identity", network=NetworkSettings(rank=128))
    known = SiteStatistics(RunningMoments(128), RunningMoments(128))
    editor = Editor(settings, {"site": (128, 128)}, {"site": known})
    for name, is_slim in (("full", False), ("slim", True)):
        save_editor(editor, {}, tmp_path / name, slim=is_slim)
    full, slim = (
        next((tmp_path / name).glob("*.safetensors")).stat().st_size for name in ("full", "slim")
    )
    assert full > 200_000
    assert 0.49 * full < slim < 0.55 * full


def test_a_loaded_slim_editor_is_float32_and_the_full_ones_but_for_float16(slim):
    editor, _, folder = slim
    loaded = load_editor(folder).editor
    assert loaded.settings == editor.settings
    assert loaded.shapes == editor.shapes
    for (name, found), (other, wanted) in zip(
        loaded.named_parameters(), editor.named_parameters(), strict=True
    ):
        assert name == other
        assert found.dtype == torch.float32
        if name.startswith("networks."):
            assert torch.equal(found, wanted.half().float()), name
        else:
            assert torch.equal(found, wanted), name


def test_its_edit_is_the_full_editors_but_for_float16(slim):
    """The only difference is float16, 2^-11 of each weight of the network."""
    editor, captured, folder = slim
    loaded = load_editor(folder).editor
    for site in range(2):
        for mine, wanted in zip(
            loaded.prior(site, 7).matrices_KK, editor.prior(site, 7).matrices_KK, strict=True
        ):
            assert mine.dtype == torch.float32
            # The ranks are above this width, so only float16 is between them, and that not on
            # the diagonal.
            assert (mine - wanted).norm() < 2**-9 * wanted.norm()
            torch.testing.assert_close(mine.diagonal(), wanted.diagonal(), rtol=2**-9, atol=0)
    wanted = editor.shifts(captured)
    for name, shift_VK in loaded.shifts(captured).items():
        assert 0 < (shift_VK - wanted[name]).norm() < 5e-3 * wanted[name].norm()


@pytest.mark.parametrize(("method", "prior"), [("malmen", "identity"), ("mend", "wording")])
def test_an_editor_without_a_prior_lacks_nothing(tmp_path, method, prior):
    editor, captured = an_editor(replace(SETTINGS, method=method, prior=prior))
    save_editor(editor, {}, tmp_path, slim=True)
    loaded = load_editor(tmp_path).editor
    wanted = editor.shifts(captured)
    for name, shift_VK in loaded.shifts(captured).items():
        assert (shift_VK - wanted[name]).norm() < 5e-3 * wanted[name].norm()


def test_what_a_slim_folder_says_is_kept(slim):
    folder = slim[2]
    about = json.loads((folder / "editor.json").read_text())
    assert (about["base"], about["subjects"]) == ("abc", "")
    assert len(list(folder.iterdir())) == 2


def test_the_file_holds_networks_in_half_and_moments_in_low_rank(slim):
    editor, _, folder = slim
    tensors = weights_of(folder)
    for name, tensor in editor.state_dict().items():
        if name.startswith("networks."):
            assert torch.equal(tensors[name], tensor.half()), name
        elif name.startswith("prior_"):
            which = name.removeprefix("prior_")
            assert name not in tensors
            assert tensors[f"low_{which}"].dtype == torch.float16
            assert tensors[f"rest_{which}"].shape == (len(tensor),)
        else:
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("lost", ["low_text_0", "rest_wording_1", "low_asked_1"])
def test_weights_without_a_part_of_a_moment_are_damaged(slim, lost):
    (path,) = slim[2].glob("*.safetensors")
    save_file({name: t for name, t in load_file(path).items() if name != lost}, path)
    with pytest.raises(EditorError, match="is damaged"):
        load_editor(slim[2])


def test_saved_in_full_again_nothing_more_is_lost(slim, tmp_path):
    saved = load_editor(slim[2])
    save_editor(saved.editor, saved.about, tmp_path / "again")
    assert same(load_editor(tmp_path / "again").editor.state_dict(), saved.editor.state_dict())
