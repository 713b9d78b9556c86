"""LoRA adapters: PEFT's reading gives the patched logits; others' adapters are read as PEFT does.

Shape letters: V value width, K key width, R rank.
"""

from __future__ import annotations

import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from shipping_support import (
    FAMILIES,
    assert_untouched,
    batch_for,
    bits_of,
    loaded_of,
    logits_of,
    patch_for,
    twin,
)

from malmend.errors import PatchError
from malmend.models.sites import find_sites
from malmend.numerics.truncation import spectrum
from malmend.patch import Patch, applied, sites_of
from malmend.patch_file import save_patch
from malmend.shipping.adapter import (
    CONFIG,
    FOREIGN,
    WEIGHTS,
    based_on,
    is_adapter,
    read_adapter,
    read_patch,
    write_adapter,
)

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# 3 keeps the patch as factors, 1000 as whole matrices.
BOUNDS = pytest.mark.parametrize("bound", [3, 1000])


@pytest.fixture(autouse=True)
def _peft_asks_by_an_old_name():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def write(loaded, patch, folder):
    folder.mkdir()
    spectra = {name: spectrum(factors) for name, factors in patch.factors.items()}
    return write_adapter(loaded, sites_of(loaded.model, patch), spectra, folder)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)


# --- written here, read by PEFT


@EVERY_FAMILY
@BOUNDS
def test_peft_gives_the_patched_models_logits(family, bound, tmp_path):
    loaded, folder = loaded_of(family), tmp_path / "adapter"
    patch, inputs = patch_for(loaded, bound=bound), batch_for(loaded.model)
    before, bare = bits_of(loaded.model), logits_of(loaded.model, inputs)
    assert write(loaded, patch, folder) == 3
    assert_untouched(loaded.model, before)
    with applied(loaded, patch) as model:
        wanted = logits_of(model, inputs)
    bar = 1e-4 * wanted.abs().max()
    assert (wanted - bare).abs().max() > 100 * bar  # the edit is seen
    adapted = PeftModel.from_pretrained(twin(loaded), folder).eval()
    assert (logits_of(adapted, inputs) - wanted).abs().max() < bar
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, inputs), bare)
    merged = adapted.merge_and_unload()
    assert (logits_of(merged, inputs) - wanted).abs().max() < bar
    for site in sites_of(loaded.model, patch):
        moved = merged.get_submodule(site.name).weight.double() - site.weight.double()
        torch.testing.assert_close(
            site.oriented(moved).float(), patch.shift(site.name), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_transformers_loads_it_by_itself(family, tmp_path):
    loaded, folder = loaded_of(family), tmp_path / "adapter"
    patch, inputs, model = patch_for(loaded), batch_for(loaded.model), twin(loaded)
    write(loaded, patch, folder)
    model.load_adapter(str(folder))
    with applied(loaded, patch) as wanted:
        gold = logits_of(wanted, inputs)
    assert (logits_of(model, inputs) - gold).abs().max() < 1e-4 * gold.abs().max()


@EVERY_FAMILY
def test_the_adapter_stays_out_of_all_other_layers(family, tmp_path):
    loaded, folder = loaded_of(family), tmp_path / "adapter"
    patch = patch_for(loaded, layers=1)
    write(loaded, patch, folder)
    adapted = PeftModel.from_pretrained(twin(loaded), folder)
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert wrapped == set(patch.factors)
    assert not any("modules_to_save" in name for name, _ in adapted.named_modules())


def test_the_eleventh_block_is_not_taken_for_the_first(tmp_path):
    loaded, folder = loaded_of("llama", num_hidden_layers=12), tmp_path / "adapter"
    name = "model.layers.1.mlp.down_proj"
    shift = patch_for(loaded).shift("model.layers.11.mlp.down_proj")
    write(loaded, Patch({name: (shift,)}, {"base": loaded.fingerprint}), folder)
    adapted = PeftModel.from_pretrained(twin(loaded), folder)
    wrapped = [n for n, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert wrapped == [f"base_model.model.{name}"]


def test_what_readers_without_patterns_need(tmp_path):
    loaded, folder = loaded_of("llama"), tmp_path / "adapter"
    patch = patch_for(loaded)  # ranks 3, 2 and 1
    write(loaded, patch, folder)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 3, "none")
    assert not (config["rank_pattern"])
    assert not (config["alpha_pattern"])
    assert not (config["modules_to_save"])
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(patch.factors)
    for key, tensor in load_file(folder / WEIGHTS).items():
        assert key.startswith("base_model.model.model.layers.")
        assert tensor.shape[0 if "lora_A" in key else 1] == 3
        assert tensor.dtype == torch.float32
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    write(loaded, patch, tmp_path / "again")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_a_shift_of_nothing_is_an_adapter_of_nothing(tmp_path):
    loaded, folder = loaded_of("llama"), tmp_path / "adapter"
    patch = patch_for(loaded)
    empty = Patch({n: (0 * patch.shift(n),) for n in patch.factors}, patch.provenance)
    assert write(loaded, empty, folder) == 1
    adapted = PeftModel.from_pretrained(twin(loaded), folder)
    inputs = batch_for(loaded.model)
    assert torch.equal(logits_of(adapted, inputs), logits_of(loaded.model, inputs))


# --- read back, and others' adapters


@BOUNDS
def test_what_is_read_back_is_the_patch(bound, tmp_path):
    loaded, folder = loaded_of("gpt2"), tmp_path / "adapter"
    patch = patch_for(loaded, bound=bound)
    write(loaded, patch, folder)
    assert is_adapter(folder)
    found = read_adapter(folder)
    assert found.factors.keys() == patch.factors.keys()
    for name in patch.factors:
        torch.testing.assert_close(found.shift(name), patch.shift(name), rtol=0, atol=2e-7)
    assert (found.base, found.provenance["method"]) == ("", FOREIGN)
    based, other = based_on(found, loaded), loaded_of("gpt2", seed=1)
    assert based.base == based_on(based, other).base == loaded.fingerprint
    assert based_on(patch, other).base == loaded.fingerprint  # a patch's own is never replaced


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 7, "use_rslora": True},  # the first is what `make test` runs
        {"lora_alpha": 7},
        {"lora_alpha": 7, "rank_pattern": {"SECOND": 5}, "alpha_pattern": {"SECOND": 3}},
    ],
    ids=["rslora", "alpha", "patterns"],
)
def test_an_adapter_that_peft_made_is_read_as_peft_merges_it(family, settings, tmp_path):
    loaded = loaded_of(family)
    second, first = (site.name for site in find_sites(loaded.model, 1, linear="both")[:2])
    settings = {
        key: {second: one["SECOND"]} if isinstance(one, dict) else one
        for key, one in settings.items()
    }
    config = LoraConfig(
        r=2, target_modules=[first, second], fan_in_fan_out=family == "gpt2", **settings
    )
    adapted = get_peft_model(twin(loaded), config)
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    found = read_patch(tmp_path / "adapter")
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert set(found.factors) == {first, second}
    for site in find_sites(loaded.model, 1, linear="both"):
        if site.name in found.factors:
            wanted = layers[f"base_model.model.{site.name}"].get_delta_weight("default")
            torch.testing.assert_close(found.shift(site.name), site.oriented(wanted.detach()))


def test_a_file_is_read_as_a_patch(tmp_path):
    loaded = loaded_of("llama")
    patch = patch_for(loaded)
    save_patch(patch, tmp_path / "patch")
    assert read_patch(tmp_path / "patch").base == loaded.fingerprint
    with pytest.raises(PatchError, match="no patch file"):
        read_patch(tmp_path / "ptch")


# --- what is refused


@pytest.fixture
def adapter(tmp_path):
    loaded = loaded_of("llama")
    write(loaded, patch_for(loaded), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "with use_dora True"),
        ({"bias": "all"}, "with bias 'all'"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "with init_lora_weights 'OLoRA'"),
        ({"init_lora_weights": "corda"}, "with init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "with init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "with init_lora_weights 'lora_ga'"),
        ({"lora_alpha": None}, "says no rank or alpha"),
        ({"r": 5}, "says rank 5 of .*, its matrices have 3"),
    ],
)
def test_adapters_that_are_no_plain_shift_are_refused(adapter, changes, said):
    edit_json(adapter / CONFIG, **changes)
    with pytest.raises(PatchError, match=said):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "setting",
    [
        "modules_to_save",
        "trainable_token_indices",
        "lora_bias",
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
    ],
)
def test_every_setting_that_adds_to_the_shift_is_refused(adapter, setting):
    edit_json(adapter / CONFIG, **{setting: {"any": "value"}})
    with pytest.raises(PatchError, match=f"with {setting} .*, which is more than a shift"):
        read_adapter(adapter)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(adapter, start):
    edit_json(adapter / CONFIG, init_lora_weights=start)
    assert read_adapter(adapter).factors


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_changed_the_base_is_refused(start, tmp_path):
    loaded = loaded_of("llama")
    names = [site.name for site in find_sites(loaded.model, 1)]
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=start)
    get_peft_model(twin(loaded), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PatchError, match=f"init_lora_weights '{start}'"):
        read_patch(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_such_an_adapter_is_read_once_peft_has_made_it_plain(tmp_path):
    loaded, (first, plain) = loaded_of("llama"), (tmp_path / "first", tmp_path / "plain")
    names = [site.name for site in find_sites(loaded.model, 1)]
    adapted = get_peft_model(
        twin(loaded), LoraConfig(r=2, target_modules=names, init_lora_weights="pissa")
    )
    # As PEFT wants it: the start is kept as an adapter that changes no base again.
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(first)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(plain, path_initial_model_for_weight_conversion=str(first))
    inputs = batch_for(loaded.model)
    with applied(loaded, based_on(read_patch(plain), loaded)):
        got = logits_of(loaded.model, inputs)
    torch.testing.assert_close(got, logits_of(adapted, inputs))


KINDS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_halves_that_are_no_plain_numbers_are_refused(adapter, dtype):
    edit_tensors(adapter, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    said = f"as {str(dtype).removeprefix('torch.')}, expected float16, .* convert it"
    with pytest.raises(PatchError, match=said):
        read_adapter(adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_halves_of_floating_types_are_read(adapter, dtype):
    edit_tensors(adapter, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    for halves in read_adapter(adapter).factors.values():
        assert {half.dtype for half in halves} == {torch.float32}


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_halves_beyond_float32_are_refused(adapter, half):
    edit_tensors(
        adapter,
        lambda tensors: {n: t.double() + 1e300 * (half in n) for n, t in tensors.items()},
    )
    with pytest.raises(PatchError, match="beyond what float32 holds"):
        read_adapter(adapter)


def without_a_half(tensors):
    return dict(list(tensors.items())[1:])


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def with_an_embedding(tensors):
    return tensors | {"base_model.model.embed.lora_embedding_A": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_half, "lacks a fitting half"),
        (with_nan, "NaN or infinity"),
        (with_an_embedding, "expected lora_A and lora_B matrices"),
        (lambda tensors: {}, "holds no adapter of any layer"),
    ],
)
def test_damaged_adapters_are_refused(adapter, change, said):
    edit_tensors(adapter, change)
    with pytest.raises(PatchError, match=said):
        read_adapter(adapter)


def test_nothing_is_ever_unpickled(adapter):
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PatchError, match="pickled adapters are never read"):
        read_adapter(adapter)


def test_files_that_are_no_adapter_are_refused(adapter, tmp_path):
    (adapter / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(PatchError, match="is damaged"):
        read_adapter(adapter)
    (adapter / CONFIG).write_text("{")
    with pytest.raises(PatchError, match="cannot be read"):
        read_adapter(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError, match=f"it is a folder without {CONFIG}"):
        read_patch(tmp_path / "empty")
