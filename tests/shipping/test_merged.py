"""Merged models: on disk is the patched model, rounded once; the caller's stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from shipping_support import (
    FAMILIES,
    assert_untouched,
    batch_for,
    bits_of,
    loaded_of,
    logits_of,
    patch_for,
    save_folder,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from malmend.errors import ModelError
from malmend.models.load import DTYPES, load_model, save_model
from malmend.models.sites import find_sites
from malmend.patch import Patch, applied, sites_of
from malmend.shipping.merged import base_dtype, cast_copy, merged, read_back, rounding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_holds_the_patched_model(family, dtype, tmp_path):
    save_folder(loaded_of(family), tmp_path / "base")
    loaded = load_model(str(tmp_path / "base"))
    patch, before = patch_for(loaded), bits_of(loaded.model)
    whole = merged(loaded, patch, dtype)
    assert_untouched(loaded.model, before)
    assert loaded.model.config.dtype == torch.float32
    save_model(whole, tmp_path / "merged")
    found = load_model(str(tmp_path / "merged"), dtype)
    with applied(loaded, patch) as model:
        weights = dict(found.model.named_parameters())
        for name, weight in model.named_parameters():
            assert torch.equal(weights[name], weight.to(DTYPES[dtype]))  # rounded once
        if dtype == "float32":
            inputs = batch_for(model)
            assert torch.equal(logits_of(found.model, inputs), logits_of(model, inputs))
    assert base_dtype(str(tmp_path / "merged")) == dtype


def test_the_sum_of_a_narrow_base_is_rounded_once(tmp_path):
    """To the dtype that is asked for, not to the base's before."""
    narrow = loaded_of("llama", dtype=torch.bfloat16)
    patch = patch_for(narrow)
    whole = merged(narrow, patch, "float32")
    for name in patch.factors:
        before, after = (one.model.get_submodule(name).weight.detach() for one in (narrow, whole))
        assert torch.equal(after, before.float() + patch.shift(name))


def test_transformers_alone_opens_it_with_tokenizer_and_generation_config(tmp_path):
    loaded = loaded_of("llama")
    loaded.model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2)
    folder = save_folder(loaded, tmp_path / "base")
    loaded = load_model(folder)
    save_model(merged(loaded, patch_for(loaded), "bfloat16"), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("w3 w4").input_ids == loaded.tokenizer("w3 w4").input_ids


@pytest.mark.parametrize(("base", "shifted"), [(1e5, 0.0), (0.0, 1e5), (1e5, -1e5)])
def test_a_weight_beyond_the_dtypes_range_is_refused(base, shifted):
    """It was written as infinity, which reads back as infinity; also where a shift brings it back,
    of which rounding was said to take an infinite share."""
    loaded = loaded_of("llama")
    name = find_sites(loaded.model, 1)[0].name
    shift = torch.zeros(loaded.model.get_submodule(name).weight.shape)
    shift[0, 0] = shifted
    with torch.no_grad():
        loaded.model.get_parameter(f"{name}.weight")[0, 0] += base
    with pytest.raises(ModelError, match=r"down_proj.weight holds numbers that float16 has not"):
        merged(loaded, Patch({name: (shift,)}, {}), "float16")
    assert merged(loaded, Patch({name: (shift,)}, {}), "bfloat16").dtype == "bfloat16"


def test_what_a_load_computes_anew_is_not_rounded():
    loaded = loaded_of("llama")
    whole = merged(loaded, patch_for(loaded), "bfloat16")
    assert whole.model.dtype == torch.bfloat16
    angles = [one for name, one in whole.model.named_buffers() if "inv_freq" in name]
    assert angles
    assert all(one.dtype == torch.float32 for one in angles)


def test_a_saved_buffer_is_cast_and_a_tied_weight_stays_tied():
    loaded = loaded_of("gpt2")
    loaded.model.lm_head.register_buffer("scale", torch.tensor([1 / 3]))
    whole = cast_copy(loaded, "bfloat16")
    assert whole.model.lm_head.scale.dtype == torch.bfloat16
    assert loaded.model.lm_head.scale.dtype == torch.float32
    assert whole.model.lm_head.weight is whole.model.transformer.wte.weight


def test_a_model_that_is_saved_as_another_is_not_passed_off(tmp_path):
    loaded = load_model(save_folder(loaded_of("llama"), tmp_path / "base"))
    meant = merged(loaded, patch_for(loaded), "float32")
    save_model(meant, tmp_path / "merged")
    assert read_back(tmp_path / "merged", meant, "float32").model.dtype == torch.float32
    find_sites(meant.model, 1)[0].weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="was read back"):
        read_back(tmp_path / "merged", meant, "float32")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_rounding_took_by_its_definition(family):
    loaded = loaded_of(family)
    patch = patch_for(loaded)
    small = Patch({n: (1e-3 * patch.shift(n),) for n in patch.factors}, patch.provenance)
    for dtype, least, most in (("float32", 0, 1e-3), ("bfloat16", 0.1, 9.0)):
        whole = merged(loaded, small, dtype)
        for site in sites_of(loaded.model, small):
            weight, kind = site.oriented(site.weight), DTYPES[dtype]
            shift = small.shift(site.name)
            moved = (weight + shift).to(kind).double() - weight.to(kind).double()
            found = rounding(loaded, whole, small, site)
            wanted = (moved - shift.double()).norm() / shift.double().norm()
            assert found.lost == pytest.approx(wanted.item())
            assert found.unmoved == pytest.approx((moved == 0).float().mean().item())
            assert least <= found.lost < most
    nothing = Patch({n: (0 * patch.shift(n),) for n in patch.factors}, patch.provenance)
    found = rounding(loaded, copy.deepcopy(loaded), nothing, sites_of(loaded.model, nothing)[0])
    assert (found.lost, found.unmoved) == (0.0, 0.0)


def test_a_weight_that_no_shift_asks_for_is_not_one_that_stayed():
    loaded = loaded_of("llama")
    plain = patch_for(loaded)
    (name, *_), half = plain.factors, {}
    half[name] = (plain.shift(name).clone(),)
    half[name][0][::2] = 0.0  # every second row of the layer is to stay
    patch = Patch(half, plain.provenance)
    site = sites_of(loaded.model, patch)[0]
    whole = merged(loaded, patch, "float32")
    assert rounding(loaded, whole, patch, site).unmoved == 0.0
    # One weight that should have moved is put back.
    weight, base = (one.model.get_submodule(name).weight for one in (whole, loaded))
    weight.data[1, 0] = base[1, 0]
    asked = int((half[name][0] != 0).sum())
    assert rounding(loaded, whole, patch, site).unmoved == 1 / asked


def test_the_dtype_of_a_base(tmp_path):
    assert base_dtype(loaded_of("llama", torch.bfloat16)) == "bfloat16"
    assert base_dtype(loaded_of("llama", torch.float64)) == "float32"  # is none that is written
    folder = save_folder(loaded_of("llama", torch.float16), tmp_path / "half")
    assert base_dtype(folder) == "float16"
