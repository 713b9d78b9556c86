from __future__ import annotations

from dataclasses import replace

import pytest

from malmend.errors import FactsError
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Fact, FactSet, Question, Skipped

PERU = Fact(
    id="peru",
    prompt="The capital of Peru is",
    answer="Lima",
    subject="Peru",
    paraphrases=("Peru's capital is",),
    unrelated=(Question("Mars has", "two moons"),),
    tags=("demo",),
    line=4,
    relation="capital",
    alternative="Quito",
    neighbours=(Question("The capital of Chile is", "Santiago"),),
    reversed=Question("Lima is the capital of", "Peru"),
)


def test_the_alternative_is_the_answer_and_nothing_else_moves():
    skipped = (Skipped(PERU, PERU),)
    turned = towards_alternatives(FactSet("facts", (PERU,), skipped))
    assert turned.facts == (replace(PERU, answer="Quito", alternative=None, reversed=None),)
    assert (turned.source, turned.skipped) == ("facts", skipped)
    (fact,) = turned
    assert fact.question == Question("The capital of Peru is", "Quito")
    assert fact.equivalents == (Question("Peru's capital is", "Quito"),)
    assert fact.neighbours == PERU.neighbours


def test_facts_without_an_alternative_are_named():
    lines = [replace(PERU, at=f"f.jsonl:{line}", alternative=None) for line in range(1, 8)]
    with pytest.raises(FactsError) as caught:
        towards_alternatives(FactSet("f.jsonl", (PERU, *lines)))
    assert str(caught.value) == (
        "f.jsonl: 7 of 8 facts have no alternative (the first: f.jsonl:1); give each the field "
        "'alternative', a false answer of the same relation, for --alternative asks for "
        "it, or a patch that was made with it."
    )
    assert len(caught.value.faults) == 7
    assert caught.value.faults[6] == "f.jsonl:7: field 'alternative': is missing"


def test_a_fact_from_python_is_named_by_its_id():
    with pytest.raises(FactsError, match=r"1 of 1 fact has no alternative \(fact 'peru'\)"):
        towards_alternatives(FactSet("facts", (replace(PERU, line=0, alternative=None),)))
