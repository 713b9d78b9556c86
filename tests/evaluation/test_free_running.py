"""Free-running answers of an examiner, plain and through a chat template."""

from __future__ import annotations

from dataclasses import replace

import pytest
from asked_support import CHAT, END, WORDS, examiner, facts, ids_of, logits_at, model, patch

import helpers
from command_support import greedy, make_model, teach
from malmend.evaluation import examiner as examiner_module
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.generate import Answer, generate
from malmend.evaluation.matching import matches
from malmend.evaluation.protocols import scores
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import applied


@pytest.mark.slow
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("end", ["eos", "newline", "none"])
def test_generated_is_what_full_greedy_decoding_of_every_prompt_gives(end, edited):
    loaded = model()
    with applied(loaded, patch(0.1 if edited else 0.0)):
        replies = examiner(end).examine(facts())
        asked = [row for row in replies.rows if row.kind in ("ES", "GS", "RS")]
        flags = []
        for row in asked:
            limit = 8 + 3 * len(ids_of(row.question.answer))
            full = greedy(loaded, ids_of(row.question.prompt), {END}, limit)
            assert row.generated == float(matches(full, row.question.answer)), (row, full)
            flags.append(row.generated)
            if row.generated:
                assert matches(row.text, full)
            longer = greedy(loaded, ids_of(row.question.prompt), {END}, limit + 1)
            # One that is given up at its last word could not be known to end there.
            assert row.cut or row.text == full == longer, (row, full)
    assert {row.cut for row in asked} == {False, True}
    assert 2 <= sum(flags) < len(flags)
    inexact = [row for row in asked if row.generated and not row.exact]
    assert edited or inexact  # matches that only normalisation finds
    held = [row for row in replies.rows if row.kind in ("NS", "LS")]
    assert all(row.generated is None and row.text is None for row in held)


def test_a_free_running_answer_does_not_depend_on_its_company():
    """Its token limit is its own: 8 beyond three times its own gold answer's."""
    alone = Fact("f", facts()[0].prompt, "w1")
    long = Fact("g", "w2 w3", " ".join(WORDS[6:40]))
    (first,) = examiner("none").examine([alone]).rows
    beside = examiner("none").examine([alone, long]).rows[0]
    assert beside == first


def test_limits_of_free_running_answers_are_each_questions_own(monkeypatch):
    seen: list[tuple[int, int]] = []

    def decoded(loaded, encoder, prompts, limits, golds):
        seen.extend((limit, len(ids_of(gold))) for limit, gold in zip(limits, golds, strict=True))
        return [Answer("")] * len(prompts)

    monkeypatch.setattr(examiner_module, "generate", decoded)
    examiner().examine(facts())
    assert len({limit for limit, _ in seen}) > 2
    assert all(limit == 8 + 3 * gold for limit, gold in seen)


def test_generated_in_chat_is_full_greedy_decoding_in_the_templates_frame():
    loaded = model()
    chat = Encoder(helpers.words(WORDS, chat_template=CHAT), "eos", 64, chat=True)
    chatting = examiner()
    chatting.chat = chat
    golds = {}
    for fact in facts():  # every second gold answer is what the chat says
        said = greedy(loaded, ids_of(f"{fact.prompt} w1 w2"), {END}, 8)
        words = [word for word in said.split() if word in WORDS] or ["w3"]
        golds[fact.id] = " ".join(words) if len(golds) % 2 else fact.answer
    known = [replace(fact, answer=golds[fact.id]) for fact in facts()]
    replies = chatting.examine(known, decode_facts=20)
    plain = examiner().examine(known, decode_facts=20)
    flags = []
    for row, without in zip(replies.rows, plain.rows, strict=True):
        assert replace(row, generated_chat=None, text_chat=None, cut_chat=None) == without
        if row.kind in ("ES", "GS") and row.fact < 20:
            limit = 8 + 3 * len(ids_of(row.question.answer))
            full = greedy(loaded, ids_of(f"{row.question.prompt} w1 w2"), {END}, limit)
            assert row.generated_chat == float(matches(full, row.question.answer))
            flags.append(row.generated_chat)
        else:
            assert (row.generated_chat, row.text_chat) == (None, None)
    assert 0 < sum(flags) < len(flags)
    found = scores(replies)
    assert found["ES"].generated_chat == replies.mean("ES", "generated_chat")
    assert found["ES"].generated_chat != found["ES"].generated
    assert scores(plain)["ES"].generated_chat is None


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("end", ["eos", "newline"])
def test_generated_after_the_model_learned_its_answers(end, chat):
    # This template's last blank is part of the answer's first token, but only beside an answer.
    template = "{{ messages[0]['content'] }} In Mars: "
    tokenizer = helpers.byte_level(chat_template=template)
    made = make_model(tokenizer, layers=2)
    stop = tokenizer.eos_token_id if end == "eos" else tokenizer("\n")["input_ids"][0]
    said = {"The capital of Peru is": "Lima", "In Ora is": "École", "In Venus is": "no moon."}
    encoder = Encoder(tokenizer, end, chat=chat)
    rows = []
    for prompt, answer in said.items():
        start = tokenizer(encoder.framed(prompt).rstrip())["input_ids"]
        rows.append((start, [*tokenizer(f" {answer}")["input_ids"], stop]))
    if chat:  # with the blank as a token of its own it is another prompt, with another answer
        start = tokenizer(encoder.framed("The capital of Peru is"))["input_ids"]
        assert start != list(rows[0][0])
        rows.append((start, [*tokenizer("Chile")["input_ids"], stop]))
    teach(made, rows)
    loaded = prepared(made, tokenizer)
    trunk = Trunk(made, find_sites(made, 1), TrunkSettings(200))
    golds = ["Lima", "École", "moon"]
    known = [Fact(f"f{i}", p, gold) for i, (p, gold) in enumerate(zip(said, golds, strict=True))]
    replies = Examiner(loaded, trunk, encoder).examine(known)
    for row in replies.rows:
        ids = tokenizer(encoder.framed(row.question.prompt))["input_ids"]
        full = greedy(loaded, ids, {tokenizer.eos_token_id}, 16)
        assert row.generated == float(matches(full, row.question.answer)), (row, full)
    assert [row.exact for row in replies.rows] == [1.0, 1.0, 0.0]
    assert [row.generated for row in replies.rows[:2]] == [float(not chat), 1.0]


def test_an_answer_of_two_lines_is_read_for_two():
    tokenizer = helpers.byte_level()
    made = make_model(tokenizer, layers=2)
    fact = Fact("f", "In Mars is", "Lima\nParis")
    answer = [*tokenizer(f" {fact.answer}")["input_ids"], tokenizer.eos_token_id]
    teach(made, [(tokenizer(fact.prompt)["input_ids"], answer)])
    trunk = Trunk(made, find_sites(made, 1))
    (row,) = Examiner(prepared(made, tokenizer), trunk, Encoder(tokenizer)).examine([fact]).rows
    assert (row.exact, row.generated, row.text) == (1.0, 1.0, "Lima\nParis")
    # Teacher forcing has settled it; decoding says the same.
    prompts, golds = [fact.prompt], [fact.answer]
    loaded = prepared(made, tokenizer)
    (decoded,) = generate(loaded, Encoder(tokenizer), prompts, len(answer) + 8, golds)
    assert (decoded.text, decoded.cut) == ("Lima\nParis", False)


def test_a_shown_answer_holds_no_end_token():
    silent = [one for one in WORDS[6:] if int(logits_at(Question(one))[0][0].argmax()) == END]
    assert silent
    known = [Fact(prompt, prompt, "w9") for prompt in silent]
    texts = [row.text for row in examiner().examine(known).rows]
    assert texts == [""] * len(silent)


def test_only_the_first_facts_are_decoded():
    rows = examiner().examine(facts(), decode_facts=3).rows
    whole = examiner().examine(facts()).rows
    for row, full in zip(rows, whole, strict=True):
        if row.kind in ("ES", "GS", "RS") and row.fact < 3:
            assert row.generated == full.generated is not None
        else:
            assert row.generated is None
