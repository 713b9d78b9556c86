"""Every command on a classifier and on encoder-decoders, as a user types it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import forms_folders as folders
from command_support import malmend
from malmend.commands.ask import ask
from malmend.commands.finetune import finetune
from malmend.errors import MalmendError
from malmend.evaluation.generate import generate
from malmend.facts.fact import FactSet
from malmend.facts.readers import read_facts
from malmend.models.identity import bits
from malmend.models.load import LoadedModel, load_model
from malmend.models.sites import find_sites
from malmend.patch import Patch, applied
from malmend.patch_file import load_patch
from malmend.workbench import encoder_for

BART = pytest.param("bart", marks=pytest.mark.slow)
FAMILY = pytest.mark.parametrize("family", ["bert", "t5", BART])
PAIR = pytest.mark.parametrize("family", ["t5", BART])


@dataclass(frozen=True)
class Folder:
    """A model that knows the facts, and material to calibrate on."""

    family: str
    model: str
    facts: str
    calibrate: str
    text: str

    @property
    def fast(self) -> list[str]:
        return ["--calibrate", self.calibrate, "--text", self.text]

    @property
    def aim(self) -> str:
        """The option that edits towards what the model does not say."""
        return "--away" if self.family == "bert" else "--alternative"

    @property
    def known(self) -> FactSet:
        return read_facts(self.facts)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Models fine-tuned on their facts, each made once."""
    made: dict[str, Folder] = {}

    def make(family: str) -> Folder:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            base = folders.save_base(family, place / "base")
            facts = folders.save_facts(family, place / "facts")
            finetune(base, facts, place / "model", folders.learning(family))
            others = folders.save_facts(family, place / "calibrate", first=folders.COUNT)
            text = folders.save_text(place / "text")
            made[family] = Folder(family, str(place / "model"), facts, others, text)
        return made[family]

    return make


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(cache_folder, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("MALMEND_CACHE", str(cache_folder))
    return cache_folder


def answers(loaded: LoadedModel, facts: FactSet) -> list[str]:
    """What the model says of every prompt, in its own words."""
    encoder = encoder_for(loaded)
    prompts = [fact.prompt for fact in facts]
    if encoder.reading.form != "classes":
        return [answer.text for answer in generate(loaded, encoder, prompts)]
    rows = [loaded.tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    with torch.no_grad():
        tops = [int(loaded.model(input_ids=row).logits.argmax()) for row in rows]
    return [loaded.model.config.id2label[top] for top in tops]


# --- edit


@FAMILY
def test_edit_changes_what_is_said_and_comes_off_again(family, learned, tmp_path, capsys):
    have, path = learned(family), tmp_path / "patch.safetensors"
    arguments = ["--out", path, have.aim, *have.fast, "--report", tmp_path / "report"]
    assert malmend("edit", have.model, have.facts, *arguments) == 0
    assert "Edited 12 facts at" in capsys.readouterr().out
    assert "<html" in (tmp_path / "report" / "index.html").read_text()
    patch = load_patch(path)
    success = patch.provenance["metrics"]["ES"]["token_ratio"]
    assert success["unedited"] < 0.1
    # How well depends on the machine: what was learned is another model where sums round otherwise.
    assert success["edited"] > 0.4
    assert max(patch.shift(name).abs().max() for name in patch.factors) < 30  # weights are about 1
    loaded = load_model(have.model)
    digest = bits(loaded.model)
    said = answers(loaded, have.known)
    assert said == [fact.answer for fact in have.known]
    with applied(loaded, patch):
        after = answers(loaded, have.known)
        assert bits(loaded.model) != digest
    wanted = [fact.alternative for fact in have.known]
    assert sum(a == b for a, b in zip(after, wanted, strict=True)) >= 4
    assert answers(loaded, have.known) == said
    assert bits(loaded.model) == digest


def test_away_aims_at_what_the_model_does_not_say(learned, tmp_path):
    """Of a model that is wrong about some, its answer there; elsewhere the other class."""
    have = learned("bert")
    claims = json.loads(Path(have.facts).read_text())
    for claim in claims[::2]:  # these labels are now what the model does not say
        claim["label"], claim["alt"] = claim["alt"], claim["label"]
    (tmp_path / "facts").write_text(json.dumps(claims))
    path, figures = tmp_path / "patch.safetensors", tmp_path / "figures.json"
    facts = tmp_path / "facts"
    assert malmend("edit", have.model, facts, "--out", path, "--away", *have.fast) == 0
    loaded = load_model(have.model)
    before = answers(loaded, read_facts(facts))
    with applied(loaded, load_patch(path)):
        after = answers(loaded, read_facts(facts))
    assert sum(a != b for a, b in zip(before, after, strict=True)) >= 7
    # Labels are right of one half before; asked for what the model does not say, it is never right.
    for aim, share in ((["--away"], 0.0), ([], 0.5)):
        assert malmend("eval", have.model, facts, "--json", figures, *aim) == 0
        found = json.loads(figures.read_text())
        assert found["unedited"]["ES"]["exact"] == share
        assert found["about"]["away"] is bool(aim)


def test_without_alternatives_two_classes_are_enough_and_three_are_not(learned, tmp_path, capsys):
    have = learned("bert")
    claims = json.loads(Path(have.facts).read_text())
    facts, path = tmp_path / "facts", tmp_path / "patch.safetensors"
    facts.write_text(json.dumps([claim | {"alt": None} for claim in claims]))
    assert malmend("edit", have.model, facts, "--out", path, "--away", *have.fast) == 0
    three = folders.save_base("bert", tmp_path / "three", classes=("SUPPORTS", "REFUTES", "OPEN"))
    for claim, said in zip(claims, answers(load_model(three), have.known), strict=True):
        claim["label"], claim["alt"] = said, None
    facts.write_text(json.dumps(claims))
    path.unlink()
    line = folders.refused(capsys, "edit", three, facts, "--out", path, "--away", *have.fast)
    assert "of 12 of 12 facts the model already says the answer" in line


@pytest.mark.slow
@FAMILY
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(family, dtype, learned, tmp_path):
    have, path = learned(family), tmp_path / "patch.safetensors"
    figures = tmp_path / "figures.json"
    typed = ["--dtype", dtype]
    assert malmend("edit", have.model, have.facts, "--out", path, have.aim, *have.fast, *typed) == 0
    success = load_patch(path).provenance["metrics"]["ES"]["token_ratio"]
    assert success["edited"] > success["unedited"]
    options = ["--patch", path, "--json", figures, have.aim, *typed]
    assert malmend("eval", have.model, have.facts, *options) == 0
    assert json.loads(figures.read_text())["about"]["dtype"] == dtype


@pytest.mark.slow
@PAIR
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("linear", ["first", "second"])
def test_sides_and_layers(family, side, linear, learned, tmp_path, capsys):
    have, path = learned(family), tmp_path / "patch.safetensors"
    chosen = ["--side", side, "--linear", linear, "--layers", 1]
    arguments = ["--out", path, have.aim, *have.fast, *chosen]
    assert malmend("edit", have.model, have.facts, *arguments) == 0
    ends = {"t5": ("wi", "wo"), "bart": ("fc1", "fc2")}[family]
    (name,) = load_patch(path).factors
    assert re.search(rf"{side}\.(block|layers)\.1\..*{ends[linear == 'second']}$", name)
    assert load_patch(path).provenance["settings"]["side"] == side
    capsys.readouterr()
    assert malmend("inspect", have.model, *chosen) == 0
    shown = capsys.readouterr().out
    assert f"{name}: {'64 x 32' if linear == 'first' else '32 x 64'}" in shown
    assert len(re.findall(r"\d+ x \d+", shown)) == 1


def test_a_classifier_has_no_sides(learned, tmp_path, capsys):
    have = learned("bert")
    arguments = ["--out", tmp_path / "p", "--side", "encoder", *have.fast]
    assert "no side 'encoder'; leave --side out" in folders.refused(
        capsys, "edit", have.model, have.facts, *arguments
    )


def test_where_away_makes_no_sense(learned, tmp_path, capsys):
    have, pair = learned("bert"), learned("t5")
    for one in (pair, learned("llama")):
        for command in ("edit", "train", "eval"):
            out = [] if command == "eval" else ["--out", tmp_path / "out"]
            line = folders.refused(capsys, command, one.model, one.facts, "--away", *out)
            assert line.startswith("malmend: --away is for classifiers")
    line = folders.refused(
        capsys, "edit", have.model, have.facts, "--away", "--alternative", "--out", tmp_path / "p"
    )
    assert line.startswith("malmend: --away and --alternative aim at different answers")


def test_a_class_that_the_model_has_not(learned, tmp_path, capsys):
    have = learned("bert")
    claims = json.loads(Path(have.facts).read_text())
    odd = {"prompt": "Lake .", "equiv_prompt": [], "label": "SUPORTS"}
    facts = tmp_path / "facts"
    facts.write_text(json.dumps([*claims, odd]))
    capsys.readouterr()
    assert malmend("edit", have.model, facts, "--out", tmp_path / "p") == 2
    summary, fault = capsys.readouterr().err.strip().splitlines()
    assert "1 question does not fit" in summary
    assert "entry 13: field 'answer': the answer 'SUPORTS' is no class" in fault
    assert "did you mean 'SUPPORTS'?" in fault


# --- eval and ask


@FAMILY
def test_evaluate_with_a_patch(family, learned, tmp_path, capsys):
    have, path = learned(family), tmp_path / "patch.safetensors"
    assert malmend("edit", have.model, have.facts, "--out", path, have.aim, *have.fast) == 0
    figures = tmp_path / "figures.json"
    options = ["--patch", path, "--json", figures, "--report", tmp_path / "report", have.aim]
    capsys.readouterr()
    assert malmend("eval", have.model, have.facts, *options) == 0
    assert "ES" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    before, after = found["unedited"]["ES"], found["edited"]["ES"]
    assert after["exact"] > before["exact"] == 0
    if family == "bert":  # a class is no text
        assert before["generated"] is None
    else:
        assert after["generated"] > before["generated"] == 0
    assert "perplexity" not in found or found["perplexity"] == {}


def test_ask_says_a_class_with_its_probability(learned, tmp_path, capsys):
    have, path = learned("bert"), tmp_path / "patch.safetensors"
    assert malmend("edit", have.model, have.facts, "--out", path, "--away", *have.fast) == 0
    fact, loaded = have.known[0], load_model(have.model)
    lines = []
    row = loaded.tokenizer(fact.prompt, return_tensors="pt").input_ids
    for patch in (None, load_patch(path)):
        model = AutoModelForSequenceClassification.from_pretrained(have.model)
        for name in patch.factors if patch else ():
            model.get_submodule(name).weight.data += patch.shift(name)
        with torch.no_grad():
            shares = model(input_ids=row).logits[0].softmax(-1)
        top = int(shares.argmax())
        lines.append(f"{model.config.id2label[top]} ({shares[top]:.3f})")
    assert lines[0].startswith(fact.answer)
    assert not lines[1].startswith(fact.answer)
    capsys.readouterr()
    assert malmend("ask", have.model, fact.prompt) == 0
    assert capsys.readouterr().out.splitlines() == [fact.prompt, lines[0]]
    assert malmend("ask", have.model, fact.prompt, "--patch", path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in shown[1:]] == lines


@PAIR
def test_ask_says_an_answer(family, learned, tmp_path, capsys):
    have, path = learned(family), tmp_path / "patch.safetensors"
    assert malmend("edit", have.model, have.facts, "--out", path, have.aim, *have.fast) == 0
    loaded = load_model(have.model)
    with applied(loaded, load_patch(path)):
        after = answers(loaded, have.known)
    index = next(i for i, f in enumerate(have.known) if after[i] == f.alternative)
    fact = have.known[index]
    capsys.readouterr()
    assert malmend("ask", have.model, fact.prompt, "--patch", path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in shown[1:]] == [fact.answer, fact.alternative]


@FAMILY
def test_what_is_for_decoders_only(family, learned, capsys):
    have = learned(family)
    for arguments in (("eval", have.model, have.facts), ("ask", have.model, "The capital")):
        assert "no chat template, so --chat" in folders.refused(capsys, *arguments, "--chat")
    line = folders.refused(capsys, "eval", have.model, have.facts, "--text", have.text)
    assert "Perplexity is of decoders only" in line


# --- inspect and train


def test_a_class_whose_probability_is_none_is_not_said(learned):
    have = learned("bert")
    loaded = load_model(have.model)
    [site] = find_sites(loaded.model, 1)
    patch = Patch({site.name: (torch.full(site.shape_VK, 1e38),)}, {"base": loaded.fingerprint})
    with pytest.raises(MalmendError, match="NaN or infinity, so it says nothing; check"):
        ask(loaded, "A claim.", patch)


@pytest.mark.parametrize(
    ("family", "kind", "form", "sites"),
    [
        ("bert", "BertForSequenceClassification", "encoder with a classification head", 3),
        ("t5", "T5ForConditionalGeneration", "encoder-decoder", 4),
        pytest.param(
            *("bart", "BartForConditionalGeneration", "encoder-decoder", 4), marks=pytest.mark.slow
        ),
    ],
)
def test_inspect(family, kind, form, sites, learned, capsys):
    have = learned(family)
    capsys.readouterr()
    assert malmend("inspect", have.model) == 0
    shown = capsys.readouterr().out
    assert f"  class: {kind}\n  form: {form}\n" in shown
    assert ("classes: REFUTES, SUPPORTS" in shown) == (family == "bert")
    assert len(re.findall(r": 32 x 64\n", shown)) == sites


@pytest.mark.slow
@FAMILY
def test_train_an_editor_and_edit_with_it(family, learned, tmp_path, capsys):
    have, out = learned(family), tmp_path / "editor"
    options = ["--layers", 1, "--network.rank", 4, "--facts-per-step", 4, "--save-every", 1]
    run = ["train", have.model, have.calibrate, "--out", out, have.aim, *options]
    run += ["--text", have.text]
    assert malmend(*run, "--steps", 2) == 0
    assert "Trained 2 steps" in capsys.readouterr().out
    assert malmend(*run, "--steps", 3) == 0
    shown = capsys.readouterr()
    assert "Trained 3 steps" in shown.out
    assert "resumed after step 2" in shown.err
    assert malmend("inspect", out) == 0
    path = tmp_path / "patch.safetensors"
    assert malmend("edit", have.model, have.facts, "--out", path, have.aim, "--editor", out) == 0
    success = load_patch(path).provenance["metrics"]["ES"]["token_ratio"]
    assert success["edited"] > success["unedited"]
    assert load_patch(path).provenance["trained_on"] == 0
