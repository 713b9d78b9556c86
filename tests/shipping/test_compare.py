"""Differences of two models: found exactly, told from rounding, and turned into a patch."""

from __future__ import annotations

import pytest
import torch
from shipping_support import FAMILIES, assert_untouched, bits_of, loaded_of, patch_for

from malmend.cli.show_shipping import differing
from malmend.commands.diff import diff
from malmend.errors import MalmendError, PatchError
from malmend.patch import applied
from malmend.shipping.compare import compared, difference_rank
from malmend.shipping.merged import cast_copy, merged


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_edited_layers_are_found_with_their_ranks(family):
    loaded = loaded_of(family)
    patch = patch_for(loaded)
    other = merged(loaded, patch, "float32")
    found = compared(loaded.model, other.model)
    ranks = {name: factors[0].shape[1] for name, factors in patch.factors.items()}
    true_ranks = {
        name: int(torch.linalg.matrix_rank(patch.shift(name).double(), rtol=1e-4)) for name in ranks
    }
    assert {one.name.removesuffix(".weight"): one.rank for one in found.edited} == true_ranks
    assert found.differences == found.edited
    assert found.same == len(dict(loaded.model.named_parameters())) - len(ranks)
    for one in found.edited:
        weight = loaded.model.get_parameter(one.name)
        assert one.shape == tuple(weight.shape)
        wanted = patch.shift(one.name.removesuffix(".weight")).norm() / weight.norm()
        assert one.norm == pytest.approx(wanted.item(), rel=1e-4)


def test_a_model_does_not_differ_from_itself():
    loaded = loaded_of("llama")
    found = compared(loaded.model, loaded_of("llama").model)
    assert found.differences == ()
    assert found.same == len(dict(loaded.model.named_parameters()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("swapped", [False, True])
def test_rounding_is_told_from_an_edit(dtype, swapped):
    loaded = loaded_of("llama")
    patch = patch_for(loaded, layers=1)
    rounded = cast_copy(merged(loaded, patch, dtype), "float32")  # as a float32 load of it
    pair = (loaded.model, rounded.model)
    found = compared(*(pair[::-1] if swapped else pair))
    assert {one.name.removesuffix(".weight") for one in found.edited} == set(patch.factors)
    others = [one for one in found.differences if one.kind == "rounding"]
    assert len(others) > 10
    assert all(one.rank is None and one.norm < 0.01 for one in others)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_float16_copy_of_a_bfloat16_model_differs_by_rounding_alone(swapped):
    """Below 6e-5 float16 has fewer digits than bfloat16, so that most weights were "edited"."""
    plain = loaded_of("llama")
    kept = cast_copy(plain, "bfloat16")
    for one in kept.model.parameters():
        one.data *= 2.0**-14
    as_float16 = cast_copy(cast_copy(kept, "float16"), "float32")
    pair = (cast_copy(kept, "float32").model, as_float16.model)
    found = compared(*(pair[::-1] if swapped else pair))
    assert len(found.rounded) > 10
    assert found.edited == ()
    weight = as_float16.model.model.layers[3].mlp.down_proj.weight
    weight.data = (weight.data + 2.0**-12).half().float()
    (one,) = compared(*(pair[::-1] if swapped else pair)).edited
    assert one.name == "model.layers.3.mlp.down_proj.weight"


def test_a_small_change_of_plain_numbers_is_no_rounding(tmp_path):
    """Norms at 1.0 are exact in bfloat16, and 1.003 rounds to 1.0: a model is kept as a whole."""
    loaded, other = loaded_of("llama"), loaded_of("llama")
    norms = [name for name, _ in loaded.model.named_parameters() if "norm" in name]
    for name in norms:
        loaded.model.get_parameter(name).data.fill_(1.0)
        other.model.get_parameter(name).data.fill_(1.003)
    name = "model.layers.3.mlp.down_proj.weight"
    other.model.get_parameter(name).data += 1
    for pair in ((loaded, other), (other, loaded)):
        found = compared(*(one.model for one in pair))
        assert {one.name for one in found.edited} == {*norms, name}
        assert found.rounded == ()
        with pytest.raises(PatchError, match=r"norm\.weight differs and is no weight of a linear"):
            diff(*pair, out=tmp_path / "patch")


def test_what_a_patch_leaves_out_as_rounding_is_said(tmp_path):
    loaded, said = loaded_of("llama"), list[str]()
    rounded = cast_copy(merged(loaded, patch_for(loaded, layers=1), "bfloat16"), "float32")
    result = diff(loaded, rounded, out=tmp_path / "patch", told=said.append)
    (line,) = said
    names = [one.name for one in result.comparison.rounded]
    assert line == (
        f"The patch leaves out what differs by rounding alone, {len(names)} weights: "
        f"{', '.join(names[:3])} and {len(names) - 3} more"
    )
    diff(loaded, merged(loaded, patch_for(loaded), "float32"), out=tmp_path / "p", told=said.append)
    assert len(said) == 1


def test_whole_numbers_of_a_buffer_say_nothing_of_the_precision():
    """257 is no number of bfloat16."""
    loaded = loaded_of("llama")
    rounded = cast_copy(merged(loaded, patch_for(loaded, layers=1), "bfloat16"), "float32")
    for one in (loaded, rounded):
        one.model.register_buffer("places", torch.tensor([257]))
    assert len(compared(loaded.model, rounded.model).rounded) > 10


def test_the_rank_of_an_edit_that_was_rounded_too():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 80, generator=generator)
    shift = torch.randn(60, 5, generator=generator) @ torch.randn(5, 80, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = weight.to(dtype), (weight + 0.1 * shift).to(dtype)
        assert difference_rank(mine, theirs, torch.finfo(dtype).eps) == 5


def test_the_noise_is_that_of_the_larger_weights():
    """Beside a thousand times larger ones that were rounded, whichever model has them."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(60, 5, generator=generator) @ torch.randn(5, 80, generator=generator)
    large, small = large.bfloat16(), (1e-3 * torch.randn(60, 80, generator=generator)).bfloat16()
    eps = torch.finfo(torch.bfloat16).eps
    assert difference_rank(small, large, eps) == difference_rank(large, small, eps) == 5


def test_what_only_one_model_has_is_said():
    loaded, other = loaded_of("llama"), loaded_of("llama", num_hidden_layers=3)
    found = compared(loaded.model, other.model)
    assert len(found.only_here) == 9
    assert all(name.startswith("model.layers.3.") for name in found.only_here)
    assert found.only_there == ()
    wider = loaded_of("llama", intermediate_size=32)
    found = compared(loaded.model, wider.model)
    assert found.reshaped["model.layers.0.mlp.down_proj.weight"] == ((16, 24), (16, 32))
    assert (
        compared(other.model, loaded.model).only_there
        == compared(loaded.model, other.model).only_here
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_of_a_difference_makes_the_other_model(family, tmp_path):
    loaded = loaded_of(family)
    other = merged(loaded, patch_for(loaded), "float32")
    before = bits_of(loaded.model)
    result = diff(loaded, other, out=tmp_path / "patch")
    assert result.patch is not None
    assert result.patch.provenance["method"] == "diff"
    with applied(loaded, result.patch) as model:
        weights = dict(other.model.named_parameters())
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=2e-7)
    assert_untouched(loaded.model, before)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.norm.weight", "model.norm.weight differs and is no weight of a linear layer"),
        ("model.embed_tokens.weight", "differs and is of class Embedding"),
        ("lm_head.weight", "differs and lies in none of the model's blocks"),
    ],
)
def test_a_difference_that_is_no_patch_is_refused(name, said, tmp_path):
    loaded = loaded_of("llama", tie_word_embeddings=False)
    other = loaded_of("llama", tie_word_embeddings=False)
    other.model.get_parameter(name).data += 1
    with pytest.raises(PatchError, match=said):
        diff(loaded, other, out=tmp_path / "patch")
    assert [one.name for one in diff(loaded, other).comparison.edited] == [name]
    assert list(tmp_path.iterdir()) == []


def test_models_of_unlike_builds_and_equal_ones_give_no_patch(tmp_path):
    loaded = loaded_of("llama")
    with pytest.raises(PatchError, match="is in only one of the models"):
        diff(loaded, loaded_of("llama", num_hidden_layers=3), out=tmp_path / "patch")
    with pytest.raises(PatchError, match="do not differ by more than rounding"):
        diff(loaded, loaded_of("llama"), out=tmp_path / "patch")
    with pytest.raises(MalmendError, match="There is no folder"):
        diff(loaded, loaded, out=tmp_path / "no" / "patch")


def test_unlike_configurations_give_no_patch(tmp_path):
    """The same weights then say something else."""
    loaded, other = loaded_of("llama"), loaded_of("llama", rms_norm_eps=0.1)
    other.model.model.layers[3].mlp.down_proj.weight.data += 1
    with pytest.raises(
        PatchError, match=r"configurations differ in rms_norm_eps \(rms_norm_eps is"
    ):
        diff(loaded, other, out=tmp_path / "patch")
    assert len(diff(loaded, other).comparison.edited) == 1


def test_unlike_configurations_are_told_where_no_weight_differs(tmp_path, capsys):
    """Two models were said to be equal whose logits are far apart."""
    loaded, other = loaded_of("llama"), loaded_of("llama", rms_norm_eps=0.1)
    found = diff(loaded, other)
    assert found.comparison.differences == ()
    assert found.settings == {"rms_norm_eps": (loaded.model.config.rms_norm_eps, 0.1)}
    differing(found)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "The configurations differ in rms_norm_eps (1e-06 and 0.1): one computes otherwise." in said
    )
    with pytest.raises(PatchError, match="configurations differ in rms_norm_eps"):
        diff(loaded, other, out=tmp_path / "patch")
    differing(diff(loaded, loaded_of("llama")))
    assert "configurations" not in capsys.readouterr().out


def test_what_changes_no_output_is_no_matter(tmp_path):
    """As fine-tuning elsewhere leaves configurations."""
    loaded, other = loaded_of("llama"), loaded_of("llama")
    changed = {"pad_token_id": 3, "attention_dropout": 0.1, "initializer_range": 0.5}
    changed |= {"unk_token_id": 0, "rope_interleaved": False}  # the latter only there, as of a GGUF
    other.model.config.update(changed)
    other.model.model.layers[3].mlp.down_proj.weight.data += 1
    assert diff(loaded, other, out=tmp_path / "patch").patch is not None


def test_a_model_with_a_patch_on_it_is_no_base_of_another(tmp_path):
    loaded = loaded_of("llama")
    with applied(loaded, patch_for(loaded)), pytest.raises(PatchError, match="a patch is on it"):
        diff(loaded, loaded_of("llama"), out=tmp_path / "patch")
