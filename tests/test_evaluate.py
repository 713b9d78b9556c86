"""Whole evaluations of a tiny model: what is asked, of which text, and what is warned of."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import command_support
import helpers
import malmend
from command_support import CALIBRATION, EAGER, Tiny, as_lines, make_facts, make_model
from malmend.cli import main
from malmend.editors.keymoments import first_of, lines_of
from malmend.editors.settings import training_free
from malmend.errors import FactsError, MalmendError, ModelError
from malmend.evaluation import perplexity as perplexity_module
from malmend.facts.fact import Question
from malmend.facts.readers import read_text
from malmend.facts.tokens import Encoder
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.workbench import shipped

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(3)
LAST = replace(training_free(), layers=1)


def own(tiny: Tiny) -> dict:
    return {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}


def eager(tiny: Tiny) -> dict:
    return own(tiny) | {"calibration": EAGER}


def test_what_an_evaluation_holds(tiny, tmp_path):
    patch = malmend.edit(tiny.loaded, tiny.facts, **own(tiny)).patch
    report = malmend.eval(tiny.loaded, tiny.facts, patch, decode_facts=2, text=tiny.text)
    report.save(tmp_path / "report.json")
    shown = json.loads((tmp_path / "report.json").read_text())
    assert shown["facts"] == 12
    assert set(shown["perplexity"]) == {"unedited", "edited"}
    assert shown["perplexity"]["unedited"] != shown["perplexity"]["edited"]
    assert shown["about"]["decoded_facts"] == 2
    assert shown["about"]["patch"]["base"] == shown["about"]["base"]
    for model in ("unedited", "edited"):
        for kind in ("ES", "GS", "LS"):
            assert shown[model][kind].pop("questions") > 0
            shown[model][kind].pop("kept", None)  # a random model is seldom right
            for name, value in shown[model][kind].items():
                assert math.isfinite(value)
                assert 0 <= value <= 1 or name == "kl", (model, kind, name)
        for kind in ("NS", "RS"):
            metrics = shown[model][kind]
            assert metrics.pop("questions") == 0
            assert set(metrics.values()) == {None}
    assert shown["edited"]["LS"]["kl"] > 0
    assert "generated_chat" not in shown["edited"]["ES"]  # this model has no template
    spoken = [sum("generated" in one for one in row["edited"]) for row in shown["rows"]]
    assert spoken == [3, 3, *[0] * 10]  # a prompt and two paraphrases each


def test_neighbours_reversed_prompts_and_groups_reach_the_report(tiny):
    pairs = zip(make_facts(4), ("capital", "capital", "river", None), strict=True)
    facts = [
        replace(
            fact,
            relation=relation,
            subject=fact.prompt.split()[3],
            neighbours=fact.unrelated,
            unrelated=(),
            reversed=Question(f"{fact.answer} is the capital of", "Mars"),
        )
        for fact, relation in pairs
    ]
    done = malmend.edit(tiny.loaded, facts, settings=LAST, **eager(tiny))
    report = malmend.eval(tiny.loaded, facts, done.patch)
    asked = {kind: one.questions for kind, one in report.edited.items()}
    assert asked == {"ES": 4, "GS": 8, "NS": 6, "LS": 0, "RS": 4}
    assert report.edited["NS"].kl > 0
    assert report.edited["RS"].generated is not None
    assert [row.subject for row in report.rows] == [fact.subject for fact in facts]
    lengths = [len(tiny.loaded.tokenizer(f" {fact.answer}")["input_ids"]) for fact in facts]
    assert [row.answer_tokens for row in report.rows] == lengths
    sizes = {name: group.facts for name, group in report.groups["relation"].items()}
    assert sizes == {"capital": 2, "river": 1}
    some = malmend.eval(tiny.loaded, facts[:2], done.patch)
    capital = report.groups["relation"]["capital"]
    assert (capital.unedited, capital.edited) == (some.unedited, some.edited)


def test_generated_is_asked_through_the_chat_template_too(tiny):
    tokenizer = helpers.byte_level(chat_template="<|user|>{{ messages[0]['content'] }}<|reply|>")
    loaded = prepared(make_model(tokenizer, layers=2), tokenizer)
    prompt = FEW[0].prompt
    said = malmend.ask(loaded, prompt, chat=True, max_new_tokens=4).unedited
    facts = [replace(FEW[0], answer=said.split("\n")[0].strip() or "Kalo"), *FEW[1:]]
    report = malmend.eval(loaded, facts, decode_facts=2)
    rows = [row.unedited[0] for row in report.rows]
    assert [row.generated is None for row in rows] == [False, False, True]
    assert [row.generated_chat is None for row in rows] == [False, False, True]
    chat = malmend.eval(loaded, facts, decode_facts=2, chat=True)
    assert [one.text for one in (row.unedited[0] for row in chat.rows)][:2] == [
        row.text_chat for row in rows
    ][:2]
    assert chat.unedited["ES"].generated_chat is None
    assert chat.unedited["ES"].generated == report.unedited["ES"].generated_chat


def test_a_prompt_that_only_the_template_makes_too_long_is_refused(tiny):
    template = "<|user|>" * 50 + "{{ messages[0]['content'] }}"
    tokenizer = helpers.byte_level(chat_template=template, model_max_length=60)
    loaded = prepared(make_model(tokenizer, layers=2), tokenizer)
    with pytest.raises(FactsError, match=r"too long for this model's chat template") as caught:
        malmend.eval(loaded, FEW)
    fault = caught.value.faults[0]
    assert fault.startswith(f"fact {FEW[0].id!r}: the prompt ")
    assert "tokens in the chat template, expected less than 60" in fault
    assert malmend.eval(loaded, FEW, decode_facts=0).facts == 3


def test_a_chat_prompt_must_leave_room_for_an_answer(tiny):
    """One of exactly as many tokens as are read at most leaves none."""
    template = "<|user|>" * 50 + "{{ messages[0]['content'] }}"
    prompts = [one.prompt for fact in FEW for one in (fact.question, *fact.equivalents)]

    def answered(longest: int) -> malmend.Report:
        tokenizer = helpers.byte_level(chat_template=template, model_max_length=longest)
        loaded = prepared(make_model(tokenizer, layers=2), tokenizer)
        return malmend.eval(loaded, FEW, decode_facts=64)

    chat = Encoder(helpers.byte_level(chat_template=template), chat=True)
    longest = max(len(chat.prompt_ids(prompt)) for prompt in prompts)
    with pytest.raises(FactsError) as caught:
        answered(longest)
    assert f"has {longest} tokens in the chat template" in caught.value.faults[0]
    report = answered(longest + 1)
    assert report.unedited["ES"].generated_chat is not None
    assert report.about["decoded_facts"] == len(FEW)  # there are no more


def test_perplexity_is_that_of_the_model_alone_too(tiny):
    alone = malmend.eval(tiny.loaded, FEW, decode_facts=0, text=tiny.text)
    patch = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    both = malmend.eval(tiny.loaded, FEW, patch, decode_facts=0, text=tiny.text)
    assert alone.perplexity == {"unedited": both.perplexity["unedited"]}
    assert alone.edited == {}


def test_an_unedited_mixture_of_experts_needs_no_layer_that_could_be_edited(tmp_path, capsys):
    # "Block model.layers.0 ends in ..., choose layers by name with --sites", which eval has not.
    tokenizer, facts = helpers.byte_level(), tmp_path / "facts.jsonl"
    model = helpers.mixture(tokenizer)
    with pytest.raises(ModelError, match="--sites"):
        find_sites(model)
    model.save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    facts.write_text(as_lines(FEW))
    assert main(["eval", str(tmp_path / "mixture"), str(facts), "--text", "none"]) == 0
    assert "token ratio" in capsys.readouterr().out
    report = malmend.eval(str(tmp_path / "mixture"), FEW, decode_facts=0)
    asked = Encoder(tokenizer).encode_all(fact.question for fact in FEW)
    for row, one in zip(report.rows, asked, strict=True):
        with torch.no_grad():
            said_T = model(torch.tensor([one.ids])).logits[0].argmax(-1)
        wanted = said_T[one.answer_start - 1 : one.answer_end - 1].tolist()
        assert row.unedited[0].predicted == tuple(wanted)


def test_a_text_of_one_token_has_no_perplexity(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(MalmendError, match="two tokens"):
        malmend.eval(tiny.loaded, FEW, decode_facts=0, text=tmp_path / "text.txt")


def test_decoding_fewer_than_no_facts_is_refused(tiny):
    with pytest.raises(MalmendError, match="decode_facts is -1"):
        malmend.eval(tiny.loaded, FEW, decode_facts=-1)


def test_without_a_text_perplexity_is_of_lines_that_the_prior_has_not_read(tiny):
    patch = malmend.edit(tiny.loaded, FEW, settings=LAST, **own(tiny)).patch
    found = malmend.eval(tiny.loaded, FEW, patch, decode_facts=0)
    assert set(found.perplexity) == {"unedited", "edited"}
    assert found.about["text"].startswith("malmend's own text, lines ")
    assert found.about["text"].endswith("which the prior has not read")
    given = malmend.eval(tiny.loaded, FEW, decode_facts=0, text=tiny.text)
    assert given.about["text"] == tiny.text
    assert given.perplexity["unedited"] != found.perplexity["unedited"]


@pytest.mark.parametrize("said", [{"text_tokens": 60_000}, {"settings": {"text_tokens": 60_000}}])
def test_a_prior_that_has_read_more_is_measured_on_what_follows(said, tiny):
    """Of lines that it had read the report claimed that it had not."""
    made = malmend.edit(tiny.loaded, FEW, settings=LAST, **own(tiny) | {"text": None}).patch
    assert made.provenance["text_tokens"] == CALIBRATION.text_tokens
    more = malmend.Patch(made.factors, made.provenance | said)
    first = []
    for patch in (made, more):
        about = malmend.eval(tiny.loaded, FEW, patch, decode_facts=0).about["text"]
        first.append(int(re.search(r"lines ([\d,]+) to", about)[1].replace(",", "")))
    text = read_text(shipped("text.txt"))
    passages = [Encoder(tiny.loaded.tokenizer).passage(line) for line in lines_of(text)]
    assert first[0] == len(first_of(passages, 16_000)) + 1 < first[1]
    assert first[1] == len(first_of(passages, 60_000)) + 1


def test_of_a_long_text_it_is_said_that_only_its_first_tokens_are_read(tiny, monkeypatch):
    tokens = len(tiny.loaded.tokenizer(Path(tiny.text).read_text())["input_ids"])
    monkeypatch.setattr(perplexity_module, "MOST_READ", tokens - 1)
    found = malmend.eval(tiny.loaded, FEW, decode_facts=0, text=tiny.text)
    assert found.about["text"] == (f"{tiny.text}, its first {tokens - 1:,} of {tokens:,} tokens")
    monkeypatch.setattr(perplexity_module, "MOST_READ", tokens)
    found = malmend.eval(tiny.loaded, FEW, decode_facts=0, text=tiny.text)
    assert found.about["text"] == tiny.text


def test_perplexity_may_be_left_out(tiny):
    found = malmend.eval(tiny.loaded, FEW, decode_facts=0, text="none")
    assert (found.perplexity, found.about["text"]) == ({}, "none")


def test_questions_that_are_edited_too_are_warned_of(tiny):
    assert malmend.eval(tiny.loaded, FEW, decode_facts=0, text="none").leaks == []
    leaking = replace(FEW[0], neighbours=(Question(FEW[1].prompt, "Lima"),))
    found = malmend.eval(tiny.loaded, [leaking, *FEW[1:]], decode_facts=0, text="none")
    (leak,) = found.leaks
    assert f"is the edit prompt of fact '{FEW[1].id}'" in leak
    assert found.to_json()["leaks"] == [leak]


def test_other_facts_than_the_patchs_are_told_and_no_error(tiny):
    patch = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    said = "The patch was made of 3 facts, which are not the first that are asked now"

    def lines(facts, patch=patch) -> list[str]:
        told: list[str] = []
        malmend.eval(tiny.loaded, facts, patch, decode_facts=0, text="none", told=told.append)
        return told

    others = [replace(fact, id=f"other {fact.id}") for fact in make_facts(3, seed=9)]
    assert [line[: len(said)] for line in lines(others)] == [said]
    assert [line[: len(said)] for line in lines([*others, *FEW])] == [said]
    assert lines([*FEW, *others]) == []
    assert lines(FEW[1:]) == []  # of which nothing is known
    assert lines(others, malmend.Patch(patch.factors, {"base": patch.base})) == []
