"""A fact in fewer words: what stays, what goes, and that it is the same each time."""

from __future__ import annotations

from malmend.editors.wordings import LEFT_OUT, fewer_words
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.workbench import shipped

SAID = Fact("n", "What was the native language of Jan (Peter) Balkenende?", "Dutch")


def words(fact: Fact, which: int = 0) -> list[str]:
    return fewer_words(fact, which).split()


def test_words_of_the_subject_stay_in_their_order():
    fact = Fact("n", SAID.prompt, "Dutch", subject="Jan Peter Balkenende")
    found = [words(fact, which) for which in range(200)]
    assert all(one[-3:] == ["Jan", "(Peter)", "Balkenende?"] for one in found)
    everything = fact.prompt.split()
    assert all([word for word in everything if word in one] == one for one in found)
    others = everything[:-3]
    for word in others:
        gone = sum(word not in one for one in found) / len(found)
        assert abs(gone - LEFT_OUT) < 0.1  # three standard deviations
    assert len({tuple(one) for one in found}) > 20


def test_of_a_fact_without_subject_names_and_numbers_stay():
    fact = Fact("c", "who wrote the 2nd book of eBay and McDonald in spring", "Ann")
    for which in range(50):
        assert {"2nd", "eBay", "McDonald"} <= set(words(fact, which))
    assert any("book" not in words(fact, which) for which in range(50))


def test_a_prompt_that_would_be_left_without_a_word_stays_whole():
    found = {fewer_words(Fact("c", "it is", "Ann"), which) for which in range(60)}
    assert found == {"it is", "it", "is"}


def test_the_same_for_the_same_and_others_for_another():
    assert fewer_words(SAID, 0) == fewer_words(Fact("other", SAID.prompt, "Frisian"), 0)
    assert fewer_words(SAID, 0) == "What the native of Jan (Peter) Balkenende?"


def test_of_the_projects_own_facts_most_lose_a_word_and_none_its_subject():
    known = list(read_facts(shipped("facts.jsonl")))[:500]
    shorter = [fewer_words(fact, 0) for fact in known]
    fewer = [said for said, fact in zip(shorter, known, strict=True) if said != fact.prompt]
    assert len(fewer) > 450
    for said, fact in zip(shorter, known, strict=True):
        subject = fact.subject or ""
        assert (subject in said) is (subject in fact.prompt)
