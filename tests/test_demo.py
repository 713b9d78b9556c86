"""The demo on a tiny model."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import command_support
import malmend
from command_support import files_in
from malmend.commands import demo as demo_module
from malmend.errors import MalmendError
from malmend.models.identity import bits

tiny = command_support.tiny
cache = command_support.cache


def test_demo_proves_that_the_weights_came_back(tiny, tmp_path, monkeypatch):
    lines: list[str] = []
    quick = functools.partial(demo_module.edit, calibration=command_support.CALIBRATION)
    monkeypatch.setattr(demo_module, "edit", quick)
    put, load = list[str](), demo_module.load_model
    monkeypatch.setattr(
        demo_module, "load_model", lambda *a, device: put.append(device) or load(*a)
    )
    done = malmend.demo(tmp_path / "out", tiny.model, facts=5, spoken=2, told=lines.append)
    assert done.weights_before == done.weights_after == bits(tiny.loaded.model)
    assert done.weights_during != done.weights_before
    assert files_in(tmp_path / "out") == {"patch.safetensors", "report.json", "index.html"}
    assert done.page == tmp_path / "out" / "index.html"
    assert (done.report.facts, done.report.about["decoded_facts"]) == (5, 2)
    saved = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(done.report.to_json()))
    assert saved["about"]["left_out"].startswith("all paraphrases and neighbours of a fact but")
    kinds = [one["kind"] for one in saved["rows"][0]["edited"]]
    assert (kinds.count("GS"), kinds.count("NS")) == (1, 1)
    assert len(done.asked) == 3
    assert put == ["cpu"]
    assert all(one.edited is not None for one in done.asked)
    assert lines
    with pytest.raises(MalmendError):
        malmend.demo(tmp_path / "out", tiny.model, facts=0)


def test_a_digest_sees_every_bit(tiny):
    before = bits(tiny.loaded.model)
    weight = next(tiny.loaded.model.parameters())
    kept = weight.data.clone()
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert bits(tiny.loaded.model) != before
    weight.data.copy_(kept)
    assert bits(tiny.loaded.model) == before


def test_a_misspelt_model_or_device_leaves_no_folder_behind(tmp_path):
    with pytest.raises(malmend.MalmendError, match="did you mean 'smollm2-135m'"):
        malmend.demo(tmp_path / "out", "smollm2-135n")
    with pytest.raises(malmend.MalmendError, match="--device is 'cuda:99'"):
        malmend.demo(tmp_path / "out", device="cuda:99")
    assert list(tmp_path.iterdir()) == []
