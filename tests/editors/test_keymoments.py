"""Second moments of keys against a loop: one question alone through the whole model, by hooks.

Token ids and positions are written out here from the words themselves, not by the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import (
    TERMS,
    WORDS,
    encoder,
    passages_of,
    random_facts,
    random_text,
    tiny_model,
    tiny_trunk,
)
from torch import Tensor
from transformers import PreTrainedModel

import helpers
from malmend.editors.keymoments import (
    asked_moment,
    key_moments,
    others_of,
    text_moment,
    wording_moment,
)
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.trunk import Trunk

# Sums of a few hundred products of size 1 in float64, in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
TEXT = random_text(25)
END = 2  # the id of </s>
FACTS = random_facts(6, seed=30, paraphrases=3, unrelated=2, neighbours=2)
BATCHES = pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


def ids_of(text: str) -> list[int]:
    return [4 + WORDS.index(word) for word in text.split()]


def asked_ids(question: Question) -> tuple[list[int], list[int]]:
    """The ids of a question, and the positions that output its answer and end token."""
    prompt = ids_of(question.prompt)
    if question.answer is None:
        return prompt, [len(prompt) - 1]
    answer = [*ids_of(question.answer), END]
    first = len(prompt) - 1
    return prompt + answer, list(range(first, first + len(answer)))


def keys_alone(model: PreTrainedModel, trunk: Trunk, ids: Sequence[int]) -> list[Tensor]:
    """What the model itself gives each site to read: T x K, one unpadded row."""
    seen: dict[str, Tensor] = {}
    handles = [
        site.module.register_forward_pre_hook(
            lambda _, args, name=site.name: seen.update({name: args[0][0].double()})
        )
        for site in trunk.sites
    ]
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[site.name] for site in trunk.sites]


def mean_outer(rows: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    return total / len(rows)


def text_alone(model: PreTrainedModel, trunk: Trunk, lines: Sequence[str]) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in trunk.sites]
    for line in lines:
        for known, keys in zip(rows, keys_alone(model, trunk, ids_of(line)), strict=True):
            known.extend(keys[1:])
    return [mean_outer(known) for known in rows]


def asked_alone(
    model: PreTrainedModel, trunk: Trunk, questions: Sequence[Question]
) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in trunk.sites]
    for question in questions:
        ids, places = asked_ids(question)
        for known, keys in zip(rows, keys_alone(model, trunk, ids), strict=True):
            known.extend(keys[place] for place in places)
    return [mean_outer(known) for known in rows]


def kinds_alone(model: PreTrainedModel, trunk: Trunk, *kinds: Sequence[Question]) -> list[Tensor]:
    """Each kind of questions has the same weight."""
    means = [asked_alone(model, trunk, questions) for questions in kinds if questions]
    return [sum(parts) / len(means) for parts in zip(*means, strict=True)]


def wording_alone(model: PreTrainedModel, trunk: Trunk, facts: Sequence[Fact]) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in trunk.sites]
    for fact in facts:
        ids, places = asked_ids(Question(fact.prompt, fact.answer))
        here = keys_alone(model, trunk, ids)
        for paraphrase in fact.paraphrases:
            other_ids, other_places = asked_ids(Question(paraphrase, fact.answer))
            there = keys_alone(model, trunk, other_ids)
            for known, old, new in zip(rows, here, there, strict=True):
                pairs = zip(places, other_places, strict=True)
                known.extend(new[b] - old[a] for a, b in pairs)
    return [mean_outer(known) for known in rows]


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(found) == len(wanted) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float64
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(mine, theirs, **EXACT)


# --- general text


@FAMILIES
@BATCHES
def test_text_is_the_mean_over_tokens_but_each_lines_first(family, batch_tokens):
    model = tiny_model(family)
    trunk = tiny_trunk(model, batch_tokens=batch_tokens)
    wanted = text_alone(model, trunk, TEXT.splitlines())
    compare(text_moment(trunk, passages_of(TEXT), 10_000), wanted)


@pytest.mark.parametrize("most", [1, 2, 20, 40, "exactly three lines"])
def test_text_stops_at_the_line_that_reaches_the_bound(most):
    model = tiny_model()
    trunk, lines, used, tokens = tiny_trunk(model), TEXT.splitlines(), [], 0
    if isinstance(most, str):
        most = sum(len(line.split()) - 1 for line in lines[:3])
    for line in lines:
        if tokens >= most:
            break
        used.append(line)
        tokens += len(line.split()) - 1
    assert len(used) < len(lines)
    compare(text_moment(trunk, passages_of(TEXT), most), text_alone(model, trunk, used))


# --- questions about others


@FAMILIES
@BATCHES
def test_asked_is_the_mean_over_the_positions_that_output_answers(family, batch_tokens):
    model = tiny_model(family)
    trunk = tiny_trunk(model, batch_tokens=batch_tokens)
    without_answer = Question("w5 w6 w7 w8")
    questions = [q for fact in FACTS for q in (*fact.unrelated, *fact.neighbours)]
    questions.append(without_answer)
    wanted = asked_alone(model, trunk, questions)
    compare(asked_moment(trunk, encoder().encode_all(questions)), wanted)


def with_questions(unrelated: bool, neighbours: bool) -> list[Fact]:
    return [
        replace(
            fact,
            unrelated=fact.unrelated if unrelated else (),
            neighbours=fact.neighbours if neighbours else (),
        )
        for fact in FACTS
    ]


@pytest.mark.parametrize(("unrelated", "neighbours"), [(True, True), (True, False), (False, True)])
def test_asked_takes_the_neighbours_and_the_unrelated_questions(unrelated, neighbours):
    model = tiny_model()
    trunk, facts = tiny_trunk(model), with_questions(unrelated, neighbours)
    near = [q for fact in facts for q in fact.neighbours]
    others = [q for fact in facts for q in fact.unrelated]
    assert (len(near), len(others)) == (12 * neighbours, 12 * unrelated)
    found = key_moments(trunk, encoder(), ["asked"], facts, TEXT, 100)
    assert list(found) == ["asked"]
    compare(found["asked"], kinds_alone(model, trunk, near, others))


def test_asked_counts_a_question_of_several_facts_once():
    model = tiny_model()
    trunk, shared = tiny_trunk(model), FACTS[0].unrelated[0]
    facts = [replace(fact, unrelated=(shared,)) for fact in FACTS]
    facts[2] = replace(facts[2], neighbours=(shared, *facts[2].neighbours))
    near = [shared, *(q for fact in FACTS for q in fact.neighbours)]  # and in no other kind
    found = key_moments(trunk, encoder(), ["asked"], facts, TEXT, 100)
    compare(found["asked"], asked_alone(model, trunk, near))


def test_asked_takes_the_general_questions_beside_those_of_the_facts():
    """Few general ones count as much as many of the facts; one that a fact asks counts there."""
    model = tiny_model()
    trunk, shared = tiny_trunk(model), FACTS[1].neighbours[0]
    general = (Question("w1 w2", "w3"), shared, Question("w9 w8 w7", "w6 w5"))
    near = [q for fact in FACTS for q in fact.neighbours]
    others = [q for fact in FACTS for q in fact.unrelated]
    found = key_moments(trunk, encoder(), ["asked"], FACTS, TEXT, 100, general)
    compare(found["asked"], kinds_alone(model, trunk, near, others, [general[0], general[2]]))
    without = with_questions(False, False)
    found = key_moments(trunk, encoder(), ["asked"], without, TEXT, 100, general)
    compare(found["asked"], asked_alone(model, trunk, general))


def test_asked_without_any_question_is_of_the_ends_of_the_text():
    model = tiny_model()
    trunk, facts = tiny_trunk(model), with_questions(False, False)
    found = key_moments(trunk, encoder(), ["asked"], facts, TEXT, 100)
    lines = [Question(line) for line in TEXT.splitlines()]
    compare(found["asked"], asked_alone(model, trunk, lines))


def test_the_questions_about_others_begin_with_the_near_ones():
    near, far = (Question("w1", "w2"),), (Question("w3", "w4"), Question("w5"))
    fact = replace(FACTS[0], unrelated=far, neighbours=near)
    assert others_of(fact) == (*near, *far)


# --- the wording


@FAMILIES
@BATCHES
def test_wording_is_the_mean_of_how_paraphrases_move_a_key(family, batch_tokens):
    model = tiny_model(family)
    trunk = tiny_trunk(model, batch_tokens=batch_tokens)
    # Facts of one prompt or one paraphrase must not be mixed up.
    facts = [*FACTS, replace(FACTS[0], answer="w9 w8"), replace(FACTS[1], prompt=FACTS[0].prompt)]
    assert {len(ids_of(fact.answer)) for fact in facts} == {1, 2, 3}
    compare(wording_moment(trunk, encoder(), facts), wording_alone(model, trunk, facts))


def test_wording_of_many_pairs_is_that_of_its_parts():
    """More pairs than are subtracted at once; facts of one answer length have equal shares."""
    trunk = tiny_trunk(tiny_model())
    facts = [
        replace(fact, answer=f"w{index % 50}")
        for index, fact in enumerate(random_facts(69, seed=31, paraphrases=4))
    ]
    parts = [wording_moment(trunk, encoder(), facts[start : start + 23]) for start in (0, 23, 46)]
    whole = wording_moment(trunk, encoder(), facts)
    compare(whole, [sum(rows) / 3 for rows in zip(*parts, strict=True)])


def test_paraphrases_without_any_difference_move_nothing():
    facts = [replace(fact, paraphrases=(fact.prompt,) * 2) for fact in FACTS]
    for moment_KK in wording_moment(tiny_trunk(tiny_model()), encoder(), facts):
        assert torch.equal(moment_KK, torch.zeros_like(moment_KK))


def byte_trunk() -> tuple[PreTrainedModel, Trunk, Encoder]:
    """A model whose tokenizer merges blanks: an answer after a line break has other tokens."""
    tokenizer = helpers.byte_level()
    model = helpers.tiny_llama(
        len(tokenizer), num_hidden_layers=3, intermediate_size=32, initializer_range=0.3
    ).requires_grad_(False)
    return model, tiny_trunk(model), Encoder(tokenizer, "eos", 64)


@pytest.mark.parametrize("answer", ["moon", "Mars"], ids=["more", "fewer"])
def test_paraphrases_whose_answer_has_another_number_of_tokens_are_left_out(answer):
    model, trunk, byte_encoder = byte_trunk()
    kept = ("Lake Ora is in", "In which country is Lake Ora?")
    fact = Fact("a", "The capital of Peru is", answer, paraphrases=(*kept, "The capital:\n"))
    alone = Fact("b", "The capital of France is", answer, paraphrases=("Capital:\n",))
    sizes = {
        prompt: len(byte_encoder.encode(Question(prompt, answer)).labels)
        for prompt in (fact.prompt, alone.prompt, *fact.paraphrases, *alone.paraphrases)
    }
    plain = sizes[fact.prompt]
    assert all((size != plain) == prompt.endswith("\n") for prompt, size in sizes.items()), sizes

    rows: list[list[Tensor]] = [[] for _ in trunk.sites]
    ids = [byte_encoder.encode(Question(prompt, answer)).ids for prompt in (fact.prompt, *kept)]
    here, *others = (keys_alone(model, trunk, one) for one in ids)
    for there in others:
        for known, old, new in zip(rows, here, there, strict=True):
            # The answer and its end token stand at the end; their logits one position before.
            known.extend(new[-1 - back] - old[-1 - back] for back in range(1, plain + 1))
    wanted = [mean_outer(known) for known in rows]
    compare(wording_moment(trunk, byte_encoder, [fact, alone]), wanted)
    # A fact of which none is left, alone: the term is there, and asks for nothing.
    for moment_KK in wording_moment(trunk, byte_encoder, [alone]):
        assert torch.equal(moment_KK, torch.zeros_like(moment_KK))


# --- all together


@pytest.mark.parametrize("prior", ["wording", "text", "identity"])
def test_only_the_terms_that_are_asked_for_are_taken(prior):
    model = tiny_model()
    trunk, told = tiny_trunk(model), []
    found = key_moments(
        trunk,
        encoder(),
        TERMS[prior],
        FACTS,
        TEXT,
        10_000,
        progress=lambda stage, share: told.append((stage, share)),
    )
    assert tuple(found) == TERMS[prior]
    assert len({stage for stage, _ in told}) == len(TERMS[prior])
    assert [share for _, share in told][-1:] == [1.0] * bool(TERMS[prior])
    if prior == "wording":
        compare(found["text"], text_alone(model, trunk, TEXT.splitlines()))
        compare(found["wording"], wording_alone(model, trunk, FACTS))
    for moments in found.values():
        for site, moment_KK in zip(trunk.sites, moments, strict=True):
            assert moment_KK.shape == (site.shape_VK[1],) * 2
            # A mean of outer products: symmetric, no eigenvalue below rounding of the largest.
            torch.testing.assert_close(moment_KK, moment_KK.T, rtol=0, atol=1e-12)
            values = torch.linalg.eigvalsh(moment_KK)
            assert values[0] > -1e-12 * values[-1]


def test_the_model_is_left_as_it_was():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trunk = tiny_trunk(model)
    key_moments(trunk, encoder(), TERMS["wording"], FACTS, TEXT, 100)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert not any(site.module._forward_hooks for site in trunk.sites)
