from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import torch
from asked_support import CHAT, WORDS, examiner, facts, ids_of, logits_at, model, patch
from hypothesis import example, given
from hypothesis import strategies as st

import helpers
from malmend.errors import MalmendError
from malmend.evaluation import examiner as examiner_module
from malmend.evaluation import perplexity as perplexity_module
from malmend.evaluation.perplexity import perplexity
from malmend.evaluation.protocols import between, scores
from malmend.evaluation.replies import Replies, Reply, questions_of
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import Patch, applied


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


def distinct_questions() -> list[Question]:
    return list(dict.fromkeys(question for _, _, question in questions_of(facts())))


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
    def asked(fact: int, ratio: float | None) -> Reply:
        return Reply("GS", fact, Question("p", "a"), token_ratio=ratio)

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


def test_what_is_remembered_is_no_part_of_a_micro_batch():
    """Once it was a view, which kept all states of the batch, edit prompts' too."""
    one = examiner()
    one.examine(facts(), decode_facts=0, remember=True)
    assert one._before
    for _, states_AH in one._before.values():
        assert states_AH.untyped_storage().nbytes() == states_AH.numel() * states_AH.element_size()


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


@pytest.mark.parametrize("most", [3, 1000])
def test_held_questions_go_through_the_output_together(most, monkeypatch):
    """To rounding what each alone gives; once each was a run of the output layer of its own."""
    one = examiner(batch_tokens=4000)
    one.examine(facts(), decode_facts=0, remember=True)
    monkeypatch.setattr(examiner_module, "LOGITS", most * one.trunk.words)
    batches = sum(1 for _ in one.trunk.batches(one.encoder.encode_all(distinct_questions())))
    sizes, through = [], one.trunk.logits_of

    def counted(states_AH: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states_AH))
        return through(states_AH)

    monkeypatch.setattr(one.trunk, "logits_of", counted)
    with applied(model(), patch(0.1)):
        rows = one.examine(facts(), decode_facts=0).rows
        found = {row.question: row.kl for row in rows if row.kind in ("NS", "LS")}
        after = {question: logits_at(question)[0] for question in found}
    if most > 3:
        assert len(sizes) <= 2 * batches < batches + len(found)
    else:
        assert sizes.count(3) >= 2
    for question, kl in found.items():
        p, q = logits_at(question)[0].log_softmax(1), after[question].log_softmax(1)
        assert kl == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), rel=1e-9, abs=1e-14)


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
        assert (was.top, now.top) == tuple(decode(one.predicted).strip() for one in (was, now))
        if now.kind in ("NS", "LS"):
            assert now.moved is (was.predicted != now.predicted)
            moved += now.moved
            assert len(now.kl) == len(now.predicted)
        else:
            assert (now.moved, now.kl) == (None, ())
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
    found = scores(one.examine(facts(), decode_facts=0), before)["LS"]
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


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("window", [4, 7, 256])
def test_perplexity_is_that_of_plain_windows(window, cut, monkeypatch):
    generator = random.Random(8)
    text = " ".join(generator.choices(WORDS[6:], k=29))
    ids = ids_of(text)
    losses: list[float] = []
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        with torch.no_grad():
            rows = model().model(input_ids=torch.tensor([piece])).logits[0].log_softmax(1)
        losses += [-rows[at, piece[at + 1]].item() for at in range(len(piece) - 1)]
    sites = find_sites(model().model, 1) if cut else []
    trunk = Trunk(model().model, sites, TrunkSettings(batch_tokens=10))
    monkeypatch.setattr(perplexity_module, "WINDOW", window)
    found = perplexity(model(), trunk, text)
    assert found == pytest.approx(math.exp(fmean(losses)), rel=1e-5)
    only = perplexity(model(), trunk, " ".join(text.split()[:9]))
    monkeypatch.setattr(perplexity_module, "MOST_READ", 9)
    first = perplexity(model(), trunk, text)
    assert first == pytest.approx(only, rel=1e-9)


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


@given(st.floats(1e-3, 1 - 1e-3), st.floats(1e-3, 10.0))
@example(0.125, 0.245)  # was shown as "12.5% ± 24.5"
def test_what_is_shown_of_an_interval_stays_inside(share, interval):
    """Both ends solve (p - share)^2 = 1.96^2 p (1 - p) / n, n by the standard error."""
    n = share * (1 - share) / (interval / 1.96) ** 2
    part = 1.96**2 / n
    low, high = sorted(np.roots([1 + part, -2 * share - part, share**2]).real)
    found = between(share, interval)
    assert found is not None
    # The root nearest 0 is a difference of numbers near 1 / interval^2: 1e-7 is far above that.
    assert found == pytest.approx((low, high), abs=1e-7)
    assert 0 <= found[0] < share < found[1] <= 1


@pytest.mark.parametrize(
    ("share", "interval"), [(None, None), (0.5, None), (0.5, 0.0), (0.0, 0.1), (1.0, 0.1)]
)
def test_none_is_shown_where_none_is_known_or_all_are_alike(share, interval):
    assert between(share, interval) is None
