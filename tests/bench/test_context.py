"""Facts in the prompt: which are shown, what is read, and that nothing but the prompt changes."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

import command_support
import helpers
from malmend.bench.asking import Asking
from malmend.bench.context import ContextEncoder, InContext
from malmend.bench.plan import Plan
from malmend.bench.run import bench
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.workbench import encoder_for

tiny = command_support.tiny
cache = command_support.cache

FACTS = [
    Fact("a", "The capital of Peru is", "Lima"),
    Fact("b", "The capital of Chile is", "Santiago"),
    Fact("c", "The moons of Mars are", "two"),
]


def behind(shown: int = 1) -> ContextEncoder:
    return ContextEncoder(Encoder(helpers.byte_level()), FACTS, shown)


def asked_in_context(loaded, facts):
    asking = Asking(loaded, Plan(("m",), "f", {"context": {}}))
    encoder = ContextEncoder(encoder_for(loaded), list(asking.known(facts)), 1)
    return asking.read_by(facts, encoder, 0).rows


def likeness(encoder: Encoder, prompt: str, fact: Fact) -> float:
    """The cosine written out over counters."""
    held = [set(encoder.prompt_ids(one.prompt)) for one in FACTS]

    def weighed(text: str) -> dict[int, float]:
        counts = Counter(encoder.prompt_ids(text))
        return {
            token: many * (math.log(len(FACTS) / max(1, sum(token in one for one in held))) + 1)
            for token, many in counts.items()
        }

    one, other = weighed(prompt), weighed(fact.prompt)
    product = sum(value * other.get(token, 0.0) for token, value in one.items())
    return product / math.sqrt(sum(value**2 for value in other.values()))


@pytest.mark.parametrize("prompt", ["What is Peru's capital?", "Mars has so many moons:", "Chile"])
def test_the_likest_fact_by_the_cosine_written_out(prompt):
    encoder = behind()
    scores = [likeness(Encoder(helpers.byte_level()), prompt, fact) for fact in FACTS]
    assert encoder.likest(prompt) == [scores.index(max(scores))]
    order = sorted(range(3), key=lambda index: (-scores[index], index))
    assert behind(2).likest(prompt) == [order[1], order[0]]


@pytest.mark.parametrize("seed", range(40))
def test_of_equally_like_facts_the_earlier_is_shown(seed):
    """Prompts of the same tokens in another order: rounding must not choose."""
    words, generator = [f"w{index}" for index in range(40)], random.Random(seed)
    asked = generator.choices(words, k=generator.randint(5, 25))
    others = [generator.choices(words, k=6) for _ in range(generator.randint(1, 30))]
    same = [generator.sample(asked, len(asked)) for _ in range(generator.randint(5, 30))]
    prompts = [" ".join(one) for one in (*others, *same)]
    facts = [Fact(f"f{index}", prompt, "w1") for index, prompt in enumerate(prompts)]
    encoder = ContextEncoder(Encoder(helpers.words(words)), facts, 3)
    first = len(others)
    assert encoder.likest(" ".join(asked)) == [first + 2, first + 1, first]


def test_the_prompt_stands_behind_its_facts():
    assert behind().framed("Peru: the capital is ") == (
        "The capital of Peru is Lima\nPeru: the capital is"
    )
    encoded = behind().encode(Question("Peru: the capital is", "Lima"))
    read = helpers.byte_level().decode(encoded.ids[: encoded.answer_start])
    assert read == "The capital of Peru is Lima\nPeru: the capital is"
    assert len(behind(9).likest("Peru")) == 3  # no more than there are


def test_replies_are_of_the_whole_model_behind_the_facts(tiny):
    facts = command_support.make_facts(3, seed=4)
    before = {n: p.clone() for n, p in tiny.loaded.model.named_parameters()}
    rows = asked_in_context(tiny.loaded, facts)
    plain = encoder_for(tiny.loaded)
    encoder = ContextEncoder(plain, facts, 1)
    for row, fact in zip(rows, facts, strict=True):
        for said, by in ((row.unedited[0], plain), (row.edited[0], encoder)):
            one = by.encode(fact.question)
            logits = tiny.loaded.model(torch.tensor([one.ids])).logits[0]
            top = logits[list(one.sources)][: one.counted].argmax(-1).tolist()
            assert list(said.predicted) == top
        assert all(one.kl and one.kl[0] > 0 for one in row.edited if one.kind == "LS")
    assert all(torch.equal(p, before[n]) for n, p in tiny.loaded.model.named_parameters())


@pytest.mark.parametrize("protocol", ["together", "alone"])
def test_in_a_plan(protocol, tiny, tmp_path):
    plan = Plan((tiny.model,), tiny.facts, {"context": {}}, (3,), protocols=(protocol,))
    (row,) = bench(plan, tmp_path / "out").rows
    assert row["edited"]["LS"]["retention"] is not None
    assert row["patch"] == {}
    assert row["edited"]["ES"]["token_ratio"] is not None


def test_what_does_not_fit_is_refused(tiny):
    long = Fact("x", "The capital of Kalo is" + " so" * 120, "Lo")
    with pytest.raises(MalmendError, match="Behind 1 facts a question does not fit"):
        asked_in_context(tiny.loaded, [long])
    with pytest.raises(EditorError, match=r"context\.shown is 0"):
        InContext(shown=0)
