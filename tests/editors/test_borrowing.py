"""Which prompts of a batch ask the same, so that one fact is asked as another is."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from malmend.editors.borrowing import MOST_TEMPLATES, Borrowing, measured
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.workbench import shipped

LANGUAGES = ["Dutch", "Finnish", "French", "German", "Italian", "Polish", "Spanish", "Swedish"]
DAYS = [f"{one}day" for one in ("Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur", "Sun")]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September"]
MONTHS += ["October", "November", "December"]


def asked(
    prompt: str, subject: str | None = "Chad", answer="x", relation: str | None = "r"
) -> Fact:
    return Fact(prompt, prompt, answer, subject, relation=relation)


def twice(prompt: str, *others: str, relation: str = "r", answer: str = "x") -> list[Fact]:
    """A prompt about Chad, and the same about two others (Ghana, Togo)."""
    names = ("Chad", *(others or ("Ghana", "Togo")))
    return [asked(prompt.replace("Chad", one), one, answer, relation) for one in names]


def lent(facts: list[Fact], fact: Fact, most: int = 99) -> set[str]:
    return set(Borrowing(facts).prompts(fact, most))


CAPITAL, GOVERNS = twice("The capital of Chad is"), twice("Which city governs Chad?")


def test_each_is_asked_as_the_other():
    both = CAPITAL + GOVERNS
    assert lent(both, CAPITAL[1]) == {"Which city governs Ghana?"}
    assert lent(both, GOVERNS[0]) == {"The capital of Chad is"}
    assert lent(both, asked("One governs Peru from", "Peru")) == {
        "The capital of Peru is",
        "Which city governs Peru?",
    }
    assert lent(both, CAPITAL[1], 0) == set()


def test_a_way_in_which_one_subject_alone_is_asked_is_not_lent():
    """As "Togo, south of Libya, is governed from" is not."""
    alone = GOVERNS[:1]
    assert lent(CAPITAL + alone, CAPITAL[1]) == set()
    assert lent(CAPITAL + alone, alone[0]) == {"The capital of Chad is"}
    assert lent(CAPITAL + alone * 3, CAPITAL[1]) == set()


@pytest.mark.parametrize(
    "changed",
    [
        {"relation": "other"},
        {"relation": None},
        {"relation": ""},
        {"subject": None},
        {"subject": " "},
        {"subject": "Cha"},
        {"subject": "had"},
    ],
    ids=str,
)
def test_of_these_nothing_is_borrowed_nor_lent(changed):
    odd = [replace(one, **changed) for one in GOVERNS]
    if changed.get("subject"):
        odd = [replace(one, subject=(one.subject or "")[:-1]) for one in GOVERNS]
        if changed["subject"] == "had":
            odd = [replace(one, subject=(one.subject or "")[1:]) for one in GOVERNS]
    assert lent(CAPITAL + odd, CAPITAL[0]) == lent(CAPITAL + odd, odd[0]) == set()


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Chad: which city governs Chad?", "Chad"),
        ("Guinea-Bissau lies", "Guinea"),
        ("New-York lies", "York"),
        ("The capital of Peru\u0301 lies", "Peru"),
    ],
    ids=["twice", "hyphen behind", "hyphen before", "mark"],
)
def test_a_subject_that_is_not_plainly_there_has_no_place(prompt, subject):
    assert lent(CAPITAL, asked(prompt, subject)) == set()


def test_signs_in_a_subject_are_only_themselves():
    fact = asked("The makers of C++ (2nd) were", "C++ (2nd)")
    assert lent(twice("One who made Chad is"), fact) == {"One who made C++ (2nd) is"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("In German, Chad is called", "In French, Chad is called", False),
        ("In German, Chad is called", "The German name of Chad is", True),
        ("In German, Chad is called", "Speakers of French call Chad", False),
        ("German speakers call Chad", "Most French speakers call Chad", False),
        ("The first wife of Chad was", "The second wife of Chad was", False),
        ("en alemán se llama Chad", "en francés se llama Chad", False),
        ("The code of Chad is", "What is the ISO code of Chad?", True),
        ("The ISO code of Chad is", "What is the FIPS code of Chad?", False),
        ("The ruler of Chad is", "Who ruled Chad in 1998?", False),
        ("Which state is Chad?", "What is the state of Chad?", True),
        ("Travellers to Chad go to", "The land of Chad is", True),
        ("an eBay seller of Chad is", "an iPod seller to Chad was", False),
        ("the capital of Chad is", "The capital of Chad is:", False),
    ],
)
def test_what_names_something_else_asks_something_else(one, other, same):
    batch = twice(one) + twice(other)
    assert lent(batch, batch[0]) == ({other} if same else set())
    assert lent(batch, batch[3]) == ({one} if same else set())


def test_a_first_word_that_another_prompt_has_small_names_nothing():
    more = twice("Travellers of Rome see Chad") + twice("most voyagers of Rome love Chad")
    assert lent(more, more[0]) == {"most voyagers of Rome love Chad"}
    more = twice("Travellers of Rome see Chad") + twice("Voyagers of Rome may love Chad")
    assert lent(more, more[0]) == set()
    more.append(asked("among travellers and voyagers", None))
    assert lent(more, more[0]) == {"Voyagers of Rome may love Chad"}


def test_two_ways_in_which_a_subject_has_two_answers_ask_two_things():
    mother, father = twice("The mother of Chad is"), twice("Chad has for a father", "Ann", "Bob")
    assert lent(mother + father, mother[1]) == {"Ghana has for a father"}  # who could know
    told = [*mother, *father, replace(father[1], prompt="The mother of Ann is", answer="y")]
    assert lent(told, mother[1]) == set()
    others = [replace(one, relation="other") for one in told[-1:]]
    assert lent(mother + father + others, mother[1]) == {"Ghana has for a father"}


def test_nor_are_both_of_two_lent_that_ask_two_things():
    parent = twice("Who is a parent of Chad?")
    mother, father = twice("The mother of Chad is"), twice("Chad has for a father", "Ann", "Bob")
    apart = replace(father[1], prompt="The mother of Ann is", answer="y")
    assert len(lent([*parent, *mother, *father, apart], parent[2])) == 1


@pytest.mark.parametrize("changed", [{}, {"relation": "other"}, {"subject": None}], ids=str)
def test_no_prompt_is_lent_that_the_batch_has_with_another_answer(changed):
    other = replace(asked("which city governs the Chad", answer="y"), **changed)
    assert lent(CAPITAL + GOVERNS[1:] + [other], CAPITAL[0]) == set()
    same = replace(other, answer="x")
    assert lent(CAPITAL + GOVERNS[1:] + [same], CAPITAL[0]) == {"Which city governs Chad?"}


def test_only_ways_that_agree_in_the_article_lend_to_one_another():
    """The one of "The Sardinian word for Monday is" is not the subject's."""
    gambia = [asked(f"The capital of the {one} is", one) for one in ("Gambia", "Congo")]
    theirs = [asked(f"Which city governs the {one}?", one) for one in ("Gambia", "Congo")]
    theirs += [asked(f"The {one} is governed from", one) for one in ("Gambia", "Congo")]
    batch = CAPITAL + GOVERNS + gambia + theirs
    states = asked("The capital of the United States is", "United States")
    assert lent(batch, states) == {
        "Which city governs the United States?",
        "The United States is governed from",
    }
    assert lent(batch, CAPITAL[0]) == {"Which city governs Chad?"}


@pytest.mark.parametrize(
    "paraphrase",
    [
        "which city governs the Chad",
        "It rains in Rome. Which city governs Chad?",
        "Which city governs",
    ],
)
def test_none_is_lent_that_is_measured(paraphrase):
    fact = replace(CAPITAL[0], paraphrases=("Nothing of it", paraphrase))
    assert lent(CAPITAL + GOVERNS, fact) == set()
    for others in (("Which town governs Chad?",), ("…", "The")):  # of these two no word is left
        other = replace(CAPITAL[0], paraphrases=others)
        assert lent(CAPITAL + GOVERNS, other) == {"Which city governs Chad?"}


def test_what_is_lent_does_not_hang_on_the_order_of_the_batch():
    words = ["capital", "city", "town", "seat", "place", "home", "house", "court"]
    facts = [one for word in words for one in twice(f"Where the {word} of Chad may be, is")]
    facts += [one for word in words for one in twice(f"Tell of Chad its {word}")]
    mixed = random.Random(0).sample(facts, len(facts))
    one, other = Borrowing(facts), Borrowing(mixed)
    assert all(one.prompts(fact, 3) == other.prompts(fact, 3) for fact in facts)
    firsts = {one.prompts(fact, 1)[0].replace(fact.subject or "", "") for fact in facts}
    assert len(firsts) > 4


def test_of_many_templates_those_are_lent_in_which_most_are_asked():
    rare = [
        one
        for index in range(2 * MOST_TEMPLATES)
        for one in twice(" ".join(["very"] * index) + " near Chad is", "Oman")
    ]
    often = [asked(f"In which place lies s{index}?", f"s{index}") for index in range(5)]
    found = lent(rare + often, asked("one sees Togo in", "Togo"))
    assert len(found) == MOST_TEMPLATES
    assert "In which place lies Togo?" in found


def test_of_the_projects_own_facts_none_is_asked_in_another_language_or_about_another_day():
    known = [fact for fact in read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    batch = Borrowing(known)
    found = [(fact, prompt) for fact in known for prompt in batch.prompts(fact, 9)]
    assert len(found) > len(known)
    slots = {"country_name": LANGUAGES, "month_name": MONTHS, "weekday_name": DAYS}
    seen = 0
    for fact, prompt in found:
        assert not measured(fact, prompt, parts=True)
        article = f"the {fact.subject}".casefold()
        assert (article in prompt.casefold()) is (article in fact.prompt.casefold())
        for slot in slots.get(fact.relation or "", ()):
            seen += slot in prompt
            assert (slot in prompt) is (slot in fact.prompt)
    assert seen > 50


@pytest.mark.parametrize("seed", range(5))
def test_ways_are_told_apart_as_if_every_pair_were_compared(seed):
    """Which of one subject in 2,000 ways took two million pairs: now those that may lend alone."""
    generator = random.Random(seed)
    ways = [f"The {one} of {{}} is" for one in ("seat", "head town", "first city", "old port")]
    ways += ["Which town governs {}?", "What do people call {}?"]
    names = ["Chad", "Ghana", "Togo", "Peru", "Mali"]
    facts = [
        asked(generator.choice(ways).format(name), name, generator.choice("xxxy"), relation)
        for name in generator.choices(names, k=40)
        for relation in generator.choices("rs", k=1)
    ]
    borrowing, given = Borrowing(facts), {}
    for fact in facts:  # the last answer counts
        way = fact.prompt.replace(str(fact.subject), "{}")
        given[fact.relation, fact.subject, way] = fact.answer
    found = set()
    for relation in "rs":
        for one, other in combinations(ways, 2):
            pair = [(*way.split("{}"), False) for way in (one, other)]
            apart = borrowing._is_apart(relation, *pair)
            assert apart == borrowing._is_apart(relation, *reversed(pair))
            wanted = any(
                given[relation, name, one] != given[relation, name, other]
                for name in names
                if {(relation, name, one), (relation, name, other)} <= given.keys()
            )
            assert apart == wanted, (relation, one, other)
            found.add(apart)
    assert found == {True, False}
