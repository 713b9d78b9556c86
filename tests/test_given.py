"""What is given in Python, or on two options at once, that no command takes: one sentence each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import command_support
import malmend
from command_support import CALIBRATION, files_in, make_facts
from malmend import workbench
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.errors import EditorError, FactsError, MalmendError, ModelError, PatchError
from malmend.facts.fact import Question
from malmend.facts.readers import given_facts
from malmend.files import written_beside
from malmend.methods.editor_choice import choose
from malmend.methods.memit import Memit
from malmend.methods.method import Found
from malmend.models.descent import Descent
from malmend.models.sites import find_sites
from malmend.patch import Patch

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(3)
PATCH = Patch({})


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


ROW = {"prompt": "The capital of Kalo is", "answer": "Miru"}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([ROW], r"entry 1 is \{'prompt'"),
        (["The capital of Kalo is"], "entry 1 is 'The capital"),
        ([*FEW, None], "entry 4 is None"),
        (ROW, "entry 1 is 'prompt'"),
        (3, "facts is 3, expected"),
        ([replace(FEW[0], answer=3)], "fact 'f0': answer is 3, expected a text"),
        ([replace(FEW[0], prompt=None)], "fact 'f0': prompt is None"),
        ([replace(FEW[0], paraphrases="abc")], "fact 'f0': paraphrases is 'abc'"),
        ([replace(FEW[0], unrelated=(Question(3),))], "fact 'f0': unrelated is "),
        ([replace(FEW[0], neighbours=("Lake",))], "fact 'f0': neighbours is "),
        ([FEW[0], replace(FEW[1], id="f0")], "2 facts have the id 'f0'; give each its own"),
    ],
)
def test_facts_that_are_none_are_refused_in_a_sentence(facts, said, tiny):
    for command in (malmend.edit, malmend.eval):
        with pytest.raises(FactsError, match=said):
            command(tiny.loaded, facts)


def test_a_fact_given_twice_is_still_a_repeat_and_lists_are_still_taken():
    known = given_facts([*FEW, FEW[0], replace(FEW[1], id="other")])
    assert (known.facts, len(known.skipped)) == (tuple(FEW), 2)
    listed = replace(FEW[0], paraphrases=["One"], unrelated=[Question("Two")])
    assert given_facts([listed]).facts == (listed,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "memit"}, "method is 'memit', expected"),
        ({"method": Memit}, "expected a method"),
        ({"editor": None}, "editor is None, expected"),
        ({"editor": 3}, "editor is 3, expected"),
    ],
)
def test_a_way_to_edit_that_is_none_is_refused(given, said, tiny):
    with pytest.raises(MalmendError, match=said):
        malmend.edit(tiny.loaded, FEW, **given)


def test_settings_given_to_an_edit_are_of_an_editor_without_a_network(tiny):
    """An untrained network of two blocks was once built, for an editor called none."""
    own = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    found = malmend.edit(tiny.loaded, FEW, settings=EditorSettings(layers=1), **own).patch
    free = malmend.edit(tiny.loaded, FEW, settings=replace(training_free(), layers=1), **own).patch
    assert found.provenance["settings"]["network"]["blocks"] == 0
    assert found.provenance["settings"] == free.provenance["settings"]
    assert choose("none", EditorSettings()).settings == training_free()


def test_a_patch_that_is_none_is_refused(tiny, tmp_path):
    for what in (3, [], {"a": torch.ones(2)}):
        with pytest.raises(PatchError, match="expected a patch"):
            malmend.eval(tiny.loaded, FEW, what)
        with pytest.raises(PatchError, match="expected a patch"):
            malmend.ask(tiny.loaded, "The capital of", what)
        with pytest.raises(PatchError, match="expected a patch"):
            malmend.export(what, tmp_path / "out", "lora")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (EditorSettings, {"linear": "Second"}, "linear is 'Second'; did you mean 'second'"),
        (EditorSettings, {"end_of_answer": "EOS"}, "end_of_answer is 'EOS', expected 'eos'"),
        (EditorSettings, {"form": "Residual"}, "form is 'Residual'"),
        (EditorSettings, {"prior": "words"}, "prior is 'words'"),
        (EditorSettings, {"method": "ridge"}, "method is 'ridge'"),
        (EditorSettings, {"side": None}, "side is None"),
        (EditorSettings, {"tokens": ["all"]}, r"tokens is \['all'\]"),
        (EditorSettings, {"layers": "1"}, "layers is '1', expected a whole number or None"),
        (EditorSettings, {"layers": True}, "layers is True"),
        (EditorSettings, {"eta": "1"}, "eta is '1', expected a number or None"),
        (EditorSettings, {"sites": 3}, "sites is 3, expected a text or None"),
        (EditorSettings, {"descent": {"steps": 1}}, "descent is .*, expected Descent or None"),
        (EditorSettings, {"network": None}, "network is None, expected NetworkSettings"),
        (NetworkSettings, {"placement": "Before"}, "placement is 'Before'"),
        (NetworkSettings, {"start": "zero"}, "start is 'zero'"),
        (NetworkSettings, {"rank": 1.5}, "rank is 1.5, expected a whole number"),
        (Descent, {"answer_nll": math.nan}, "descent.answer_nll is nan"),
        (Descent, {"end_nll": -5}, "descent.end_nll is -5"),
        (Descent, {"rate": math.inf}, "descent.rate is inf"),
        (Descent, {"steps": "3"}, "steps is '3'"),
    ],
)
def test_settings_that_no_editor_has_are_refused(kind, given, said):
    """Most of them once ran as other ones."""
    with pytest.raises(MalmendError, match=said):
        kind(**given)


@pytest.mark.parametrize("given", [{"linear": "Second"}, {"side": "both "}, {"layers": "1"}])
def test_sites_that_are_misspelt_are_refused(given, tiny):
    with pytest.raises(ModelError, match=f"{next(iter(given))} is "):
        find_sites(tiny.loaded.model, **given)


def test_a_model_in_training_mode_is_refused_as_that(tiny):
    """Dropout let it seem to see later tokens; of its parts one in that mode is enough."""
    model = tiny.loaded.model
    for part in (model, list(model.modules())[-1]):
        part.train()
        try:
            with pytest.raises(ModelError, match=r"is in training mode, .* call eval\(\)"):
                workbench.opened(tiny.loaded)
        finally:
            model.eval()
    assert workbench.opened(tiny.loaded) is tiny.loaded


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((3,), "path is 3, expected a text or a Path"),
        ((None,), "path is None, expected a text or a Path"),
        (("",), "path is empty, expected a path"),
        (("f", "2"), "limit is '2', expected a whole number or None"),
        (("f", True), "limit is True, expected a whole number or None"),
        (("f", math.nan), "limit is nan, expected a whole number or None"),
        (("f", 2, "yes"), "strict is 'yes', expected True or False"),
    ],
)
def test_facts_are_read_from_a_path_and_up_to_a_number(given, said):
    with pytest.raises(
        MalmendError, match=rf"^{re.escape(said)}.*; (see help\(read_facts\)|give one)\.$"
    ):
        malmend.read_facts(*given)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: malmend.applied(t.loaded, "p.st"), "patch is 'p.st', expected Patch"),
        (lambda t: malmend.applied(t.model, PATCH), "loaded is .*, expected LoadedModel"),
        (lambda t: malmend.save_patch(None, "p.st"), "patch is None, expected Patch"),
        (lambda t: malmend.save_patch("p.st", PATCH), "patch is 'p.st', expected Patch"),
        (lambda t: malmend.save_patch(PATCH, ""), "path is empty, expected a path"),
        (lambda t: malmend.load_model(3), "name is 3, expected a text"),
        (lambda t: malmend.load_model(Path("nosuch")), "There is no model 'nosuch'"),
        (lambda t: malmend.prepared(None, None), "model is None, expected PreTrainedModel"),
        (lambda t: malmend.prepared(t.loaded.model, None, 3), "name is 3, expected a text"),
    ],
)
def test_models_and_patches_are_judged_where_they_are_given(
    call, said, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MalmendError, match=said):
        call(tiny)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_nothing_is_written_to_a_path_without_a_name(path):
    said = "names no file, expected the path of a file to write"
    with pytest.raises(MalmendError, match=said), written_beside(path):
        pass
