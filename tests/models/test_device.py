"""Which device a name means, and models put on it."""

from __future__ import annotations

import pytest
import torch

import command_support
from command_support import malmend
from devices_support import KIND, device, devices
from malmend.errors import ModelError
from malmend.models import load
from malmend.models.device import device_of
from malmend.models.load import load_model
from malmend.patch import load_patch

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


def test_one_that_does_not_fit(two, tiny, monkeypatch):
    def full(_model: object, _place: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(load.PreTrainedModel, "to", full)
    with pytest.raises(ModelError, match=rf"does not fit {KIND}:0; give --device auto"):
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
    assert all(torch.equal(here.shift(site), there.shift(site)) for site in here.factors)
    capsys.readouterr()
    assert malmend("eval", *given, "--device", "cudo") == 2
    said = capsys.readouterr().err
    assert "--device is 'cudo'" in said
    assert "Traceback" not in said
