"""Which device a name means, and models put on it."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import command_support
import forms_folders as folders
from command_support import malmend
from devices_support import CPU, KIND, device, devices
from malmend import evaluate
from malmend.commands.finetune import finetune
from malmend.errors import MalmendError, ModelError
from malmend.models import load
from malmend.models.device import device_of, wide_device
from malmend.models.finetune import FinetuneSettings
from malmend.models.load import load_model
from malmend.patch_file import load_patch

tiny = command_support.tiny
cache = command_support.cache


@pytest.fixture
def two(monkeypatch) -> None:
    """A machine with two accelerators, one process."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(KIND))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_without_one_there_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda", "auto", "cpu:0", "", "gpu"):
        with pytest.raises(ModelError, match=f"--device is '{name}', expected cpu: .*no acceler"):
            device_of(name)


@pytest.mark.parametrize(
    ("name", "rank", "place"),
    [
        ("cpu", "1", torch.device("cpu")),
        (KIND, None, device(0)),
        (KIND, "1", device(1)),
        (f"{KIND}:0", "1", device(0)),
        (f"{KIND}:1", None, device(1)),
        ("auto", None, None),
    ],
)
def test_names(two, name, rank, place, monkeypatch):
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_of(name) == place


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("xal", f"did you mean '{KIND}'\\? expected cpu, {KIND}, {KIND}:0 to {KIND}:1, or auto"),
        ("gpu", f"--device is 'gpu'.*expected cpu, {KIND}"),
        ("", "--device is '', expected cpu"),
        ("auto:0", "--device is 'auto:0'"),
        ("cpu:0", "--device is 'cpu:0'"),
        (f"{KIND}:-1", f"{KIND}:0 to {KIND}:1"),
        (f"{KIND}:x", f"{KIND}:0 to {KIND}:1"),
        (f"{KIND}:", f"{KIND}:0 to {KIND}:1"),
        (f"{KIND}:2", "number 2 for this process, and torch finds 2"),
    ],
)
def test_what_is_none(two, name, said):
    with pytest.raises(ModelError, match=said):
        device_of(name)


def test_processes_that_have_no_device_of_their_own(two, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ModelError, match=r"number 2 .*start fewer processes"):
        device_of(KIND)
    with pytest.raises(ModelError, match=f"several processes.*--device {KIND}"):
        device_of("auto")


def test_a_number_of_processes_that_is_none(two, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(MalmendError, match="WORLD_SIZE is 'two', expected a number of processes"):
        device_of("auto")
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(MalmendError, match="LOCAL_RANK is 'first', expected this process's number"):
        device_of(KIND)


def test_a_model_is_put_there_and_is_the_same(two, tiny):
    with devices():
        loaded = load_model(tiny.model, device=f"{KIND}:1")
        assert {one.device for one in loaded.model.parameters()} == {device(1)}
        assert loaded.fingerprint == tiny.loaded.fingerprint
    assert {one.device.type for one in load_model(tiny.model).model.parameters()} == {"cpu"}


def test_one_that_is_spread_is_loaded_by_a_device_map(two, tiny, monkeypatch):
    asked, own = [], load.LOADERS["causal"].from_pretrained

    def noted(*given: object, **named: object) -> object:
        asked.append(named.get("device_map"))
        return own(*given, **named)

    monkeypatch.setattr(load.LOADERS["causal"], "from_pretrained", noted)
    assert load_model(tiny.model, device="auto").fingerprint == tiny.loaded.fingerprint
    load_model(tiny.model)
    assert asked == ["auto", None]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_one_that_does_not_fit(two, tiny, monkeypatch, kind):
    def full(_model: object, _place: object) -> None:
        raise kind("CUDA error: out of memory")

    monkeypatch.setattr(load.PreTrainedModel, "to", full)
    with pytest.raises(
        ModelError, match=rf"does not fit {KIND}:0; give --device cpu, .*--device auto"
    ):
        load_model(tiny.model, device=KIND)


def test_by_command(two, tiny, tmp_path, capsys):
    patches = [tmp_path / name for name in ("here", "there")]
    ultra = [tiny.model, tiny.facts, "--limit", 3, "--method", "ultraedit"]
    assert malmend("edit", *ultra, "--out", patches[0]) == 0
    with devices():
        assert malmend("edit", *ultra, "--out", patches[1], "--device", KIND) == 0
        given = [tiny.model, tiny.facts, "--limit", 3, "--patch", patches[1], "--text", "none"]
        assert malmend("eval", *given, "--device", f"{KIND}:1") == 0
    here, there = map(load_patch, patches)
    assert there.provenance["device"] == f"{KIND}:0"
    assert all(torch.equal(here.shift(site), there.shift(site)) for site in here.factors)
    capsys.readouterr()
    assert malmend("eval", *given, "--device", "cudo") == 2
    said = capsys.readouterr().err
    assert "--device is 'cudo'" in said
    assert "Traceback" not in said


def test_every_command_asks_for_its_model_there(tiny, tmp_path, monkeypatch, capsys):
    plan, ledger, patch = tmp_path / "plan.yaml", tmp_path / "ledger", tmp_path / "patch"
    ways = "{a: {method: ultraedit}}"
    plan.write_text(
        f"{{models: [{tiny.model}], facts: {tiny.facts}, sizes: [1], decode: 0, methods: {ways}}}"
    )
    given = [tiny.model, tiny.facts, "--limit", 1]
    assert malmend("edit", *given, "--method", "ultraedit", "--out", patch) == 0
    twin = shutil.copy(patch, tmp_path / "twin")
    assert malmend("ledger", "init", ledger, tiny.model, "--editor", "none", *tiny.fast) == 0
    assert malmend("bench", plan, "--out", tmp_path / "out") == 0
    row = json.loads((tmp_path / "out" / "cells.jsonl").read_text())
    assert (row["device"], load_patch(patch).provenance["device"]) == ("cpu", "cpu")
    assert load_patch(patch).provenance["dtype"] == "float32"
    (tmp_path / "out" / "cells.jsonl").write_text(json.dumps(row | {"device": "cuda:0"}) + "\n")
    assert evaluate(tiny.loaded, tiny.facts, limit=1, text="none").about["device"] == "cpu"
    capsys.readouterr()
    assert malmend("bench", plan, "--out", tmp_path / "out") == 0
    assert "Some of what is done ran on cuda:0; give another --out" in capsys.readouterr().err

    asked: list[str] = []

    def opened(_name: str, _dtype: str = "", device: str = "") -> None:
        asked.append(device)
        raise ModelError("no more is wanted")

    monkeypatch.setattr("malmend.workbench.load_model", opened)
    monkeypatch.setattr("malmend.bench.run.load_model", opened)
    monkeypatch.setattr("malmend.bench.run.device_of", lambda name: None)
    fresh = tmp_path / "fresh"
    commands: list[list[object]] = [
        ["edit", *given, "--out", fresh],
        ["eval", *given],
        ["ask", tiny.model, "In Ora"],
        ["train", tiny.model, tiny.facts, "--out", fresh, "--facts-per-step", 2],
        ["conflicts", tiny.model, patch, twin],
        ["bench", plan, "--out", fresh],
        ["ledger", "init", tmp_path / "other", tiny.model],
        ["ledger", "add", ledger, tiny.facts],
    ]
    for command in commands:
        assert malmend(*command, "--device", "gpu") == 2
        said = capsys.readouterr().err
        assert "no more is wanted" in said, (command, said)
    assert asked == ["gpu"] * len(commands)


def test_what_needs_float64_is_not_on_apples(tiny):
    with devices(), pytest.MonkeyPatch.context() as patch:
        loaded = load_model(tiny.model)
        assert wide_device(loaded.model) == torch.device("cpu")
        patch.setattr(type(loaded.model), "device", torch.device("mps"))
        assert wide_device(loaded.model) == torch.device("cpu")
        patch.setattr(type(loaded.model), "device", device(1))
        assert wide_device(loaded.model) == device(1)


def test_a_model_is_fine_tuned_there_to_the_same_weights(tmp_path, monkeypatch):
    fused = sys.modules["torch.optim.optimizer"]  # its name in torch.optim is a function
    monkeypatch.setattr(load, "device_of", lambda name: {"cpu": CPU, KIND: device(0)}.get(name))
    monkeypatch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["cpu", KIND])
    model, facts = folders.save_base("llama", tmp_path / "base"), tmp_path / "facts"
    facts = folders.save_facts("llama", facts)
    settings = FinetuneSettings(rate=3e-3, batch=4, epochs=2, validation=0)
    finetune(model, facts, tmp_path / "here", settings)
    places, step = set(), torch.optim.Adam.step

    def noted(self, *given):
        places.update(one.device for group in self.param_groups for one in group["params"])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    with devices():

        def stop(record) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(model, facts, tmp_path / "there", settings, device=KIND, stepped=stop)
        finetune(model, facts, tmp_path / "there", settings, device=KIND)  # goes on
    assert places == {device(0)}
    here, there = (load_model(str(tmp_path / name)) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    with pytest.raises(ModelError, match=r"--device auto spreads .*fine-tuned whole"):
        finetune(model, facts, tmp_path / "spread", settings, device="auto")
