"""Which texts are held while facts are edited: none that is of one of them."""

from __future__ import annotations

import pytest

from malmend.facts.apart import apart
from malmend.facts.fact import Fact

TEXTS = (
    "What is the capital of France? Paris",
    "Paris is large, and the Seine runs through it.",
    "the first president of the united states was George Washington",
    "A capital is a city. What is in it?",
    "Route 66 crosses eight states.",
)


def fact(prompt: str, subject: str | None = None) -> Fact:
    return Fact("f", prompt, "answer", subject)


@pytest.mark.parametrize(
    ("prompt", "subject", "left_out"),
    [
        ("The capital of France is", None, {0}),
        ("The capital of France is", "France", {0}),
        ("What river runs through Paris?", None, {0, 1}),
        ("The Seine at Paris is", None, {1}),  # a text must have every name
        ("FRANCE'S capital is", "FRANCE", {0}),
        ("The first president of the United States was", None, {2}),
        ("route 66 crosses", None, {4}),
        ("a capital is", None, {3}),  # no name: every word
        ("the capital of france is", None, {0}),
        ("The capital is", None, {0}),  # no name: "The" stands in small letters too
        ("Peru has its capital at Lima or Paris", None, set()),
        ("Seine", None, {1}),
        ("?", None, set()),
        ("Lima is the capital of", None, set()),
        ("The capital of Peru is", "Peru", set()),
    ],
)
def test_a_text_that_is_of_a_fact_is_left_out(prompt, subject, left_out):
    found = apart(TEXTS, [fact(prompt, subject)])
    assert {index for index, is_free in enumerate(found) if not is_free} == left_out


def test_each_fact_leaves_out_its_own():
    facts = [fact("The capital of France is"), fact("Route 66 is in"), fact("Nauru lies in")]
    assert apart(TEXTS, facts) == [False, True, True, True, False]


def test_without_facts_or_texts_nothing_is_left_out():
    assert apart(TEXTS, []) == [True] * 5
    assert apart([], [fact("The capital of France is")]) == []
