"""Which prompts of a batch ask the same, so that one fact is asked as another is."""

from __future__ import annotations

import pytest

from malmend.editors.borrowing import MOST, Borrowing
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.workbench import shipped


def asked(
    prompt: str, subject: str | None = "Chad", answer="x", relation: str | None = "r"
) -> Fact:
    return Fact(prompt, prompt, answer, subject, relation=relation)


LIMA, CHAD = asked("The capital of Peru is", "Peru"), asked("Which city governs Chad?")


def test_each_is_asked_as_the_other():
    batch = Borrowing([LIMA, CHAD])
    assert batch.prompts(LIMA) == ["Which city governs Peru?"]
    assert batch.prompts(CHAD) == ["The capital of Chad is"]


def test_a_fact_that_is_not_of_the_batch_is_asked_as_the_batch_is():
    other = asked("One governs Togo from", "Togo")
    assert sorted(Borrowing([LIMA, CHAD]).prompts(other)) == [
        "The capital of Togo is",
        "Which city governs Togo?",
    ]


@pytest.mark.parametrize(
    "other",
    [
        asked("Which city governs Chad?", relation="other"),
        asked("Which city governs Chad?", relation=None),
        asked("Which city governs Chad?", subject=None),
        asked("Which city governs Chadians?"),
        asked("Chad: which city governs Chad?"),
        asked("The capital of Chad is"),
    ],
    ids=["relation", "none", "no subject", "part of a word", "twice", "the same"],
)
def test_of_these_nothing_is_borrowed_nor_lent(other):
    batch = Borrowing([LIMA, other])
    assert batch.prompts(LIMA) == batch.prompts(other) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("In German, Chad is called", "In French, Chad is called", False),
        ("In German, Chad is called", "The German name of Chad is", True),
        ("In German, Chad is called", "Speakers of French call Chad", False),
        ("German speakers call Chad", "French speakers call Chad", False),
        ("The code of Chad is", "The ISO code of Chad is", True),
        ("The ISO code of Chad is", "The FIPS code of Chad is", False),
        ("The ruler of Chad is", "The ruler of Chad in 1998 was", False),
        ("Which state is Chad?", "What is the state of Chad?", True),
        ("Travellers to Chad go to", "The land of Chad is", True),
    ],
)
def test_what_names_something_else_asks_something_else(one, other, same):
    batch = Borrowing([asked(one), asked(other.replace("Chad", "Peru"), "Peru")])
    assert batch.prompts(asked(one)) == [other] * same
    assert batch.prompts(asked(other)) == [one] * same


def test_a_first_word_that_another_prompt_has_small_names_nothing():
    batch = [asked("Speakers of German call Chad"), asked("The German name of Peru is", "Peru")]
    assert Borrowing(batch).prompts(batch[0]) == ["The German name of Chad is"]
    more = [asked("Travellers of Rome see Chad"), asked("Voyagers of Rome see Peru", "Peru")]
    assert Borrowing(more).prompts(more[0]) == []
    more += [asked("among travellers and voyagers, Togo", "Togo")]
    assert "Voyagers of Rome see Chad" in Borrowing(more).prompts(more[0])


def test_two_prompts_to_which_a_subject_has_two_answers_ask_two_things():
    mother = asked("The mother of Ann is", "Ann", "Eve")
    batch = [mother, asked("The father of Bob is", "Bob", "Tom")]
    assert Borrowing(batch).prompts(mother) == ["The father of Ann is"]  # who could know
    batch.append(asked("The father of Ann is", "Ann", "Jim"))
    assert Borrowing(batch).prompts(mother) == []


def test_the_order_is_the_facts_own_and_always_the_same():
    facts = [asked(f"{word} is where Chad lies") for word in ["here", "there", "near", "far"]]
    facts += [asked(f"{one} {index} lies", str(index)) for index, one in enumerate("abcdefgh")]
    batch = Borrowing(facts)
    assert all(batch.prompts(fact) == Borrowing(facts).prompts(fact) for fact in facts)
    first = [batch.prompts(fact)[0].replace(fact.subject or "", "") for fact in facts]
    assert len(set(first)) > 2


def test_of_many_templates_those_are_lent_that_most_are_asked_by():
    rare = [asked(f"{'very ' * index}near Chad is") for index in range(3 * MOST)]
    often = [asked(f"The place of s{index} is", f"s{index}") for index in range(5)]
    lent = Borrowing([*rare, *often]).prompts(asked("one sees Togo in", "Togo"))
    assert len(lent) == MOST
    assert "The place of Togo is" in lent


def test_of_the_projects_own_facts_none_is_asked_in_another_language_or_about_another_day():
    known = [fact for fact in read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    batch = Borrowing(known)
    lent = [(fact, prompt) for fact in known for prompt in batch.prompts(fact)]
    assert len(lent) > 2 * len(known)
    slots = {"country_name": LANGUAGES, "month_name": MONTHS, "weekday_name": DAYS}
    seen = 0
    for fact, prompt in lent:
        for slot in slots.get(fact.relation or "", ()):
            seen += slot in prompt
            assert (slot in prompt) is (slot in fact.prompt)
    assert seen > 100


LANGUAGES = ["Dutch", "Finnish", "French", "German", "Italian", "Polish", "Spanish", "Swedish"]
DAYS = [f"{one}day" for one in ("Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur", "Sun")]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September"]
MONTHS += ["October", "November", "December"]
