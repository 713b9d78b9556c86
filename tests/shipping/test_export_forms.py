"""Encoder-decoders and classifiers through the whole command: cut, measured, merged, compared."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from shipping_support import logits_of, patch_for

import command_support
import forms_folders
from command_support import malmend
from malmend.models.load import load_model
from malmend.patch import applied
from malmend.patch_file import save_patch
from malmend.shipping.adapter import read_adapter

tiny = command_support.tiny
cache = command_support.cache


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow), "bert"])
def test_an_edit_of_every_form_is_exported(family, tmp_path, capsys):
    classes = forms_folders.CLASSES if family == "bert" else ()
    base = forms_folders.save_base(family, tmp_path / "base", classes=classes)
    facts = forms_folders.save_facts(family, tmp_path / "facts")
    text = forms_folders.save_text(tmp_path / "text")
    loaded = load_model(base)
    patch = patch_for(loaded, rank=12, layers=1)
    save_patch(patch, tmp_path / "patch")
    common = ["--facts", facts, "--decode-facts", 0]

    exact, cut, whole = (tmp_path / name for name in ("exact", "cut", "whole"))
    for arguments in (
        [exact, "--to", "lora", *common],
        [cut, "--to", "lora", "--rank", 8, "--text", text, *common],
        [whole, "--to", "merged", *common],
    ):
        assert malmend("export", tmp_path / "patch", *arguments) == 0
    assert "exported" in capsys.readouterr().out

    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if family != "bert":
        ids["decoder_input_ids"] = torch.tensor([[3, 5]])
    with applied(loaded, patch) as model:
        wanted = logits_of(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel.from_pretrained(load_model(base).model, exact).eval()
    assert (logits_of(adapted, ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(logits_of(load_model(str(whole)).model, ids), wanted)

    sites = json.loads((cut / "malmend.json").read_text())["sites"]
    assert {one.shape[1] for name in sites for one in read_adapter(cut).factors[name][:1]} == {8}
    assert all(0 < one["error_on_keys"] < one["error"] for one in sites.values())
    assert malmend("diff", base, whole, "--out", tmp_path / "found") == 0
    assert f"{len(patch.factors)} weights differ" in capsys.readouterr().out
    arguments = [tmp_path / "patch", tmp_path / "found", "--facts", facts, facts, "--limit", 2]
    assert malmend("conflicts", base, *arguments) == 0
    assert "patch and found" in capsys.readouterr().out
