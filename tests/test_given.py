"""What is given in Python, or on two options at once, that no command takes: one sentence each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import command_support
import malmend
from command_support import files_in, make_facts
from malmend import workbench
from malmend.errors import EditorError, MalmendError, ModelError
from malmend.methods.method import Found
from malmend.models.sites import find_sites

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(3)


@dataclass(frozen=True)
class Astray:
    """Shifts a layer below the one that it says it edits."""

    name = "astray"
    end_of_answer = "eos"

    def sites_in(self, model):
        return find_sites(model, 1)

    def find(self, bench, _facts, _progress):
        below = find_sites(bench.loaded.model, 2)[0]
        return Found({below.name: torch.ones(below.shape_VK, dtype=torch.float64)}, 1)


def test_a_shift_outside_a_methods_own_layers_is_refused(tiny, tmp_path):
    """Of activations from the unedited model the edit was once said to do nothing."""
    with pytest.raises(EditorError, match=r"astray shifts model.layers.4.mlp.down_proj"):
        malmend.edit(tiny.loaded, FEW, tmp_path / "patch", method=Astray())
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("name", ["report.json", "index.html", ""])
def test_an_edit_does_not_write_its_patch_where_its_report_goes(tiny, tmp_path, name):
    report = tmp_path / "rep"
    if name:
        report.mkdir()
    with pytest.raises(MalmendError, match="where the report"):
        malmend.edit(tiny.loaded, FEW, report / name, report=report)
    assert files_in(tmp_path) == set()


def test_eval_does_not_write_its_figures_where_its_report_goes(tiny, tmp_path, capsys):
    (tmp_path / "rep").mkdir()
    given = (tiny.model, tiny.facts, "--report", tmp_path / "rep")
    at = tmp_path / "x" / ".." / "rep" / "index.html"
    (tmp_path / "x").mkdir()
    assert command_support.malmend("eval", *given, "--json", at) == 2
    assert "where the report" in capsys.readouterr().err
    assert files_in(tmp_path) == set()


def test_a_loaded_model_is_of_its_own_dtype_and_place(tiny, monkeypatch):
    """dtype and device were once let go in silence."""
    for given in ({"dtype": "bfloat16"}, {"device": "cuda"}, {"device": "auto"}):
        with pytest.raises(ModelError, match="is loaded already"):
            workbench.opened(tiny.loaded, **given)
        with pytest.raises(ModelError, match="is loaded already"):
            malmend.edit(tiny.loaded, FEW, **given)
    assert workbench.opened(tiny.loaded, "float32", "cpu") is tiny.loaded
    monkeypatch.setattr(workbench, "places_of", lambda _model: "cuda:0, cuda:1")
    for device in ("cpu", "cuda", "auto"):  # cpu is the default, so that nobody may have said it
        assert workbench.opened(tiny.loaded, device=device) is tiny.loaded
    with pytest.raises(ModelError, match="on cuda:0, cuda:1"):
        workbench.opened(tiny.loaded, device="cuda:0")
