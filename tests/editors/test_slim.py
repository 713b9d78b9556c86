"""An editor as it is shipped: networks in float16, and no moments of its prior."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import captured_of, random_editor, random_facts, same, tiny_model, tiny_trunk

from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.keymoments import load_moments, save_moments
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


def test_the_file_holds_networks_in_half_and_nothing_of_the_prior(slim):
    editor, _, folder = slim
    tensors = weights_of(folder)
    full = editor.state_dict()
    assert tensors.keys() == {name for name in full if not name.startswith("prior_")}
    for name, tensor in tensors.items():
        wanted = full[name].half() if name.startswith("networks.") else full[name]
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name


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


def test_an_edit_once_the_moments_are_there_is_the_full_editors(slim):
    """The only difference is float16, 2^-11 of each weight of the network."""
    editor, captured, folder = slim
    loaded = load_editor(folder).editor
    assert loaded.lacks_moments
    loaded.take_moments(moments_of(editor))
    assert not loaded.lacks_moments
    for site in range(2):
        for mine, wanted in zip(
            loaded.prior(site, 7).matrices_KK, editor.prior(site, 7).matrices_KK, strict=True
        ):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, wanted)
    wanted = editor.shifts(captured)
    for name, shift_VK in loaded.shifts(captured).items():
        assert 0 < (shift_VK - wanted[name]).norm() < 5e-3 * wanted[name].norm()
    # Rounded by hand, the full editor's is the same to the bit.
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.copy_(parameter.half())
    rounded = editor.shifts(captured)
    for name, shift_VK in loaded.shifts(captured).items():
        assert torch.equal(shift_VK, rounded[name])


def test_without_its_moments_it_is_refused(slim):
    _, captured, folder = slim
    loaded = load_editor(folder).editor
    for use in (lambda: loaded.prior(0, 3), lambda: loaded.shifts(captured)):
        with pytest.raises(EditorError, match="lacks the moments of its prior") as found:
            use()
        text = str(found.value)
        assert "\n" not in text
        assert text.endswith(".")


@pytest.mark.parametrize(("method", "prior"), [("malmen", "identity"), ("mend", "wording")])
def test_an_editor_without_a_prior_lacks_nothing(tmp_path, method, prior):
    editor, captured = an_editor(replace(SETTINGS, method=method, prior=prior))
    save_editor(editor, {}, tmp_path, slim=True)
    loaded = load_editor(tmp_path).editor
    assert not loaded.lacks_moments
    wanted = editor.shifts(captured)
    for name, shift_VK in loaded.shifts(captured).items():
        assert (shift_VK - wanted[name]).norm() < 5e-3 * wanted[name].norm()


def test_saved_again_it_still_lacks_its_moments_and_completed_it_has_them(slim, tmp_path):
    editor, _, folder = slim
    saved = load_editor(folder)
    save_editor(saved.editor, saved.about, tmp_path / "again")
    again = load_editor(tmp_path / "again").editor
    assert again.lacks_moments
    assert same(again.state_dict(), saved.editor.state_dict())
    saved.editor.take_moments(moments_of(editor))
    save_editor(saved.editor, saved.about, tmp_path / "whole")
    whole = load_editor(tmp_path / "whole").editor
    assert not whole.lacks_moments
    assert same(whole.state_dict(), saved.editor.state_dict())


@pytest.mark.parametrize("kept", ["prior_text_0", "prior_wording_1", "all of site 0"])
def test_weights_with_some_of_the_moments_are_damaged(tmp_path, kept):
    """All of them, or none: anything else lost a part."""
    editor, _ = an_editor()
    save_editor(editor, {"base": "abc"}, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("prior_")
        or name == kept
        or (kept == "all of site 0" and name.endswith("_0"))
    }
    save_file(tensors, path)
    with pytest.raises(EditorError, match="is damaged"):
        load_editor(tmp_path)


def test_what_a_slim_folder_says_is_kept(slim):
    folder = slim[2]
    about = json.loads((folder / "editor.json").read_text())
    assert (about["base"], about["subjects"]) == ("abc", "")
    assert len(list(folder.iterdir())) == 2


def test_moments_come_back_from_disk_by_term_and_site(tmp_path):
    editor, _ = an_editor()
    moments = moments_of(editor)
    save_moments(moments, tmp_path / "moments.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]
    again = load_moments(tmp_path / "moments.safetensors")
    assert again.keys() == moments.keys()
    for term, found in moments.items():
        assert len(again[term]) == len(found) == 2
        for mine, wanted in zip(again[term], found, strict=True):
            assert mine.dtype == torch.float64
            assert torch.equal(mine, wanted)


def test_moments_of_more_than_ten_sites_keep_their_order(tmp_path):
    moments = {term: [torch.full((2, 2), float(i)) for i in range(12)] for term in ("a", "b")}
    save_moments(moments, tmp_path / "moments")
    for found in load_moments(tmp_path / "moments").values():
        assert [int(one[0, 0]) for one in found] == list(range(12))
