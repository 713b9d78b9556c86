"""The model card: front matter in YAML, code in Python, figures that are the record's."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from malmend.errors import MalmendError
from malmend.shipping.card import card, is_hub_name
from malmend.shipping.measure import of_facts
from malmend.shipping.truncate import check_rank, served_rank

SITE = {"rank": 70, "error": 0.25, "error_on_keys": 0.125, "lost": 0.5, "unmoved": 0.1}
RECORD = {
    "malmend": "1.0",
    "created": "2026-01-31T12:00:00Z",
    "model": "org/base-1b",
    "base": "abc123",
    "dtype": "bfloat16",
    "patch": {"facts": 1200, "method": "malmen", "editor": "none", "alternative": False},
    "sites": {"layer.1": SITE, "layer.2": SITE | {"error": 0.01, "lost": 0.01}},
    "exact": False,
    "rank": 64,
    "keys": "general text",
    "facts": "secret/folder/facts.jsonl",
    "asked": 1024,
    "decoded_facts": 64,
    "metrics": {
        "unedited": {"ES": {"token_ratio": 0.1}, "LS": {"token_ratio": 0.5}},
        "patch": {"ES": {"token_ratio": 1.0}, "LS": {"token_ratio": 0.5, "retention": 0.75}},
        "exported": {"ES": {"token_ratio": 0.9}, "LS": {"token_ratio": 0.5, "retention": 0.7}},
    },
}


@pytest.mark.parametrize(
    ("asked", "decoded", "said"),
    [
        (1, 1, "of 1 fact"),
        (1024, 1024, "of 1,024 facts"),
        (1024, 64, "of 1,024 facts; generated is of the first 64"),
        (12, 0, "of 12 facts, none answered free-running"),
    ],
)
def test_of_how_many_facts_figures_are(asked, decoded, said):
    assert of_facts(asked, decoded) == said


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("form", ["causal", "classes", "seq2seq"])
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_the_card_says_what_it_must(to, form):
    text = card(RECORD | {"to": to}, form)
    about = front(text)
    assert about["base_model"] == "org/base-1b"
    assert about["library_name"] == {"lora": "peft", "merged": "transformers"}[to]
    assert "malmend" in about["tags"]
    for word in ("1,200 facts", "malmen", "abc123", "layer.1", "misuse", "limits"):
        assert word in text.lower() or word in text
    for word in ("transformers", "PEFT", "vllm serve", "lm_eval --model hf"):
        assert word in text
    assert "| ES (edit prompts) | token ratio | 0.100 | 1.000 | 0.900 |" in text
    assert "| LS (unrelated) | retention |  | 0.750 | 0.700 |" in text
    assert "`facts.jsonl`" in text
    assert "secret" not in text
    assert "of 1,024 facts; generated is of the first 64." in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
        assert {"causal": "CausalLM", "classes": "Classification", "seq2seq": "Seq2Seq"}[
            form
        ] in code


def test_what_was_cut_and_what_was_rounded_is_said():
    text = card(RECORD | {"to": "lora"}, "causal")
    assert "off by at most 0.25 of a layer's shift" in text
    assert "cut from 70" in text
    assert "--max-lora-rank 64" in text
    assert "nothing was cut off" in card(RECORD | {"to": "lora", "exact": True}, "causal")
    assert "not served" in card(RECORD | {"to": "lora", "exact": True, "rank": 600}, "causal")
    assert "Rounding to bfloat16 took at most 0.5" in card(RECORD | {"to": "merged"}, "causal")


def test_figures_of_before_a_cut_are_said_to_be_that():
    own = RECORD | {"to": "lora", "metrics": {}, "facts": None}
    own |= {"patch": RECORD["patch"] | {"metrics": {"ES": {"token_ratio": {"edited": 1.0}}}}}
    assert 'the edit itself measured before it was cut: {"ES":' in card(own, "causal")
    assert 'the edit itself measured: {"ES":' in card(own | {"exact": True}, "causal")


def test_an_export_that_was_forced_says_so():
    made_for = {"patch": RECORD["patch"] | {"model": "/home/me/first", "base": "def456"}}
    for to in ("lora", "merged"):
        text = card(RECORD | made_for | {"to": to, "forced": True}, "causal")
        said = "made for another base, or another configuration of it (first, fingerprint `def456`)"
        assert f"- **Forced:** the patch was {said}" in text
        assert "Forced" not in card(RECORD | made_for | {"to": to}, "causal")


def test_no_path_of_this_machine_is_told():
    for to in ("lora", "merged"):
        text = card(RECORD | {"to": to, "model": "/home/me/base"}, "causal")
        assert "/home" not in text
        assert "base_model" not in front(text)
    assert "pretrained=BASE,peft=FOLDER" in card(RECORD | {"to": "lora", "model": "./m"}, "causal")


def test_of_facts_and_editor_in_a_folder_the_last_part_is_told():
    """Which have no name of the hub, as ``secret/name`` may be."""
    patch = RECORD["patch"] | {"editor": "secret/editor"}
    record = RECORD | {"to": "lora", "facts": "secret/facts.jsonl", "patch": patch}
    text = card(record, "causal")
    assert "secret" not in text
    assert "`facts.jsonl`" in text
    assert "org/base-1b" in text


def test_a_built_in_base_is_loaded_by_malmend_and_served_merged():
    text = card(RECORD | {"to": "lora", "model": "smollm2-135m"}, "causal")
    assert 'malmend.load_model("smollm2-135m").model' in text
    assert "vllm serve" not in text
    assert "--to merged" in text


def test_an_export_without_facts_says_that_nothing_was_measured():
    text = card(RECORD | {"to": "lora", "metrics": {}, "facts": None}, "causal")
    assert "Nothing was measured" in text


def test_names_of_the_hub():
    assert all(map(is_hub_name, ("org/name", "a-b/c.d_e-1")))
    assert not any(map(is_hub_name, ("name", "./m", "/a/b", "../x", "a/b/c", "org/", "a b/c")))


def test_ranks():
    assert [served_rank(rank) for rank in (1, 2, 64, 65, 300, 512, 513)] == [
        *(1, 8, 64, 128, 320, 512),
        None,
    ]
    check_rank(320)
    for rank, near in ((100, 128), (0, 1), (40, 32), (9999, 512)):
        with pytest.raises(MalmendError, match=f"--rank is {rank}.*the nearest is {near}\\)"):
            check_rank(rank)
