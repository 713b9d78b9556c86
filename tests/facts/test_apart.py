"""Which texts are held while facts are edited: none that is of one of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malmend.facts.apart import _holds, _shortest, apart
from malmend.facts.fact import Fact

TEXTS = (
    "What is the capital of France? Paris",
    "Paris is large, and the Seine runs through it.",
    "the first president of the united states was George Washington",
    "A capital is a city. What is in it?",
    "Route 66 crosses eight states.",
    "When did the Titanic sink? 1912",
    "what the titanic was",
    "The NASA budget grew by 1969 coins; the straße was closed.",
    "Beyonce\u0301 sings of the Titanic deep.",
    "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece",
)


def fact(prompt: str, subject: str | None = None) -> Fact:
    return Fact("f", prompt, "answer", subject)


@pytest.mark.parametrize(
    ("prompt", "subject", "left_out"),
    [
        ("The capital of France is", None, {0}),
        ("The capital of France is", "France", {0}),
        ("What river runs through Paris?", None, {0, 1}),
        ("The Seine at Paris is", None, {0, 1}),  # so few have either that one tells
        ("FRANCE'S capital is", None, {0}),
        ("Barack Hussein Seine was", "Barack Hussein Seine", {1}),
        ("The first president of the United States was", None, {2, 4}),
        ("route 66 crosses", None, {4}),
        ("in the year 1969 it", None, {7}),
        ("the budget of NASA is", None, {7}),
        ("The Strasse lies", "Strasse", {7}),
        ("a capital is", None, {0, 3}),  # no name: every word
        ("the capital of france is", None, {0}),
        ("The capital is", None, {0}),  # no name: "The" stands in small letters too
        ("Titanic sank in April", None, set()),  # three have the word: all its words must be there
        ("Titanic Deep sank", None, {8}),
        ("Beyonc\u00e9's voice", None, {8}),
        ("\u6cd5\u56fd\u7684", "\u6cd5\u56fd", {9}),
        ("Lima is the capital of", None, set()),
        ("The capital of Peru is", "Peru", set()),
        ("Seine", None, {1}),
        ("?", None, set()),
        ("", "", set()),
        ("", "\u00a0", set()),  # a blank, which every text has
    ],
)
def test_a_text_that_is_of_a_fact_is_left_out(prompt, subject, left_out):
    found = apart(TEXTS, [fact(prompt, subject)])
    assert {index for index, is_free in enumerate(found) if not is_free} == left_out


def test_each_fact_leaves_out_its_own():
    facts = [fact("The capital of France is"), fact("Route 66 is in"), fact("Nauru lies in")]
    assert apart(TEXTS, facts) == [False, True, True, True, False, *[True] * 5]


def test_without_facts_or_texts_nothing_is_left_out():
    assert apart(TEXTS, []) == [True] * 10
    assert apart([], [fact("The capital of France is")]) == []


@settings(max_examples=500)
@given(
    st.text("abé法国", max_size=12),
    st.lists(st.text("abé法国", max_size=5).filter(lambda one: not one.isascii()), max_size=12),
)
def test_subjects_are_found_as_if_each_were_looked_for(text, subjects):
    """Which took facts times texts: 20 s for 8,000 facts."""
    assert _holds(text, _shortest(set(subjects))) == any(one in text for one in subjects)
