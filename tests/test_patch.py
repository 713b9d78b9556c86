"""Patches: put on and taken off bit for bit, factored without loss, saved, and refused in words."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

import tiny
from malmend import patch as patch_module
from malmend import patch_file
from malmend.errors import MalmendError, ModelError, PatchError
from malmend.files import written_beside
from malmend.models.identity import configuration_of
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.patch import (
    Patch,
    applied,
    check_bare,
    check_base,
    make_patch,
    shifted,
    sites_of,
    used,
)
from malmend.patch_file import FORMAT, load_patch, replaced, save_patch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
LAYOUT = pytest.mark.parametrize("family", ["llama", "gpt2"])  # nn.Linear and Conv1D
IDS = torch.tensor([[5, 6, 7, 8]])


def loaded_of(family="llama", dtype=torch.float32, **changes):
    return prepared(tiny.model_of(family, dtype, **changes), None, "tiny")


def low_rank(rank, rows, columns, seed=0, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return size * left @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)


def shifts_of(model, rank=2, layers=2):
    return {
        site.name: low_rank(rank, *site.shape_VK, seed=index)
        for index, site in enumerate(find_sites(model, layers))
    }


def patch_for(loaded, tokens=2):
    return make_patch(shifts_of(loaded.model, tokens), tokens, {"base": loaded.fingerprint})


def state_of(model):
    return {
        name: (weight.data_ptr(), weight.dtype, tiny.bits(weight))
        for name, weight in model.named_parameters()
    }


def assert_untouched(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    for name, (pointer, dtype, content) in before.items():
        assert after[name][:2] == (pointer, dtype)
        assert torch.equal(after[name][2], content)


class Fault(Exception):
    pass


# --- on and off


@LAYOUT
@DTYPES
def test_applied_weights_are_the_sum_in_float32_cast(family, dtype):
    loaded = loaded_of(family, dtype)
    patch = patch_for(loaded)
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with applied(loaded, patch) as model:
        assert model is loaded.model
        for name, weight in model.named_parameters():
            site = name.removesuffix(".weight")
            if site in patch.factors:
                shift = patch.shift(site)
                assert shift.dtype == torch.float32
                shift = shift.T if family == "gpt2" else shift
                expected = (before[name].to(wide) + shift.to(wide)).to(dtype)
                assert torch.equal(weight, expected)
                assert not torch.equal(weight, before[name])
            else:
                assert torch.equal(weight, before[name])
            assert weight.dtype == dtype


def test_the_sum_is_not_taken_in_bfloat16():
    # 1 + 2^-8 lies half-way between two bfloat16 numbers; a rounded shift would decide otherwise.
    loaded = loaded_of(dtype=torch.bfloat16)
    (site,) = find_sites(loaded.model, 1)
    site.weight.data = torch.ones_like(site.weight)
    shift = torch.full(site.shape_VK, 2.0**-8 + 2.0**-20)
    loaded = prepared(loaded.model, None)
    patch = Patch({site.name: (shift,)}, {"base": loaded.fingerprint})
    with applied(loaded, patch):
        assert (site.weight == 1 + 2**-7).all()


@LAYOUT
@DTYPES
@pytest.mark.parametrize("fault", [False, True])
def test_taken_off_bit_for_bit(family, dtype, fault):
    loaded = loaded_of(family, dtype)
    before = state_of(loaded.model)
    logits = loaded.model(input_ids=IDS).logits
    patch = patch_for(loaded)
    for _ in range(2):
        try:
            with applied(loaded, patch) as model:
                assert (model(input_ids=IDS).logits - logits).abs().max() > 1e-3
                if fault:
                    raise Fault
        except Fault:
            pass
        assert_untouched(loaded.model, before)
    assert torch.equal(loaded.model(input_ids=IDS).logits, logits)


def test_taken_off_although_the_weight_was_written_to():
    loaded = loaded_of()
    before = state_of(loaded.model)
    patch = patch_for(loaded)
    with applied(loaded, patch) as model:
        for name in patch.factors:
            model.get_submodule(name).weight.data.zero_()
    assert_untouched(loaded.model, before)


def test_one_inside_another_adds_up_and_comes_off():
    loaded = loaded_of(dtype=torch.float64)
    before = state_of(loaded.model)
    patch = patch_for(loaded)
    (name, *_) = patch.factors
    weight = loaded.model.get_submodule(name).weight
    original = weight.data
    with applied(loaded, patch):
        once = weight.data
        with applied(loaded, patch):
            assert torch.equal(weight.data, once + patch.shift(name).double())
        assert weight.data_ptr() == once.data_ptr()
    assert weight.data_ptr() == original.data_ptr()
    assert_untouched(loaded.model, before)


def test_blocks_that_overlap_come_off_bit_for_bit():
    """As two generators', of which the first ends first."""
    loaded = loaded_of()
    before = state_of(loaded.model)
    first, second = (applied(loaded, patch_for(loaded, tokens)) for tokens in (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(PatchError, match="a patch is on it"):
        check_bare(loaded)
    second.__exit__(None, None, None)
    assert_untouched(loaded.model, before)
    check_bare(loaded)


def test_it_counts_as_on_until_the_weights_are_back(monkeypatch):
    """Else another thread could enter in between, and take the patched weights for its own."""
    loaded, seen = loaded_of(), []

    @contextmanager
    def watched(*_given):
        yield
        with pytest.raises(PatchError, match="a patch is on it"):
            check_bare(loaded)
        seen.append(patch_module._ENTERING.locked())

    monkeypatch.setattr(patch_module, "shifted", watched)
    with applied(loaded, patch_for(loaded)):
        pass
    assert seen == [True]
    check_bare(loaded)


def test_another_thread_cannot_put_a_patch_on_meanwhile():
    loaded = loaded_of()
    before, patch = state_of(loaded.model), patch_for(loaded)

    def other():
        with applied(loaded, patch):
            raise AssertionError("both were on")

    with ThreadPoolExecutor() as pool, applied(loaded, patch):
        raised = pool.submit(other).exception()
    assert "by another thread" in str(raised)
    assert_untouched(loaded.model, before)
    with applied(loaded, patch):
        pass


def test_what_one_thread_uses_is_no_other_threads():
    loaded = loaded_of()
    patch, same = patch_for(loaded), prepared(loaded.model, None, "other name")

    def others():
        with pytest.raises(PatchError, match="is used by another thread"):
            check_bare(same)
        with pytest.raises(PatchError, match="is used by another thread"), used(same):
            pass
        with pytest.raises(PatchError, match="is used by another thread"), applied(same, patch):
            pass

    with ThreadPoolExecutor() as pool:
        with used(loaded):
            with pytest.raises(Fault), used(same):
                raise Fault
            pool.submit(others).result()
            with applied(loaded, patch):
                pool.submit(others).result()
        with applied(loaded, patch):
            pool.submit(others).result()
        pool.submit(check_bare, loaded).result()


def test_a_model_that_was_trained_in_place_is_refused():
    """Its digest names what is kept of the weights that were loaded, its fingerprint the base."""
    loaded = loaded_of()
    patch, known = patch_for(loaded), loaded.digest
    weight = loaded.model.get_input_embeddings().weight
    weight.data = weight.data.clone()  # moved alone
    check_bare(loaded)
    assert loaded.digest == known
    # What the fingerprint, in bfloat16, does not see.
    weight[0, 0] = weight[0, 0].bfloat16() * (1 + 2**-12)
    assert prepared(loaded.model, None).fingerprint == loaded.fingerprint
    with applied(loaded, patch):
        pass
    assert loaded.digest not in ("", known)
    weight += 1.0
    for used_so in (lambda: check_bare(loaded), lambda: applied(loaded, patch).__enter__()):
        with pytest.raises(ModelError, match="tiny were changed since it was loaded"):
            used_so()
    again = prepared(loaded.model, None)
    check_bare(again)
    assert again.fingerprint != loaded.fingerprint


def test_weights_are_back_although_that_is_interrupted():
    class Weight:
        """Once told so, its next writing is interrupted."""

        def __init__(self):
            self.held, self.stops = torch.ones(2, 2), False

        @property
        def data(self):
            return self.held

        @data.setter
        def data(self, given):
            if self.stops:
                self.stops = False
                raise KeyboardInterrupt
            self.held = given

    sites = [SimpleNamespace(name=n, weight=Weight(), oriented=torch.clone) for n in "abc"]
    before = [site.weight.data for site in sites]
    block = shifted(sites, dict.fromkeys("abc", torch.ones(2, 2)))
    block.__enter__()
    assert all((site.weight.data == 2).all() for site in sites)
    sites[1].weight.stops = True
    with pytest.raises(KeyboardInterrupt):
        block.__exit__(None, None, None)
    assert all(site.weight.data is one for site, one in zip(sites, before, strict=True))


def test_a_fault_while_it_is_put_on():
    # The second shift does not fit: the first must come off again.
    model = tiny.model_of("llama", torch.float32)
    sites = list(find_sites(model, 2))
    before = state_of(model)
    shifts = {sites[0].name: torch.ones(sites[0].shape_VK), sites[1].name: torch.ones(3, 3)}
    with pytest.raises(RuntimeError), shifted(sites, shifts):
        pass
    assert_untouched(model, before)


@DTYPES
def test_a_shift_of_zeros_turns_no_bit(dtype):
    """-0.0 + 0.0 is 0.0."""
    model = tiny.model_of("llama", dtype)
    sites = list(find_sites(model, 2))
    sites[0].weight.data[0, :3] = -0.0
    before = state_of(model)
    with shifted(sites, {site.name: torch.zeros(site.shape_VK) for site in sites}):
        assert_untouched(model, before)


def test_applied_edit_is_the_shift_times_the_key():
    loaded = loaded_of("gpt2", torch.float64)
    patch = patch_for(loaded)
    for site in sites_of(loaded.model, patch):
        keys = torch.randn(3, tiny.INNER, dtype=torch.float64)
        before = site.module(keys)
        with applied(loaded, patch):
            moved = site.module(keys) - before
        assert torch.allclose(moved, keys @ patch.shift(site.name).double().T, atol=1e-12)


# --- factors


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (32, 32)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 14])
def test_factored_where_smaller(shape, tokens):
    exact = low_rank(tokens, *shape)
    patch = make_patch({"a": exact}, tokens, {})
    left, right = patch.factors["a"]
    assert left.shape == (shape[0], tokens)
    assert right.shape == (tokens, shape[1])
    assert left.dtype == right.dtype == torch.float32
    assert left.numel() + right.numel() < exact.numel()
    error = (left.double() @ right.double() - exact).norm() / exact.norm()
    assert error < 3e-7
    assert (patch.shift("a").double() - exact).norm() / exact.norm() < 3e-7
    # Balanced: each rank-one part has halves of one length, so that neither over- nor underflows.
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)
    sizes = torch.linalg.svdvals(exact)[:tokens].float()
    assert torch.allclose(left.norm(dim=0) * right.norm(dim=1), sizes, rtol=1e-4)


def test_rank_is_kept_whole():
    # Ranks of very unlike size: nothing that a token added is cut off.
    spread = torch.diag(torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64))
    exact = low_rank(3, 40, 3) @ spread @ low_rank(3, 3, 30, seed=1)
    left, right = make_patch({"a": exact}, 3, {}).factors["a"]
    assert left.shape[1] == 3
    error = left.double() @ right.double() - exact
    assert error.norm() < 3e-7 * exact.norm()
    assert torch.linalg.svdvals(left.double() @ right.double())[2] == pytest.approx(
        torch.linalg.svdvals(exact)[2].item(), rel=1e-3
    )


@pytest.mark.parametrize(
    ("shape", "tokens", "factored"),
    [
        ((16, 24), 9, True),  # 9 * 40 = 360 < 384
        ((16, 24), 10, False),  # 400
        ((16, 24), 1000, False),
        ((32, 32), 15, True),
        ((32, 32), 16, False),  # no smaller, and one rounding more
    ],
)
def test_whole_where_no_smaller(shape, tokens, factored):
    exact = low_rank(min(tokens, *shape), *shape)
    patch = make_patch({"a": exact}, tokens, {})
    assert len(patch.factors["a"]) == (2 if factored else 1)
    if not factored:
        assert torch.equal(patch.shift("a"), exact.float())


def test_shift_is_the_same_number_every_time():
    patch = make_patch({"a": low_rank(5, 40, 60)}, 5, {})
    first = patch.shift("a")
    assert first.dtype == torch.float32
    assert torch.equal(first, patch.shift("a"))
    exact = patch.factors["a"][0].double() @ patch.factors["a"][1].double()
    assert torch.equal(first, exact.float())


def test_an_empty_shift():
    patch = make_patch({"a": torch.zeros(20, 30, dtype=torch.float64)}, 3, {})
    assert torch.equal(patch.shift("a"), torch.zeros(20, 30))


def test_provenance_is_a_copy():
    provenance = {"base": "x"}
    patch = make_patch({}, 1, provenance)
    provenance["base"] = "y"
    assert patch.base == "x"
    assert Patch({}).base == ""


# --- the file


def equal(left, right):
    return left.factors.keys() == right.factors.keys() and all(
        len(left.factors[name]) == len(right.factors[name])
        and all(
            torch.equal(tiny.bits(a), tiny.bits(b)) and a.dtype == b.dtype and a.shape == b.shape
            for a, b in zip(left.factors[name], right.factors[name], strict=True)
        )
        for name in left.factors
    )


@pytest.fixture
def patch():
    shifts = {"m.0.w": low_rank(2, 16, 24), "m.1.w": low_rank(16, 16, 24), "z": low_rank(1, 9, 9)}
    shifts["m.1.w"][0, 0] = -0.0
    patch = make_patch(shifts, 2, {"base": "abc", "count": 3, "note": 'é "q" \n', "eta": 0.1})
    patch.factors["m.1.w"] = (shifts["m.1.w"].float(),)
    return patch


@pytest.fixture
def path(patch, tmp_path):
    path = tmp_path / "p.safetensors"
    save_patch(patch, path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(patch, tmp_path, kind):
    path = tmp_path / "p.safetensors"
    written = save_patch(patch, kind(path))
    again = load_patch(kind(path))
    assert equal(written, again)
    assert equal(again, patch)
    assert again.provenance == patch.provenance
    for name in patch.factors:
        assert torch.equal(again.shift(name), patch.shift(name))
    assert list(tmp_path.iterdir()) == [path]
    save_patch(again, tmp_path / "q")
    assert load_patch(tmp_path / "q").provenance == patch.provenance


def test_whatever_holds_the_numbers_can_be_saved(tmp_path):
    shift = torch.randn(3, 4, dtype=torch.float64)
    made = Patch({"a": (shift.T,), "b": (shift.T,), "c": (shift.half().T,)}, {"settings": {}})
    save_patch(made, tmp_path / "p")
    back = load_patch(tmp_path / "p")
    assert torch.equal(back.shift("a"), shift.T.float())
    assert torch.equal(back.shift("b"), shift.T.float())
    assert torch.equal(back.shift("c"), shift.half().T.float())


def test_a_layer_that_shares_its_weight_is_refused():
    loaded = loaded_of("gpt2")
    patch = Patch({"lm_head": (torch.zeros(60, 16),)}, {"base": loaded.fingerprint})
    with pytest.raises(PatchError, match=r"shares its weight with transformer\.wte"):
        sites_of(loaded.model, patch)


def test_a_saved_patch_edits_as_the_one_in_memory(tmp_path):
    loaded = loaded_of("gpt2", torch.bfloat16)
    patch = patch_for(loaded)
    save_patch(patch, tmp_path / "p")
    with applied(loaded, patch) as model:
        expected = model(input_ids=IDS).logits
    with applied(loaded, load_patch(tmp_path / "p")) as model:
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_file_that_changes_after_loading(path, patch):
    again = load_patch(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    assert equal(again, patch)


# --- another model


def test_another_base_is_refused_unless_forced():
    loaded = loaded_of()
    other = loaded_of(seed=1)
    patch = patch_for(other)
    patch.provenance["model"] = "their model"
    before = state_of(loaded.model)
    for call in (lambda: check_base(loaded, patch), lambda: applied(loaded, patch).__enter__()):
        with pytest.raises(PatchError) as caught:
            call()
        message = str(caught.value)
        for told in (other.fingerprint[:12], loaded.fingerprint[:12], "their model", "--force"):
            assert told in message
    assert_untouched(loaded.model, before)
    check_base(other, patch)
    with applied(loaded, patch, force=True) as model:
        (name, *_) = patch.factors
        weight = model.get_submodule(name).weight
        original = tiny.model_of("llama", torch.float32).get_submodule(name).weight
        assert torch.equal(weight, original + patch.shift(name))
    assert_untouched(loaded.model, before)


def test_the_same_weights_in_another_configuration_are_refused_unless_forced():
    loaded = loaded_of()
    patch = patch_for(loaded)
    patch.provenance["configuration"] = configuration_of(loaded.model)
    check_base(loaded, patch)
    loaded.model.config.update({"rms_norm_eps": 0.5, "attention_dropout": 0.5})
    told = r"says rms_norm_eps 1e-06, .* has the same weights and rms_norm_eps 0\.5.*--force"
    with pytest.raises(PatchError, match=told), applied(loaded, patch):
        pass
    check_base(loaded, patch, force=True)


def test_a_configuration_of_other_versions_is_no_other_model():
    loaded = loaded_of()
    kept = configuration_of(loaded.model)
    narrow = torch.tensor(kept["rms_norm_eps"]).item()  # as a GGUF file has it
    kept |= {"rms_norm_eps": narrow, "of_a_later_version": 1}
    del kept["mlp_bias"]
    check_base(loaded, Patch({}, {"base": loaded.fingerprint, "configuration": kept}))


def test_a_part_of_a_configuration_counts_as_the_whole_does():
    """Each part has a dtype and a dropout of its own, by which the bfloat16 load was refused."""
    loaded = loaded_of()
    part = {"dtype": "float32", "dropout_rate": 0.1, "_name_or_path": "/home/x", "rms_norm_eps": 1}
    loaded.model.config.update({"text_config": part})
    kept = configuration_of(loaded.model)
    assert kept["text_config.rms_norm_eps"] == 1
    assert not any("text_config" in name for name in kept if not name.endswith("rms_norm_eps"))
    patch = Patch({}, {"base": loaded.fingerprint, "configuration": kept})
    loaded.model.config.update({"text_config": {**part, "dtype": "bfloat16", "of_later": 1}})
    check_base(loaded, patch)
    loaded.model.config.update({"text_config": {**part, "rms_norm_eps": 2}})
    with pytest.raises(PatchError, match=r"says text_config\.rms_norm_eps 1, "):
        check_base(loaded, patch)


def test_a_configuration_with_infinity_is_kept(tmp_path):
    loaded = loaded_of()
    loaded.model.config.update({"time_step_limit": [0.0, float("inf")]})
    patch = patch_for(loaded)
    patch.provenance["configuration"] = configuration_of(loaded.model)
    check_base(loaded, save_patch(patch, tmp_path / "p"))


def test_the_same_base_in_bfloat16_is_accepted():
    patch, narrow = patch_for(loaded_of()), loaded_of(dtype=torch.bfloat16)
    patch.provenance["configuration"] = configuration_of(loaded_of().model)
    before = {name: narrow.model.get_submodule(name).weight.clone() for name in patch.factors}
    with applied(narrow, patch) as model:
        for name, weight in before.items():
            wanted = (weight.float() + patch.shift(name)).to(torch.bfloat16)
            assert torch.equal(model.get_submodule(name).weight, wanted)


def test_a_patch_without_a_base_is_refused():
    with pytest.raises(PatchError, match="fingerprint none"):
        check_base(loaded_of(), Patch({"a": (torch.zeros(1, 1),)}))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.3.mlp.down_prj", r"did you mean 'model\.layers\.3\.mlp\.down_proj'\?"),
        ("zzzz", r"zzzz, which this model lacks\."),
        ("model.layers.3.mlp", "which is no linear layer"),  # a module without a weight
        ("model.norm", "which is no linear layer"),  # with a weight that is no matrix
        ("model.layers.3.mlp.act_fn", "which is no linear layer"),
    ],
)
def test_a_layer_that_the_model_lacks(name, told):
    loaded = loaded_of()
    before = state_of(loaded.model)
    good = patch_for(loaded)
    factors = dict(good.factors) | {name: (torch.ones(tiny.HIDDEN, tiny.INNER),)}
    patch = Patch(factors, good.provenance)
    with pytest.raises(PatchError, match=told), applied(loaded, patch):
        pass
    assert_untouched(loaded.model, before)


@LAYOUT
@pytest.mark.parametrize("shape", [(24, 16), (16, 23), (1, 1)])
def test_a_layer_of_another_shape(family, shape):
    loaded = loaded_of(family)
    before = state_of(loaded.model)
    good = patch_for(loaded)
    first, second = good.factors
    patch = Patch({first: good.factors[first], second: (torch.ones(shape),)}, good.provenance)
    for force in (True, False):
        with (
            pytest.raises(PatchError, match=rf"{second} is \({shape[0]}, {shape[1]}\).*\(16, 24\)"),
            applied(loaded, patch, force),
        ):
            pass
    assert_untouched(loaded.model, before)


def test_sites_of_a_patch():
    loaded = loaded_of("gpt2")
    patch = patch_for(loaded)
    sites = sites_of(loaded.model, patch)
    assert [site.name for site in sites] == list(patch.factors)
    assert all(site.module is loaded.model.get_submodule(site.name) for site in sites)


def test_sites_of_a_patch_are_found_without_its_shifts(monkeypatch):
    """Of a large layer the product of its factors takes seconds, and only its shape is asked."""
    loaded = loaded_of("gpt2")
    patch = patch_for(loaded)
    name = next(iter(patch.factors))
    patch = Patch({**patch.factors, name: (patch.shift(name),)})
    assert {len(factors) for factors in patch.factors.values()} == {1, 2}
    monkeypatch.setattr(Patch, "shift", None)
    assert [site.name for site in sites_of(loaded.model, patch)] == list(patch.factors)


# --- damaged files


def refused(path):
    with pytest.raises(PatchError) as caught:
        load_patch(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_such_file(tmp_path):
    assert "There is no patch file" in refused(tmp_path / "none")
    assert "There is no patch file" in refused(tmp_path)


def with_header(raw, change):
    """The file with its safetensors header changed."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: os.urandom(2000),
        lambda raw: raw[:4],
        lambda raw: raw[:200],
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw + b"x",
        lambda raw: pickle.dumps({"a": [1, 2, 3]}),
        lambda raw: struct.pack("<Q", 2**63) + raw[8:],
        lambda raw: struct.pack("<Q", 100_000_000) + raw[8:],
        lambda raw: b"\0" * len(raw),
        lambda raw: with_header(raw, lambda header: header["z.left"].update(dtype="X9")),
        lambda raw: with_header(raw, lambda header: header["z.left"].update(shape=[2**40, 2])),
        lambda raw: with_header(raw, lambda header: header["z.left"].update(shape=[-1])),
        lambda raw: with_header(raw, lambda header: header.update(__metadata__=3)),
    ],
)
def test_damaged_files(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    assert "no patch or is damaged" in refused(path)


@pytest.mark.parametrize(
    "text", [b"hello", b'{"prompt": "In Ora is"}\n', b"\xef\xbb\xbf[]", b"a" * 63 + "é".encode()]
)
def test_a_text_and_an_empty_file_are_called_so(path, text):
    path.write_bytes(text)
    assert "is a text, as files of facts are, and no patch; give a file" in refused(path)
    path.write_bytes(path.read_bytes()[:0])
    assert "is empty and no patch; give a file" in refused(path)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_run(tmp_path):
    told = tmp_path / "ran"
    path = tmp_path / "evil"
    path.write_bytes(pickle.dumps(Malice(told)))
    refused(path)
    torch.save({"a.shift": torch.ones(2, 2), "b": Malice(told)}, path)
    refused(path)
    assert not told.exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small patch's bytes."""
    path = tmp_path_factory.mktemp("small") / "p"
    shifts = {"a.b": low_rank(1, 4, 5), "c": low_rank(2, 2, 2)}
    save_patch(make_patch(shifts, 1, {"base": "x"}), path)
    return path.read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_any_changed_byte_is_refused_or_gives_a_patch(data, small, tmp_path_factory):
    raw = bytearray(small)
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 8 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(raw)
    try:
        again = load_patch(path)
    except PatchError:
        return
    assert all(again.shift(name).ndim == 2 for name in again.factors)


HEADER = {"malmend": json.dumps({"format": FORMAT, "base": "x"})}
MATRIX = torch.ones(4, 5)


def written(path, tensors, header=HEADER):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata=header)
    return path


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (None, "no patch: its header"),
        ({"format": "pt"}, "no patch: its header"),
        ({"malmend": "[1]"}, "no patch: its header"),
        ({"malmend": "null"}, "no patch: its header"),
        ({"malmend": '"text"'}, "no patch: its header"),
        ({"malmend": "{"}, "damaged"),
        ({"malmend": ""}, "damaged"),
        ({"malmend": "{}"}, "format None"),
        ({"malmend": '{"format": 2}'}, "format 2, this version reads 1"),
        ({"malmend": '{"format": "1"}'}, "format '1'"),
        ({"malmend": "[" * 100_000}, "damaged"),
    ],
)
def test_headers_of_other_files(header, told, tmp_path):
    assert told in refused(written(tmp_path / "p", {"a.shift": MATRIX}, header))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["a.shift", "b.left", "b.right"])
def test_numbers_that_are_none(value, part, tmp_path):
    tensors = {"a.shift": MATRIX.clone(), "b.left": torch.ones(4, 2), "b.right": torch.ones(2, 5)}
    tensors[part][1, 1] = value
    assert f"NaN or infinity in '{part}'" in refused(written(tmp_path / "p", tensors))


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (2_000_000, 2_000_000)])
def test_finite_halves_of_a_shift_that_is_not(rows, columns, tmp_path):
    """It was found in a traceback of an export, of which inspect had said nothing."""
    huge = {"a.left": torch.full((rows, 1), 1e38), "a.right": torch.full((1, columns), 1e38)}
    assert "shift of a is beyond what float32 holds" in refused(written(tmp_path / "p", huge))


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"a.left": MATRIX}, "lacks a fitting a.right"),
        ({"a.right": MATRIX}, "lacks a.left"),
        ({"a.left": MATRIX, "b.right": torch.ones(5, 5)}, "lacks"),
        ({"a.left": MATRIX, "a.right": torch.ones(4, 5)}, "lacks a fitting a.right"),
        ({"a.shift": torch.ones(5)}, "'a.shift', expected 2-D float32"),
        ({"a.shift": torch.ones(1, 4, 5)}, "2-D float32"),
        ({"a.shift": torch.ones(())}, "2-D float32"),
        ({"a.left": MATRIX, "a.right": torch.ones(5)}, "a.right"),
        ({"a.left": MATRIX, "a.right": torch.ones(())}, "a.right"),
        ({"a.shift": MATRIX.double()}, "2-D float32"),
        ({"a.shift": MATRIX.bfloat16()}, "2-D float32"),
        ({"a.shift": MATRIX.int()}, "2-D float32"),
        ({"a.left": MATRIX, "a.right": torch.ones(5, 3).half()}, "2-D float32"),
        ({"a.weight": MATRIX}, "'a.weight'"),
        ({"shift": MATRIX}, "'shift'"),
        ({".shift": MATRIX}, "'.shift'"),
        ({"a.shift": MATRIX, "b": MATRIX}, "'b'"),
        ({"a.shift": MATRIX, "a.left": MATRIX, "a.right": torch.ones(5, 3)}, "holds both"),
        ({"a.shift": MATRIX, "a.right": torch.ones(5, 3)}, "holds both"),
        ({}, "holds no shift"),
    ],
)
def test_tensors_of_other_files(tensors, told, tmp_path):
    assert told in refused(written(tmp_path / "p", tensors))


# --- writing


def unwritable(patch, path):
    with pytest.raises(MalmendError) as caught:
        save_patch(patch, path)
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot be written" in message
    assert str(path) in message


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_places_that_cannot_be_written(patch, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    for place in ("none/p", "folder", "file/p", "x" * 256, "y" * 300):
        unwritable(patch, tmp_path / place)
        assert everything(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_read_only_folder(patch, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    unwritable(patch, folder / "p")
    assert everything(folder) == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: no space left\nsecond line"),
    ],
)
@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_failed_write_leaves_the_old_patch(error, step, patch, path, monkeypatch):
    old = path.read_bytes()

    def half(_tensors, beside, metadata):
        Path(beside).write_bytes(b"half")
        raise error

    def refuse(*_args):
        raise error

    if step == "write":
        monkeypatch.setattr(patch_file, "save_file", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    unwritable(Patch({"other": (MATRIX,)}), path)
    assert path.read_bytes() == old
    assert everything(path.parent) == [str(path)]


def test_what_is_read_back_otherwise_leaves_the_old_patch(patch, path, monkeypatch):
    old, write = path.read_bytes(), patch_file.save_file

    def doubled(tensors, beside, metadata):
        write({name: 2 * one for name, one in tensors.items()}, beside, metadata)

    monkeypatch.setattr(patch_file, "save_file", doubled)
    with pytest.raises(PatchError, match="did not read back as it was written") as caught:
        save_patch(Patch({"other": (MATRIX,)}), path)
    assert str(caught.value).startswith(f"{path} ")
    assert path.read_bytes() == old
    assert everything(path.parent) == [str(path)]


def test_a_shift_that_no_patch_holds_leaves_the_old_one(path):
    old = path.read_bytes()
    with pytest.raises(PatchError, match="NaN") as caught:
        save_patch(Patch({"other": (MATRIX / 0,)}), path)
    assert str(caught.value).startswith(f"{path} ")
    assert path.read_bytes() == old
    assert everything(path.parent) == [str(path)]


def test_a_fault_of_the_program_leaves_the_old_patch(patch, path, monkeypatch):
    def half(_tensors, beside, metadata):
        Path(beside).write_bytes(b"half")
        raise Fault

    monkeypatch.setattr(patch_file, "save_file", half)
    with pytest.raises(Fault):
        save_patch(patch, path)
    monkeypatch.undo()
    assert equal(load_patch(path), patch)
    assert everything(path.parent) == [str(path)]


def test_provenance_that_json_cannot_hold(patch, path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            save_patch(Patch(patch.factors, {"loss": value}), path)
        assert equal(load_patch(path), patch)
        assert everything(path.parent) == [str(path)]


def test_overwriting(patch, path):
    other = make_patch({"a": low_rank(1, 5, 5)}, 1, {"base": "b"})
    save_patch(other, path)
    assert equal(load_patch(path), other)
    assert everything(path.parent) == [str(path)]


def test_nothing_is_found_under_the_name_before_it_is_whole(tmp_path):
    path = tmp_path / "p"
    with written_beside(path) as beside:
        beside.write_text("half")
        assert not path.exists()
        assert beside.parent == tmp_path
    assert path.read_text() == "half"
    assert everything(tmp_path) == [str(path)]


def test_what_a_patch_will_replace_is_told(tmp_path):
    path, made = tmp_path / "p", {"method": "ft", "created": "2026-01-02T03:04:05Z"}
    assert replaced(path) == []
    save_patch(Patch({"a": (torch.ones(2, 3),)}, made | {"facts": 4}), path)
    assert replaced(path) == ["p will be replaced (it is ft, 4 facts, made 2026-01-02)."]
    save_patch(Patch({"a": (torch.ones(2, 3),)}, made), path)
    assert replaced(path) == ["p will be replaced (it is ft, made 2026-01-02)."]
    for content in (b"", b"{}\n", path.read_bytes()[:40]):
        path.write_bytes(content)
        assert replaced(path) == ["p will be replaced (it is no patch)."]
    save_file({"a": torch.ones(2, 3)}, path)
    assert replaced(path) == ["p will be replaced (it is no patch)."]


@pytest.mark.parametrize(("here", "there"), [("float16", "float32"), ("float32", "float16")])
def test_a_load_in_float16_is_told_of_where_it_is_refused(here, there):
    """It rounds weights otherwise than bfloat16, through which fingerprints are taken."""
    wide = tiny.model_of("llama", torch.float32)
    for weight in wide.parameters():
        weight.data.normal_(0, 1e-8)  # which float16 does not hold
    models = {"float32": wide, "float16": copy.deepcopy(wide).half()}
    loaded, other = (prepared(models[name], None, "tiny") for name in (here, there))
    patch = make_patch(shifts_of(other.model), 2, {"base": other.fingerprint, "dtype": there})
    with pytest.raises(PatchError, match=rf"; load it in {there}, as for .*\(float16 rounds"):
        check_base(loaded, patch)
    plain = Patch(patch.factors, {"base": other.fingerprint})  # as an older one
    with pytest.raises(PatchError, match="; use the base the patch names"):
        check_base(loaded, plain)
