"""Faults that a reading of the whole change found, each by the input that shows it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import forms_folders as folders
import forms_support as forms
from command_support import malmend
from malmend.commands.evaluate import evaluate
from malmend.evaluation.page import write_page
from malmend.models.sites import find_sites


def claims(path, labels):
    rows = [
        {"prompt": f"Lake {place} lies in", "label": label, "equiv_prompt": ["is in", "has the"]}
        for place, label in zip(folders.PLACES, labels, strict=False)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def bert(tmp_path, own_cache):
    return folders.save_base("bert", tmp_path / "bert")


LEARN = ["--validation", 0, "--epochs", 1]


def test_a_misspelt_label_is_seen_before_it_becomes_a_class(bert, tmp_path, capsys):
    facts = claims(tmp_path / "claims.json", ["SUPPORTS", "REFUTES"] * 4)
    assert malmend("finetune", bert, facts, "--out", tmp_path / "one", *LEARN) == 0
    assert "Classes: REFUTES (4), SUPPORTS (4)." in capsys.readouterr().err
    # And where the model knows its classes, the label is refused, with line and field.
    worse = claims(tmp_path / "worse.json", ["SUPPORTS", "REFUTES", "SUPORTS"] * 2)
    assert malmend("finetune", tmp_path / "one", worse, "--out", tmp_path / "two", *LEARN) == 2
    said = capsys.readouterr().err
    assert f"{worse}:1: entry 3: field 'answer': the answer 'SUPORTS' is no class" in said
    assert said.count("entry 3: field 'paraphrases'") == 1  # not once per paraphrase
    assert not (tmp_path / "two").exists()  # nothing is left of what was refused
    # Labels are told by what they say: not by case, where the model has classes.
    lower = claims(tmp_path / "lower.json", ["supports", "refutes", " Supports"] * 2)
    assert malmend("finetune", tmp_path / "one", lower, "--out", tmp_path / "two", *LEARN) == 0
    assert "Classes: REFUTES (2), SUPPORTS (4)." in capsys.readouterr().err


def test_a_blank_beside_a_label_makes_no_class_of_its_own(bert, tmp_path, capsys):
    facts = claims(tmp_path / "claims.json", ["SUPPORTS", "REFUTES", "SUPPORTS ", "REFUTES"])
    assert malmend("finetune", bert, facts, "--out", tmp_path / "one", *LEARN) == 0
    assert "Classes: REFUTES (2), SUPPORTS (2)." in capsys.readouterr().err


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_an_encoder_that_hardly_tells_prompts_apart_is_still_one(spread):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**forms._BERT)).double().eval()
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.copy_(words.mean(0) + spread * (words - words.mean(0)))
    assert len(find_sites(model.requires_grad_(False), 1)) == 1


def test_the_page_of_a_classifier_asks_for_no_text(bert, tmp_path):
    facts = claims(tmp_path / "claims.json", ["SUPPORTS", "REFUTES"] * 4)
    assert malmend("finetune", bert, facts, "--out", tmp_path / "model", *LEARN) == 0
    report = evaluate(str(tmp_path / "model"), facts, away=True)
    write_page(report, tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Perplexity was not measured" not in page
    assert "what the unedited model does not say" in page
