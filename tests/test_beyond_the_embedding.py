"""A tokenizer with more tokens than the model has embeddings for: what uses one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import command_support
import helpers
import malmend
from command_support import CALIBRATION
from malmend.errors import MalmendError
from malmend.ledgers.watch import StopRule
from malmend.models.load import LoadedModel, load_model

tiny = command_support.tiny
cache = command_support.cache

SAID = "'<new>' is the tokenizer's token number 320, and the model has embeddings for 320 tokens"


@pytest.fixture
def grown(tmp_path: Path) -> str:
    """The tiny model, whose tokenizer has got a token that the model has not."""
    folder = command_support.save_model(tmp_path / "grown")
    tokenizer = helpers.byte_level()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["by name", "loaded"])
def model(request: pytest.FixtureRequest, grown: str) -> str | LoadedModel:
    return grown if request.param == "by name" else load_model(grown)


@pytest.fixture
def odd(tmp_path: Path) -> str:
    """Facts of which the second asks with that token."""
    rows = [{"prompt": f"The capital of {name} is", "answer": "Lima"} for name in ("Peru", "<new>")]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "odd.jsonl")


def test_facts_are_refused_by_line(tiny, cache, model, odd, tmp_path):
    own = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    ledger = tmp_path / "ledger"
    malmend.ledger.init(ledger, tiny.loaded, rule=StopRule(questions=0), **own)
    with pytest.raises(MalmendError, match=rf"odd\.jsonl:2: field 'prompt': .*{SAID}"):
        malmend.edit(model, odd, **own)
    with pytest.raises(MalmendError, match=rf"odd\.jsonl:2: field 'prompt': .*{SAID}"):
        malmend.eval(model, odd)
    with pytest.raises(MalmendError, match=rf"odd\.jsonl:2: field 'prompt': .*{SAID}"):
        malmend.ledger.add(ledger, odd, model=model)


def test_a_question_is_refused(model):
    with pytest.raises(MalmendError, match=SAID):
        malmend.ask(model, "The capital of <new> is")


def test_a_token_that_is_never_used_is_none_of_our_business(tiny, model):
    prompt = "The capital of Peru is"
    asked = malmend.ask(model, prompt, max_new_tokens=4)
    assert asked.unedited == malmend.ask(tiny.loaded, prompt, max_new_tokens=4).unedited
