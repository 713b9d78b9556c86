from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

import helpers
from command_support import greedy, make_model, teach
from malmend.errors import MalmendError
from malmend.evaluation import examiner as examiner_module
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.generate import Answer, matches
from malmend.evaluation.perplexity import perplexity
from malmend.evaluation.protocols import scores, stayed
from malmend.evaluation.replies import Asked, Replies, questions_of
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.load import LoadedModel, prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import Patch, applied

WORDS = ["the", "a", "an", ".", ",", "\n", *(f"w{index}" for index in range(44))]
UNK, END, NEWLINE = 0, 2, 9


@functools.cache
def model() -> LoadedModel:
    """Random, in float64, four blocks; says articles, marks and both ends often."""
    keywords = {"hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.5}
    made = helpers.tiny_llama(len(WORDS) + 4, seed=2, **keywords)
    with torch.no_grad():
        made.get_output_embeddings().weight[[END, *range(4, 10)]] *= 1.4
        made.get_output_embeddings().weight[[END, NEWLINE]] *= 1.6
    made.generation_config.eos_token_id = END
    return prepared(made, helpers.words(WORDS), "tiny")


def patch(size: float = 0.3, seed: int = 0) -> Patch:
    """A random shift of the last two blocks."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model().model, 2)
    factors = {s.name: (size * torch.randn(s.shape_VK, generator=generator),) for s in sites}
    return Patch(factors, {"base": model().fingerprint})


def examiner(end: EndOfAnswer = "eos", batch_tokens: int = 60) -> Examiner:
    loaded = model()
    trunk = Trunk(loaded.model, find_sites(loaded.model, 2), TrunkSettings(batch_tokens))
    return Examiner(loaded, trunk, Encoder(loaded.tokenizer, end, 64))


def ids_of(text: str) -> list[int]:
    return model().tokenizer(text)["input_ids"]


def greedy_answer(prompt: str, limit: int = 8) -> str:
    return greedy(model(), ids_of(prompt), {END}, limit)


def some_words(generator: random.Random, most: int = 6) -> str:
    return " ".join(generator.choices(WORDS[6:], k=generator.randint(1, most)))


def near_miss(generator: random.Random, prompt: str) -> str:
    """What the model says, at times with one word changed, an article or a mark left out."""
    words = [word for word in greedy_answer(prompt).split() if word in WORDS]
    change = generator.choice(["none", "word", "bare"])
    if change == "bare":
        words = [word for word in words if word not in ("the", "a", "an", ".", ",")]
    words = words[:8] or ["w3"]
    if change == "word":
        words[-1] = generator.choice(WORDS[6:])
    return " ".join(words)


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Facts with none to three paraphrases; unrelated questions repeated, and without answers.

    Neighbours are of the same pool; every fourth fact has a reversed prompt.
    """
    generator = random.Random(5)
    others = []
    for index in range(6):
        prompt = some_words(generator)
        others.append(Question(prompt, None if index % 3 == 2 else near_miss(generator, prompt)))
    made = []
    for index in range(24):
        prompt = some_words(generator)
        answer = near_miss(generator, prompt)
        paraphrases = tuple(some_words(generator) for _ in range(index % 4))
        unrelated = tuple(generator.choices(others, k=index % 3))
        made.append(
            Fact(
                id=f"f{index}",
                prompt=prompt,
                answer=answer,
                paraphrases=paraphrases,
                unrelated=unrelated,
                neighbours=tuple(others[(index + at) % len(others)] for at in range(index % 2 + 1)),
                reversed=Question(answer, prompt) if index % 4 == 0 else None,
            )
        )
    return tuple(made)


@torch.no_grad()
def logits_at(question: Question) -> tuple[Tensor, list[int]]:
    """One plain forward pass: logits that predict the answer (or the next token), and its ids."""
    start, answer = ids_of(question.prompt), ids_of(question.answer or "")
    logits = model().model(input_ids=torch.tensor([start + answer]), use_cache=False).logits[0]
    return logits[len(start) - 1 : len(start) - 1 + max(1, len(answer))], answer


def right_of(question: Question) -> list[bool]:
    logits, answer = logits_at(question)
    return [int(row.argmax()) == one for row, one in zip(logits, answer, strict=False)]


def by_kind(kind: str) -> list[list[Question]]:
    """Questions of one kind, fact by fact; facts without one are left out."""
    chosen = {
        "ES": [[fact.question] for fact in facts()],
        "GS": [list(fact.equivalents) for fact in facts()],
        "NS": [[q for q in fact.neighbours if q.answer] for fact in facts()],
        "LS": [[q for q in fact.unrelated if q.answer] for fact in facts()],
        "RS": [[fact.reversed] for fact in facts() if fact.reversed],
    }[kind]
    return [questions for questions in chosen if questions]


def expected(kind: str) -> tuple[float, float]:
    """Token ratio and exact of the model as its weights now are."""
    rights = [[right_of(q) for q in questions] for questions in by_kind(kind)]
    ratio = fmean(fmean(fmean(one) for one in fact) for fact in rights)
    return ratio, fmean(fmean(all(one) for one in fact) for fact in rights)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("end", ["eos", "newline", "none"])
def test_token_ratio_and_exact_are_those_of_plain_forward_passes(end, edited):
    one = examiner(end)
    with applied(model(), patch(0.3 if edited else 0.0)):
        replies = one.examine(facts(), decode_facts=0)
        for kind in ("ES", "GS", "NS", "LS", "RS"):
            ratio, exact = expected(kind)
            assert edited or 0 < ratio < 1 or kind == "RS"
            assert edited or kind in ("GS", "RS") or 0 < exact < ratio
            assert replies.mean(kind, "token_ratio") == pytest.approx(ratio, abs=1e-12)
            assert replies.mean(kind, "exact") == pytest.approx(exact, abs=1e-12)
        for row in replies.rows:
            assert len(row.predicted) == max(1, len(ids_of(row.question.answer or "")))
            assert row.generated is None
            assert row.text is None


def test_the_end_of_answer_token_changes_no_metric():
    ways = [examiner(end).examine(facts(), decode_facts=0).rows for end in ("eos", "newline")]
    assert ways[0] == ways[1] == examiner("none").examine(facts(), decode_facts=0).rows


def test_means_are_per_fact_first():
    def asked(fact: int, ratio: float | None) -> Asked:
        return Asked("GS", fact, Question("p", "a"), token_ratio=ratio)

    replies = Replies([asked(0, 1.0), asked(1, 0.0), asked(1, 0.5), asked(1, 1.0), asked(2, None)])
    assert replies.mean("GS", "token_ratio") == 0.75
    assert replies.mean("ES", "token_ratio") is None
    assert replies.mean("GS", "exact") is None


def test_everything_is_asked_in_order_and_repeats_too():
    asked = [(row.kind, row.fact, row.question) for row in examiner().examine(facts(), 0).rows]
    wanted = []
    for index, fact in enumerate(facts()):
        wanted += [("ES", index, fact.question)]
        wanted += [("GS", index, one) for one in fact.equivalents]
        wanted += [("NS", index, one) for one in fact.neighbours]
        wanted += [("LS", index, one) for one in fact.unrelated]
        wanted += [("RS", index, fact.reversed)] if fact.reversed else []
    assert asked == wanted


def before_and_after(size: float = 0.3) -> tuple[Replies, Replies]:
    one = examiner()
    before = one.examine(facts(), decode_facts=0, remember=True)
    with applied(model(), patch(size)):
        return before, one.examine(facts(), decode_facts=0)


@pytest.mark.parametrize("kind", ["NS", "LS"])
def test_retention_kl_and_kept_are_those_of_plain_forward_passes(kind):
    asked = [q for fact in facts() for q in (fact.neighbours if kind == "NS" else fact.unrelated)]
    assert len(asked) > len(set(asked))  # duplicates count as often as they are asked
    assert any(question.answer is None for question in asked)
    before = {question: logits_at(question)[0] for question in asked}
    right = {question: all(right_of(question)) for question in asked if question.answer}
    with applied(model(), patch(0.1)):
        after = {question: logits_at(question)[0] for question in asked}
        still = {question: all(right_of(question)) for question in right}
    unedited, replies = before_and_after(0.1)
    same, moved = [], []
    for question in asked:
        was, now = before[question], after[question]
        same += (was.argmax(1) == now.argmax(1)).tolist()
        p, q = was.log_softmax(1), now.log_softmax(1)
        moved += (p.exp() * (p - q)).sum(1).tolist()
    found = scores(replies, unedited)[kind]
    assert 0 < found.retention < 1
    assert found.retention == pytest.approx(fmean(same), abs=1e-12)
    assert found.kl == pytest.approx(fmean(moved), rel=1e-9)
    known = [still[question] for question in asked if right.get(question)]
    assert 0 < sum(known) < len(known) < len(asked)
    assert found.kept == pytest.approx(fmean(known), abs=1e-12)


def test_only_what_must_not_move_has_retention_and_only_after_an_edit():
    before, after = before_and_after()
    for kind, one in scores(after, before).items():
        figures = (one.retention, one.kl, one.kept)
        assert all((figure is not None) == (kind in ("NS", "LS")) for figure in figures)
    for one in scores(before).values():
        assert (one.retention, one.kl, one.kept) == (None, None, None)


def test_what_moved_says_what_it_became():
    before, after = before_and_after()
    decode = model().tokenizer.decode
    moved = 0
    for was, now in zip(before.rows, after.rows, strict=True):
        assert was.moved is None
        if now.kind in ("NS", "LS"):
            assert (was.top, now.top) == (decode(was.predicted), decode(now.predicted))
            assert now.moved is (was.predicted != now.predicted)
            moved += now.moved
            assert len(now.kl) == len(now.predicted)
        else:
            assert (now.top, now.moved, now.kl) == (None, None, ())
    assert moved
    assert not any(row.moved for row in before_and_after(0.0)[1].rows)


@pytest.mark.parametrize("remember", [False, True])
def test_a_model_that_answers_nan_is_refused(remember):
    """A KL of NaN must not be reported as no divergence."""
    one = examiner()
    one.examine(facts(), decode_facts=0, remember=True)
    bad = Patch({n: (s[0] * math.nan,) for n, s in patch().factors.items()}, patch().provenance)
    with applied(model(), bad), pytest.raises(MalmendError, match="tiny hold NaN or infinity"):
        one.examine(facts(), decode_facts=0, remember=remember)


def test_a_divergence_without_bound_is_refused(monkeypatch):
    one = examiner()
    one.examine(facts(), decode_facts=0, remember=True)
    endless = functools.partial(torch.full_like, fill_value=math.inf)
    monkeypatch.setattr(examiner_module, "kl_per_token", lambda _, after: endless(after[:, 0]))
    with pytest.raises(MalmendError, match="hold NaN or infinity"):
        one.examine(facts(), decode_facts=0)


def test_an_unedited_model_retains_everything():
    one = examiner()
    before = one.examine(facts(), decode_facts=0, remember=True)
    found = stayed(before, one.examine(facts(), decode_facts=0), "LS")
    assert (found.retention, found.kept) == (1.0, 1.0)
    assert 0.0 <= found.kl < 1e-12


def test_without_unrelated_questions_there_is_no_retention():
    one = examiner()
    alone = [replace(fact, unrelated=()) for fact in facts()]
    before = one.examine(alone, decode_facts=0, remember=True)
    found = scores(one.examine(alone, decode_facts=0), before)
    left = found["LS"]
    assert (left.retention, left.kl, left.kept, left.token_ratio) == (None, None, None, None)
    assert left.questions == 0
    assert found["NS"].questions == sum(len(fact.neighbours) for fact in alone)


def test_one_question_as_edit_prompt_and_as_unrelated_is_both():
    question = Question("w1 w2", "w3")
    fact = Fact("f", question.prompt, "w3", unrelated=(question,))
    one = examiner()
    one.examine([fact], decode_facts=0, remember=True)
    es, ls = one.examine([fact], decode_facts=0).rows
    assert (es.kind, es.kl) == ("ES", ())
    assert ls.kl == pytest.approx((0.0,), abs=1e-12)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("end", ["eos", "newline", "none"])
def test_generated_is_what_full_greedy_decoding_of_every_prompt_gives(end, edited):
    loaded = model()
    with applied(loaded, patch(0.1 if edited else 0.0)):
        replies = examiner(end).examine(facts())
        asked = [row for row in replies.rows if row.kind in ("ES", "GS", "RS")]
        flags = []
        for row in asked:
            limit = 8 + len(ids_of(row.question.answer))
            full = greedy(loaded, ids_of(row.question.prompt), {END}, limit)
            assert row.generated == float(matches(full, row.question.answer)), (row, full)
            flags.append(row.generated)
            if row.generated:
                assert matches(row.text, full)
            longer = greedy(loaded, ids_of(row.question.prompt), {END}, limit + 1)
            # One that is given up at its last word could not be known to end there.
            assert row.cut or row.text == full == longer, (row, full)
    assert {row.cut for row in asked} == {False, True}
    assert 3 <= sum(flags) < len(flags)
    inexact = [row for row in asked if row.generated and not row.exact]
    assert edited or inexact  # matches that only normalisation finds
    held = [row for row in replies.rows if row.kind in ("NS", "LS")]
    assert all(row.generated is None and row.text is None for row in held)


def test_a_free_running_answer_does_not_depend_on_its_company():
    """Its token limit is its own: 8 beyond its own gold answer, however long the others' are."""
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
    assert all(limit == 8 + gold for limit, gold in seen)


CHAT = "{{ messages[0]['content'] }} w1 w2 "


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
            limit = 8 + len(ids_of(row.question.answer))
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


def test_an_answer_of_two_lines_is_never_said():
    tokenizer = helpers.byte_level()
    made = make_model(tokenizer, layers=2)
    fact = Fact("f", "In Mars is", "Lima\nParis")
    answer = [*tokenizer(f" {fact.answer}")["input_ids"], tokenizer.eos_token_id]
    teach(made, [(tokenizer(fact.prompt)["input_ids"], answer)])
    trunk = Trunk(made, find_sites(made, 1))
    (row,) = Examiner(prepared(made, tokenizer), trunk, Encoder(tokenizer)).examine([fact]).rows
    assert (row.exact, row.generated, row.text) == (1.0, 0.0, "Lima")


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


def test_examining_changes_nothing_and_says_the_same_twice():
    loaded = model()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()]
    config = loaded.model.generation_config.to_dict()
    one = examiner()
    first = one.examine(facts(), remember=True)
    second = one.examine(facts(), remember=True)
    assert first.rows == second.rows == examiner().examine(facts()).rows
    assert not loaded.model.training
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any("forward" in module.__dict__ for module in loaded.model.modules())
    now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()]
    assert now == hooks
    assert loaded.model.generation_config.to_dict() == config


def test_grouping_changes_no_result():
    many, single = examiner(batch_tokens=4000), examiner(batch_tokens=1)
    assert many.examine(facts()).rows == single.examine(facts()).rows


def test_progress_counts_every_question_once():
    counted: list[int] = []
    one = examiner()
    one.progress = counted.append
    one.examine(facts())
    asked = list(questions_of(facts()))
    distinct = {question for _, _, question in asked}
    spoken = {question for kind, _, question in asked if kind in ("ES", "GS", "RS")}
    assert sum(counted) == len(distinct) + len(spoken) == one.count(facts())
    counted.clear()
    one.chat = Encoder(helpers.words(WORDS, chat_template=CHAT), "eos", 64, chat=True)
    one.examine(facts(), decode_facts=5)
    assert sum(counted) == one.count(facts(), 5)


@pytest.mark.parametrize("window", [4, 7, 256])
def test_perplexity_is_that_of_plain_windows(window):
    generator = random.Random(8)
    text = " ".join(generator.choices(WORDS[6:], k=29))
    ids = ids_of(text)
    losses: list[float] = []
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        with torch.no_grad():
            rows = model().model(input_ids=torch.tensor([piece])).logits[0].log_softmax(1)
        losses += [-rows[at, piece[at + 1]].item() for at in range(len(piece) - 1)]
    assert perplexity(model(), text, window) == pytest.approx(math.exp(fmean(losses)), rel=1e-5)
    cut = perplexity(model(), text, window, most_tokens=9)
    assert cut == pytest.approx(perplexity(model(), " ".join(text.split()[:9]), window), rel=1e-9)


def half_width(asked: Sequence[tuple[int, object, float]]) -> float:
    """1.96 cluster-robust standard errors, G / (G - 1) corrected, of a mean over facts.

    ``asked`` holds fact, cluster and value; each fact weighs the same, and so does each of its
    questions.
    """
    facts = {fact for fact, _, _ in asked}
    weights = [1 / len(facts) / sum(other == fact for other, _, _ in asked) for fact, _, _ in asked]
    mean = sum(weight * value for weight, (_, _, value) in zip(weights, asked, strict=True))
    clusters = {cluster for _, cluster, _ in asked}
    variance = 0.0
    for one in clusters:
        parts = zip(weights, asked, strict=True)
        total = sum(weight * (value - mean) for weight, (_, c, value) in parts if c == one)
        variance += total**2 * len(clusters) / (len(clusters) - 1)
    return 1.96 * math.sqrt(variance)


def test_intervals_cluster_by_fact_and_unrelated_ones_by_question():
    one = examiner()
    found = scores(one.examine(facts(), decode_facts=0))
    for kind in ("ES", "GS", "NS", "RS", "LS"):
        asked = [
            (index, question if kind in ("NS", "LS") else index, fmean(right_of(question)))
            for index, questions in enumerate(by_kind(kind))
            for question in questions
        ]
        assert found[kind].interval == pytest.approx(half_width(asked), rel=1e-9)
    assert len({question for _, question, _ in asked}) < len(asked)
    single = scores(one.examine(facts()[:1], decode_facts=0))
    assert single["ES"].interval is None
