"""Encoders and encoder-decoders where something is out of the ordinary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import forms_folders as folders
import forms_support as forms
import helpers
from command_support import as_lines, malmend
from malmend.commands.edit import edit
from malmend.commands.finetune import finetune
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.refine import CHAT, RefineSettings, framed
from malmend.editors.settings import training_free
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, Reading
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.load import load_model, prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk

SMALL = CalibrationSettings(moment_facts=12, prior_facts=12, search_facts=8, text_tokens=300)


pytestmark = pytest.mark.usefixtures("own_cache")


# --- what is no model of these forms


@pytest.mark.parametrize("kind", ["bare encoder", "ViT", "ViT with a tokenizer"])
def test_a_model_of_no_form_is_one_sentence(kind, tmp_path, capsys):
    model, facts = tmp_path / "model", folders.save_facts("bart", tmp_path / "facts")
    if kind == "bare encoder":
        folders.save_base("bert", model)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = ViTConfig(num_attention_heads=2, **sizes)
        ViTForImageClassification(config).save_pretrained(model)
    if kind == "ViT with a tokenizer":
        folders.tokenizer_of("bart").save_pretrained(model)
    bare = kind == "bare encoder"
    kinds = "a decoder, an encoder with a classification head, or an encoder-decoder"
    line = folders.refused(capsys, "inspect", model)
    assert ("turns a text into numbers and gives no answers" if bare else kinds) in line
    assert ("malmend finetune" in line) == bare
    for arguments in (("ask", model, "The capital"), ("eval", model, facts)):
        assert folders.refused(capsys, *arguments).startswith("malmend: The")
    for command in ("edit", "train"):  # which spoke of a tokenizer without an end token
        line = folders.refused(capsys, command, model, facts, "--out", tmp_path / "out")
        assert ("gives no answers" in line) == bare
    assert not (tmp_path / "out").is_file()


# --- numbers


def test_answers_of_more_tokens_than_their_prompts_lose_nothing(tmp_path):
    """The bound of a shift's rank is of the site that sees the most tokens, not of the first."""
    known = [f"w{index}" for index in range(56)]
    model = forms.model_of("t5", torch.float32, decoder_start_token_id=3)
    loaded = prepared(model, helpers.words(known, "$A </s>"))
    fact = Fact("f", "w1", "w2 w3 w4 w5 w6 w7", paraphrases=("w8", "w9"))
    others = [replace(fact, id=f"{i}", prompt=f"w{i}", answer=f"w{i} w7") for i in range(10, 14)]
    settings = replace(training_free(), eta=1.0, layers=1, prior="identity")
    (tmp_path / "text").write_text("w1 w2 w3\nw4 w5 w6\n")
    (tmp_path / "others").write_text(as_lines(others))
    more = {"calibrate": tmp_path / "others", "text": tmp_path / "text", "calibration": SMALL}
    done = edit(loaded, [fact], settings=settings, refine=RefineSettings(passes=1), **more)
    encoder = Encoder(loaded.tokenizer, reading=loaded.reading)
    (question,) = encoder.encode_all([fact.question])
    assert len(question.read) < len(question.labels)
    ranks = {
        name: torch.linalg.matrix_rank(done.patch.shift(name).double(), rtol=1e-4).item()
        for name in done.patch.factors
    }
    assert sorted(ranks.values()) == [len(question.read), len(question.labels)]


@pytest.mark.parametrize("family", forms.FAMILIES)
def test_a_gradient_that_is_zero_moves_nothing(family):
    """Behind a second layer of zeros no move of the first is of any use."""
    model, asked = forms.model_of(family, torch.float32), forms.questions(family)
    sites = find_sites(model, 1, None, "first")
    for site in find_sites(model, 1):
        site.weight.data.zero_()
    for pair in capture(Trunk(model, sites), asked, "answer", Descent(4)):
        assert pair.keys_NK.isfinite().all()
        assert (pair.value_grads_NV == 0).all()


# --- frames, classes and the project's own material


@pytest.mark.parametrize(
    ("reading", "answer"),
    [(Reading("classes", ("no", "yes")), "yes"), (Reading("seq2seq", start=3), "w2")],
)
def test_the_chat_frame_is_read_as_the_model_reads(reading, answer):
    template = "{% for turn in messages %}w0 {{ turn['content'] }} w9{% endfor %}"
    tokenizer = helpers.words(["w0", "w1", "w2", "w9"], "$A </s>", chat_template=template)
    encoder = Encoder(tokenizer, reading=reading)
    (found,) = framed(encoder, [Question("w1", answer)], CHAT)
    assert isinstance(found, Encoded)
    plain = encoder.encode(Question("w0 w1 w9", answer))
    assert found == plain


def claims(path: Path, **fields: object) -> Path:
    """The claims of a file, each with other fields."""
    known = json.loads(path.read_text())
    path.write_text(json.dumps([claim | fields for claim in known]))
    return path


def test_a_classifier_of_three_classes_trains_on_what_it_says_already(tmp_path, capsys):
    """Nobody has asked for --away; only the calibration aims away, at any other class."""
    model = folders.save_base("bert", tmp_path / "m", classes=("OPEN", "SUPPORTS", "REFUTES"))
    facts = tmp_path / "facts"
    folders.save_facts("bert", facts)
    for label in ("OPEN", "SUPPORTS", "REFUTES"):
        claims(facts, label=label, alt=None)
        options = ["--layers", 1, "--network.rank", 3, "--facts-per-step", 4, "--steps", 1]
        out = ["--out", tmp_path / label, "--text", folders.save_text(tmp_path / "text")]
        assert malmend("train", model, facts, *out, *options) == 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_classifier_is_calibrated_on_statements_of_the_projects_own(count, tmp_path):
    names = ("SUPPORTS", "REFUTES", "OPEN")[:count]
    facts = tmp_path / "facts"
    folders.save_facts("bert", facts)
    labelled = [
        claim | {"label": names[index % count], "alt": names[(index + 1) % count]}
        for index, claim in enumerate(json.loads(facts.read_text()))
    ]
    facts.write_text(json.dumps(labelled))
    base = folders.save_base("bert", tmp_path / "base")
    model = finetune(base, facts, tmp_path / "model", folders.learning("bert")).folder
    loaded = load_model(str(model))
    assert len(loaded.reading.classes) == count
    done = edit(loaded, facts, away=True, calibration=SMALL)
    assert done.unedited == 0
    assert done.edited > 0.5


def test_a_tokenizer_that_can_say_none_of_the_projects_facts(tmp_path, capsys):
    model = folders.save_base("t5", tmp_path / "model")
    facts = folders.save_facts("t5", tmp_path / "facts")
    line = folders.refused(capsys, "edit", model, facts, "--out", tmp_path / "p")
    assert "can say none of the project's calibration facts" in line
    assert "--calibrate FACTS" in line
