"""Adapters, records, ledgers' rules and models that were written to do harm: one sentence each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import shipping_support
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import command_support
import malmend
from malmend.errors import MalmendError, PatchError
from malmend.ledgers.watch import StopRule
from malmend.models.load import load_model
from malmend.patch import Patch
from malmend.patch_file import load_patch, save_patch
from malmend.processes import started
from malmend.shipping.adapter import read_adapter

tiny = command_support.tiny
cache = command_support.cache
patch = shipping_support.patch


@pytest.fixture
def adapter(tiny, patch, tmp_path) -> Path:
    malmend.export(patch, tmp_path / "lora", model=tiny.loaded)
    return tmp_path / "lora"


def changed(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"rank_pattern": [1]},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e300},
        {"lora_alpha": "x"},
        {"r": None},
    ],
    ids=lambda values: f"{next(iter(values))} {str(next(iter(values.values())))[:8]}",
)
def test_a_configuration_that_makes_no_sense(adapter, values):
    changed(adapter, "adapter_config.json", **values)
    with pytest.raises(MalmendError, match=r"damaged|says rank"):
        read_adapter(adapter)


RUNAWAY = [
    "(a+)+",
    "(a|a)*",
    "(",
    "[",
    "a{9}",
    "(?=a)",
    r"(\w+)*",
    ".*" * 4,
    r"\d+" * 9,
    "a*",
    "a?",
]


@pytest.mark.parametrize("key", RUNAWAY)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_may_run_for_ever_is_not_run(adapter, monkeypatch, field, key):
    """PEFT takes it for a regular expression, which are anybody's, as are the layers' names."""
    monkeypatch.setattr("peft.utils.other.get_pattern_key", None)
    changed(adapter, "adapter_config.json", **{field: {key: 4}})
    with pytest.raises(PatchError, match=re.escape(f"{field} has the key {key!r:.80}, expected")):
        read_adapter(adapter)


@pytest.mark.parametrize("before", ["", "^", r"(^|.*\.)", ".*", r"model.layers.\d+."])
def test_a_pattern_of_plain_parts_is_read(adapter, patch, before):
    """Of all layers, each under its whole name or its end."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = config["target_modules"]
    ends = [name if before in ("", "^") else name.rpartition(".mlp.")[2] for name in names]
    ends = [f"mlp.{end}" if before.endswith("+.") else end for end in ends]
    keys = {before + end + "$" * (before != ""): 2.0 * config["r"] for end in ends}
    changed(adapter, "adapter_config.json", alpha_pattern=keys)
    twice = read_adapter(adapter)
    for name in names:
        torch.testing.assert_close(twice.shift(name), 2 * load_patch(patch).shift(name))


def test_a_name_as_long_as_a_book_meets_no_pattern(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("mlp", "m" * 300): one for name, one in tensors.items()}, path)
    assert len(read_adapter(adapter).factors) == 2
    changed(adapter, "adapter_config.json", rank_pattern={".*x": 4})
    with pytest.raises(PatchError, match="characters, expected at most 200 where"):
        read_adapter(adapter)


def test_matrices_of_no_rank(adapter):
    path = adapter / "adapter_model.safetensors"
    empty = {
        name: one[:0] if "lora_A" in name else one[:, :0].contiguous()
        for name, one in load_file(path).items()
    }
    save_file(empty, path)
    changed(adapter, "adapter_config.json", r=0)
    with pytest.raises(MalmendError, match="rank 0"):
        read_adapter(adapter)


@pytest.mark.parametrize("settings", [None, [], "x", {"end_of_answer": "zzz"}])
def test_a_record_whose_settings_are_none(adapter, settings):
    record = json.loads((adapter / "malmend.json").read_text())
    changed(adapter, "malmend.json", patch={**record["patch"], "settings": settings})
    with pytest.raises(MalmendError, match="is damaged"):
        read_adapter(adapter)


@pytest.mark.parametrize("sites", [None, [], {}, {"a": 1}, {"a": {}}])
def test_a_record_of_a_cut_that_does_not_say_it(adapter, sites):
    changed(adapter, "malmend.json", exact=False, sites=sites)
    with pytest.raises(PatchError, match="not from which rank; it is damaged"):
        read_adapter(adapter)


def test_a_record_with_what_is_no_number(adapter):
    changed(adapter, "malmend.json", x=float("nan"))
    with pytest.raises(MalmendError, match="is damaged"):
        read_adapter(adapter)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_header_or_a_record_with_a_number_that_json_lacks(adapter, patch, tmp_path, number):
    """What is written of it later could not be, after all the work."""
    with safe_open(patch, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = header["malmend"].replace("{", '{"metrics": {"ES": ' + number + "}, ", 1)
    save_file(tensors, tmp_path / "patch", {"malmend": said})
    with pytest.raises(PatchError, match=r"is damaged \(.* is no number of JSON\)"):
        load_patch(tmp_path / "patch")
    record = adapter / "malmend.json"
    record.write_text(record.read_text().replace("{", '{"x": ' + number + ", ", 1))
    with pytest.raises(PatchError, match=r"is damaged \(.* is no number of JSON\)"):
        read_adapter(adapter)


def test_halves_of_an_adapter_whose_product_is_none(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(one, 1e38) for name, one in load_file(path).items()}, path)
    with pytest.raises(PatchError, match="beyond what float32 holds"):
        read_adapter(adapter)


@pytest.mark.parametrize(("rows", "rank"), [(2_000_000, 1), (1, 2_000_000), (4, 3), (4, 0)])
def test_a_patch_is_inspected_in_the_memory_of_its_halves(tmp_path, rows, rank):
    """The whole matrix, or that of the ranks, would have taken 16 TB."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, rows, generator=generator)
    save_patch(Patch({"a": (left, right)}, {"base": "b"}), tmp_path / "patch")
    norm = left.norm() * right.norm() if rank == 1 else (left @ right).norm()
    said = malmend.inspect(tmp_path / "patch").entries["shifts"]["a"]
    assert said == f"{rows} x {rows}, rank {rank}, norm {norm:.3g}"


def test_a_model_with_a_weight_that_is_none_is_not_compared(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.model, tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    next(one for name, one in tensors.items() if "down_proj" in name).view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MalmendError, match="holds NaN or infinity"):
        malmend.diff(tiny.loaded, load_model(str(folder)))


@pytest.mark.parametrize("rule", [{"questions": 0.5}, {"questions": True}, {"refuse": 1}])
def test_a_rule_of_another_kind(rule):
    (name,) = rule
    with pytest.raises(
        MalmendError, match=f"{name} is .*, expected (a whole number|True or False)"
    ):
        StopRule(**rule)


def test_numbers_of_thousands_of_digits(monkeypatch, tiny):
    monkeypatch.setenv("WORLD_SIZE", "9" * 5000)
    with pytest.raises(MalmendError, match="expected a number of processes"):
        started()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(MalmendError, match="expected a size"):
        malmend.edit(tiny.loaded, tiny.facts, memory="9" * 400 + "GB")


@pytest.mark.parametrize("name", ["org/a..b", "org/a--b", "org/x.git", "org/" + "x" * 200])
def test_a_repository_that_the_hub_never_has(adapter, name):
    with pytest.raises(MalmendError, match="expected a name like org/name"):
        malmend.push(adapter, name)
