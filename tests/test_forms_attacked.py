"""Faults that an attack on the three forms found, each by the input that shows it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import forms_folders as folders
import tiny
from command_support import malmend
from malmend.commands.finetune import finetune
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.calibration_file import calibration_key
from malmend.editors.settings import EditorSettings
from malmend.errors import MalmendError, ModelError
from malmend.evaluation.generate import generate
from malmend.facts.fact import Fact, Question
from malmend.models.finetune import FinetuneSettings
from malmend.models.load import load_model, prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.workbench import encoder_for

ONE = FinetuneSettings(batch=4, epochs=2, validation=0)


pytestmark = pytest.mark.usefixtures("own_cache")


def stop(record) -> None:
    raise KeyboardInterrupt


def claims(path, labels, alternatives=()):
    rows = [
        {"prompt": f"Lake {place} lies in", "label": label, "equiv_prompt": ["has the"]}
        for place, label in zip(folders.PLACES, labels, strict=False)
    ]
    for row, other in zip(rows, alternatives, strict=False):
        row["alt"] = other
    path.write_text(json.dumps(rows))
    return str(path)


# --- going on with a fine-tuning of something else


def test_finetune_does_not_go_on_with_another_end_of_answer(tmp_path):
    model = folders.save_base("t5", tmp_path / "t5")
    facts = folders.save_facts("t5", tmp_path / "facts")
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ONE, stepped=stop)
    with pytest.raises(MalmendError, match="is of other data"):
        finetune(model, facts, tmp_path / "out", ONE, end_of_answer="none")


@pytest.mark.parametrize("others", [["MAYBE"] * 8, ["REFUTES"] * 8])
def test_finetune_does_not_go_on_with_other_classes(others, tmp_path):
    model, labels = folders.save_base("bert", tmp_path / "bert"), ["SUPPORTS", "REFUTES"] * 4
    facts = claims(tmp_path / "one.json", labels, ["NOT ENOUGH INFO"] * 8)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ONE, stepped=stop)
    renamed = claims(tmp_path / "two.json", labels, others)
    with pytest.raises(MalmendError, match="is of other data"):
        finetune(model, renamed, tmp_path / "out", ONE)


# --- classes


def test_classes_that_differ_in_case_alone_are_refused(tmp_path, capsys):
    model = folders.save_base("bert", tmp_path / "bert")
    facts = claims(tmp_path / "claims.json", ["SUPPORTS", "Supports"] * 4)
    with pytest.raises(ModelError, match="'SUPPORTS' and 'Supports' differ in case, spacing"):
        finetune(model, facts, tmp_path / "out", ONE)
    named = folders.save_base("bert", tmp_path / "named", classes=("yes", "YES"))
    said = folders.refused(capsys, "inspect", named)
    assert "'yes' and 'YES' differ in case, spacing or encoding alone" in said


def test_facts_of_one_class_are_named_and_not_the_model(tmp_path):
    model = folders.save_base("bert", tmp_path / "bert")
    facts = claims(tmp_path / "claims.json", ["SUPPORTS"] * 4)
    with pytest.raises(ModelError, match=r"The facts name 1 class \('SUPPORTS'\), expected two"):
        finetune(model, facts, tmp_path / "out", ONE)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [({0: 0, 1: 1}, ("0", "1")), ({1: "a", 2: "b"}, ("0", "a")), ({0: "", 1: "b"}, ("0", "b"))],
)
def test_odd_names_of_classes(labels, classes, tmp_path):
    folder = folders.save_base("bert", tmp_path / "bert", classes=("a", "b"))
    path = tmp_path / "bert" / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {str(index): name for index, name in labels.items()}
    path.write_text(json.dumps(config))
    assert load_model(folder).reading.classes == classes
    assert malmend("ask", folder, "Lake Ka") == 0


def test_a_decoder_with_a_head_and_no_padding_is_told_for_what_it_is():
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, num_labels=2)
    model = GPT2ForSequenceClassification(config).eval()
    with pytest.raises(ModelError, match="reads from left to right"):
        find_sites(model, 1)


# --- positions


def test_roberta_counts_positions_from_behind_its_padding(tmp_path):
    tokenizer = folders.tokenizer_of("bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 3}
    config = RobertaConfig(vocab_size=len(tokenizer), **sizes)
    model = RobertaForSequenceClassification(config).eval()
    loaded = prepared(model, tokenizer)
    assert loaded.positions == 16
    encoder = encoder_for(loaded)
    longest = Question(" ".join(["Lake"] * 14))  # and the two marks about it
    assert len(encoder.encode(longest).ids) == 16
    Trunk(model, find_sites(model, 1)).unedited_states([encoder.encode(longest)])
    with pytest.raises(MalmendError, match="17 tokens, expected at most 16"):
        encoder.encode(Question(longest.prompt + " Lake"))


@pytest.fixture
def bart(tmp_path):
    """A BART that never ends by itself, with the settings of its kind."""
    folder = folders.save_base("bart", tmp_path / "bart")
    loaded = load_model(folder)
    config = BartConfig.from_pretrained(folder, forced_eos_token_id=2)
    torch.manual_seed(1)
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.final_logits_bias[0, 2] = -1e4
    return prepared(model, loaded.tokenizer, "bart")


def test_an_encoder_decoder_answers_as_far_as_its_positions_go(bart):
    encoder = encoder_for(bart)
    (answer,) = generate(bart, encoder, ["The capital of"], 500, whole=True)
    assert answer.cut
    assert len(answer.text.split()) == 40 - len(encoder.prefix)


def test_an_end_that_is_forced_at_the_limit_hides_no_cut(bart):
    encoder = encoder_for(bart)
    (four,) = generate(bart, encoder, ["The capital of"], 4)
    (eight,) = generate(bart, encoder, ["The capital of"], 8)
    assert four.cut
    assert len(four.text.split()) == 4
    assert eight.text.split()[:4] == four.text.split()


# --- what is kept


def test_a_calibration_is_kept_by_the_kind_of_each_question():
    other = (Question("Lake Ora lies in", "Peru"),)
    one, two = Fact("a", "p", "b", unrelated=other), Fact("a", "p", "b", neighbours=other)
    model = tiny.model_of("llama")
    trunk = Trunk(model, find_sites(model, 1))
    keys = [
        calibration_key("", "", trunk, EditorSettings(), CalibrationSettings(), [fact], "")
        for fact in (one, two)
    ]
    assert keys[0] != keys[1]


def test_a_seed_of_many_digits_is_refused():
    with pytest.raises(MalmendError, match=r"seed is 1.* change --seed"):
        FinetuneSettings(seed=10**25)


def test_what_auto_stands_for_is_said(tmp_path, capsys):
    model = folders.save_base("bert", tmp_path / "bert", classes=folders.CLASSES)
    facts = folders.save_facts("bert", tmp_path / "facts")
    train = ["train", model, facts, "--away", "--steps", 1, "--facts-per-step", 4]
    train += ["--network.rank", 4, "--layers", 1, "--eta", 1, "--out", tmp_path / "e"]
    assert malmend(*train, "--calibrate", facts, "--text", folders.save_text(tmp_path / "t")) == 0
    assert json.loads((tmp_path / "e" / "editor.json").read_text())["settings"]["tokens"] == "all"
    patch = tmp_path / "patch.safetensors"
    assert malmend("edit", model, facts, "--away", "--editor", tmp_path / "e", "--out", patch) == 0
    capsys.readouterr()
    assert malmend("inspect", patch) == 0
    shown = capsys.readouterr().out
    assert "tokens: all" in shown
    assert "away: True" in shown


def test_inspect_refuses_what_an_edit_would(tmp_path, capsys):
    """XLNet's blocks hand two streams on, which cannot be cut."""
    tokenizer = folders.tokenizer_of("bert")
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "num_labels": 2}
    torch.manual_seed(0)
    XLNetForSequenceClassification(XLNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "xlnet"
    )
    tokenizer.save_pretrained(tmp_path / "xlnet")
    said = folders.refused(capsys, "inspect", tmp_path / "xlnet")
    assert "XLNetForSequenceClassification" in said
    assert "cannot be edited" in said
