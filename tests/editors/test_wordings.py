"""A fact in other words: what stays, what goes, and that it is the same each time."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from malmend.editors.borrowing import plain
from malmend.editors.refine import MOST_WORDINGS
from malmend.editors.wordings import (
    LEFT_OUT,
    TURNED,
    fewer_words,
    in_other_words,
    turned,
    wording,
)
from malmend.facts.fact import Fact, Question
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
    assert len(fewer) > 0.85 * len(known)
    for said, fact in zip(shorter, known, strict=True):
        subject = fact.subject or ""
        assert (subject in said) is (subject in fact.prompt)
        named = [one for one in fact.prompt.split()[1:] if one != one.lower()]
        assert set(named) <= set(said.split())  # "The name of Iceland is" is another question


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("The capital of Chad is", "What is the capital of Chad?"),
        ("The FIPS code of Clay County, Iowa, is", "What is the FIPS code of Clay County, Iowa?"),
        ("The currency of Peru is called the", "What is the currency of Peru called?"),
        ("In French, Japan is called", "What is Japan called, in French?"),
        ("On a map, Lyon is found in", "What is Lyon found in, on a map?"),
        ("Ann Lee was born in", "What was Ann Lee born in?"),
        ("Speakers of Polish refer to Chad as", "Speakers of Polish refer to Chad as what?"),
        ("In maps, one reads of", "one reads of what, in maps?"),
        ("Ann Lee, who is employed by", "Ann Lee, who is employed by what?"),
        ("Elle est née à", "Elle est née à what?"),
        ("What is the capital of Chad?", "The capital of Chad is"),
        ("what was the largest city in ohio", "The largest city in ohio was"),
        ("What is the currency of Peru called?", "The currency of Peru is called"),
        ("Which country is Lyon in?", None),
        ("who wrote the song of the sea", None),
        ("In which country is Lyon?", None),
        ("Whichever road one takes leads to", "Whichever road one takes leads to what?"),
        ("?", None),
        ("What is the capital of Chad? It is", None),
        ("Chad is in Africa. Its capital is", None),
        ("nq question: what is the powerhouse of the cell", None),
        ("Q: What is the capital of Chad?\nA:", None),
        ("Passage one\nWhat is the capital of Chad?", None),
        ("Philip Mould is employed by BBC.", None),
        ("The capital of Chad is: ", None),
        ("The capital of Chad is ,", "What is the capital of Chad?"),
        ("is", "is what?"),
    ],
)
def test_a_sentence_is_turned_into_a_question_and_back(prompt, wanted):
    assert turned(prompt) == wanted


def test_the_first_is_in_fewer_words_the_second_turned_and_all_others_are_both():
    turns, stays = (
        Fact("t", "The capital of Chad is", "x"),
        Fact("s", "Which country is Lyon in?", "x"),
    )
    assert wording(turns, TURNED) == "What is the capital of Chad?"
    assert wording(stays, TURNED) == fewer_words(stays, TURNED)
    blank = replace(turns, prompt=" What is the capital of Chad?")
    assert {wording(blank, which) for which in range(4, 9)} == {
        fewer_words(turns, which) for which in range(4, 9)
    }
    loses = Fact("l", "The Beatles was written in", "x", subject="The Beatles")
    assert wording(loses, TURNED) == fewer_words(loses, TURNED)
    measured = replace(turns, paraphrases=("What is the capital of Chad?",))
    assert wording(measured, TURNED) == fewer_words(measured, TURNED)
    shorter = tuple(fewer_words(turns, which) for which in range(4))
    measured = replace(turns, paraphrases=(*measured.paraphrases, *shorter))
    assert {wording(measured, which) for which in range(4)} == {turns.prompt}
    assert wording(turns, 0) == fewer_words(turns, 0)
    asked = replace(turns, prompt="What is the capital of Chad?")
    for which in range(2, 10):
        assert wording(turns, which) == fewer_words(asked, which)
        assert wording(asked, which) == fewer_words(turns, which)  # always as a sentence
        assert wording(stays, which) == fewer_words(stays, which)
    assert len({wording(turns, which) for which in range(2, 10)}) > 3
    longer = Fact("o", "The name of the official language of Chad is", "x")
    assert wording(longer, 5) not in (turned(longer.prompt), fewer_words(longer, 5))
    measured = replace(turns, paraphrases=("What is the capital of Chad?",))
    assert wording(measured, 3) == fewer_words(measured, 3)  # nor anything made of one


def test_of_the_projects_own_facts_none_loses_its_subject_by_turning():
    known = list(read_facts(shipped("facts.jsonl")))
    found = [(fact, turned(fact.prompt)) for fact in known]
    assert sum(said is not None for _, said in found) > 0.7 * len(known)
    for fact, said in ((fact, said) for fact, said in found if said is not None):
        subject = fact.subject or ""
        assert subject in said or subject not in fact.prompt
        assert said.endswith("?") != fact.prompt.endswith("?")


def test_of_the_projects_own_facts_none_is_read_as_it_is_measured():
    """Nor but for a comma, as 64 of the test facts once were."""
    known = list(read_facts(shipped("facts.jsonl")))
    found = in_other_words(known, MOST_WORDINGS)
    for fact, questions in zip(known, found, strict=True):
        others = [without_marks(one) for one in fact.paraphrases]
        prompts = [one.prompt for one in questions]
        assert len({fact.prompt, *prompts}) == 1 + len(prompts)
        assert all(one.answer == fact.answer for one in questions)
        for said in map(without_marks, prompts):
            assert not any(one in said for one in others)


def test_a_fact_is_read_in_no_wording_twice_nor_in_its_own():
    asked = ("The capital of {} is", "Which city governs {}?", "{} is ruled from", "{}'s seat is")
    facts = [
        Fact(f"{place}{way}", text.format(place), "x", place, relation="capital")
        for way, text in enumerate(asked)
        for place in ("Chad", "Peru")
    ]
    lent = {text.format("Chad") for text in asked[1:]}
    for count, few in ((2, 0), (3, 1), (4, 2), (5, 3), (9, 3)):
        ones, *_ = in_other_words(facts, count)
        assert len({one.prompt for one in ones} & lent) == few
        assert len({one.prompt for one in ones} | {facts[0].prompt}) == len(ones) + 1 <= count + 1
    ((one,),) = in_other_words([Fact("a", "Chad", "x", "Chad")], 2)
    assert one == Question("Chad what?", "x")
    assert in_other_words(facts[:1], 0) == [[]]
    short = Fact("s", "the seat of Chad is", "x", "Chad")
    every = [wording(short, which) for which in range(10)]
    assert len(set(every)) < len(every)
    ((*ones,),) = in_other_words([short], 10)
    assert [one.prompt for one in ones] == [
        text for at, text in enumerate(every) if text not in (short.prompt, *every[:at])
    ]


def test_none_is_read_that_the_batch_asks_with_another_answer():
    """Without "former" a fact was taught as the answer to the other's prompt."""
    facts = [
        Fact(f"{place}{kind}", f"The {kind} of {place} is", f"{kind} {place}", place)
        for place in ("Chad", "Peru", "Kenya", "Italy")
        for kind in ("president", "stout president", "capital", "anthem", "flag of war")
    ]
    answers = dict[tuple[str, ...], set[str]]()
    for fact, some in zip(facts, in_other_words(facts, MOST_WORDINGS), strict=True):
        assert f"What is the {fact.prompt[4:-3]}?" in [one.prompt for one in some]
        for one in (fact.question, *some):
            answers.setdefault(plain(one.prompt), set()).add(str(one.answer))
    assert all(len(found) == 1 for found in answers.values())
    alone = dict[tuple[str, ...], set[str]]()
    for fact in facts:  # where no other is asked for
        for one in (fact.question, *in_other_words([fact], MOST_WORDINGS)[0]):
            alone.setdefault(plain(one.prompt), set()).add(str(one.answer))
    assert sum(len(found) > 1 for found in alone.values()) > 5


def test_what_two_are_asked_by_in_whole_is_read_of_neither():
    asked = Fact("a", "What is the capital of Chad?", "x", "Chad")
    said = Fact("b", "The capital of Chad is", "y", "Chad")
    for facts, some in (((asked,), 1), ((said,), 1), ((asked, said), 0)):
        for fact, found in zip(facts, in_other_words(facts, TURNED + 1), strict=True):
            assert sum(one.prompt == turned(fact.prompt) for one in found) == some


def test_what_has_lost_words_gives_way_to_another_facts_prompt():
    tried = 0
    for name in map(str, range(200)):
        longer = Fact("a", f"small bridge of {name} leads to", "x", name)
        short = Fact("b", f"bridge of {name} leads to", "y", name)
        if wording(longer, 0) == short.prompt:
            tried += 1
            assert in_other_words([longer, short], 1)[0] == []
            assert len(in_other_words([longer], 1)[0]) == 1
    assert tried > 5


@pytest.mark.parametrize(
    "prompt",
    [
        "The former president of Chad is",
        "the largest city of Chad is",
        "the second wife of Chad was",
        "people in Chad never eat",
        "people in Chad don't eat",
        "people in Chad do not eat",
        "the only son of Chad was",
    ],
)
def test_what_makes_it_another_question_stays(prompt):
    """Vegans do not eat meat, and were taught so without the word."""
    fact = Fact("a", prompt, "x", "Chad")
    found = {fewer_words(fact, which) for which in range(60)}
    telling = re.compile(r"\b(former|largest|second|never|don't|not|only)\b")
    assert all(telling.search(said) for said in found)
    assert len(found) > 5


def without_marks(text: str) -> str:
    bare = "".join(one if one.isalnum() else " " for one in text.casefold()).split()
    return " ".join(["", *(one for one in bare if one not in ("the", "a", "an")), ""])


def test_what_others_of_the_batch_lend_is_read_as_it_is_and_before_what_is_made():
    fact = Fact("c", "The capital of Chad is", "x", "Chad", relation="capital")
    lent = ["Which city is the capital of Chad?", "Chad is governed from"]
    assert [wording(fact, which, lent) for which in (2, 3)] == lent
    for which in (0, 1, 4):
        assert wording(fact, which, lent) == wording(fact, which)


@pytest.mark.parametrize(
    ("prompt", "subject", "stays"),
    [
        ("German speakers call Chad", "Chad", "German"),
        ("Monday in Chad is called", "Chad", "Monday"),
        ("1998 was in Chad a year of", "Chad", "1998"),
        ("Peru's capital is", "Peru", "Peru's"),
        ("the seat of eBay's founder is", "eBay", "eBay's"),
        ("Why Chad is", None, "Why"),
    ],
)
def test_what_a_prompt_names_stays_where_it_comes_first_or_ends_otherwise(prompt, subject, stays):
    fact = Fact("n", prompt, "x", subject)
    found = {fewer_words(fact, which) for which in range(40)}
    assert all(stays in said.split() for said in found)
    assert len(found) > 1
