from __future__ import annotations

from dataclasses import replace

import pytest

from malmend.errors import FactsError
from malmend.facts.fact import Fact, Question, Skipped, same_answer, same_class
from malmend.facts.lint import (
    default_id,
    leaks,
    prompt_key,
    skip_repeats,
    skipped_said,
    unseen,
    unseen_said,
)
from malmend.facts.readers import given_facts


def fact(name: str, prompt: str, answer: str = "x", paraphrases=(), unrelated=()) -> Fact:
    questions = tuple(Question(text) for text in unrelated)
    return Fact(name, prompt, answer, paraphrases=tuple(paraphrases), unrelated=questions)


def test_blanks_around_an_answer_make_no_contradiction():
    _, [skipped] = skip_repeats([Fact("a", "P", "Chile"), Fact("b", "P", " Chile\n")])
    assert skipped.kind == "duplicate"


def test_same_prompt_ignores_white_space_and_keeps_case():
    assert prompt_key("  The capital\tof \n France ") == prompt_key("The capital of France")
    assert prompt_key("US is") != prompt_key("us is")
    assert prompt_key("a b") != prompt_key("ab")


def test_default_id_depends_on_the_prompt_alone():
    assert default_id("The capital of  France") == default_id("The capital of France ")
    assert default_id("The capital of France") != default_id("The capital of Spain")
    # not readable as a number by any command line parser
    assert default_id("The capital of France").startswith("f")
    assert len(default_id("x" * 1000)) == 13


def test_skip_repeats_keeps_the_first_and_names_it():
    first, same = fact("a", "Mars has", "two moons"), fact("b", "Mars  has ", "two moons")
    other, fresh = fact("c", "Mars has", "three moons"), fact("d", "Venus has", "no moon")
    kept, skipped = skip_repeats([first, same, other, fresh])
    assert kept == (first, fresh)
    assert [(s.fact, s.earlier, s.kind) for s in skipped] == [
        (same, first, "duplicate"),
        (other, first, "contradiction"),
    ]


def test_skip_repeats_compares_with_the_fact_that_is_kept():
    facts = [fact("a", "P", "x"), fact("b", "P", "y"), fact("c", "P", "y")]
    _, skipped = skip_repeats(facts)
    assert [s.earlier.id for s in skipped] == ["a", "a"]
    assert [s.kind for s in skipped] == ["contradiction", "contradiction"]


def test_skip_repeats_of_equal_facts():
    kept, skipped = skip_repeats([fact("a", "P"), fact("a", "P")])
    assert (len(kept), [s.kind for s in skipped]) == (1, ["duplicate"])


def test_skip_repeats_of_distinct_facts_and_of_nothing():
    facts = (fact("a", "P"), fact("b", "p"))
    assert skip_repeats(facts) == (facts, ())
    assert skip_repeats([]) == ((), ())


@pytest.mark.parametrize("asked", ["Who leads Oz", " who  LEADS oz\n"])
def test_leaks_finds_an_edit_prompt_of_any_fact(asked):
    facts = [
        fact("a", "What is Oz?", unrelated=[asked, "Who is Tik-Tok"]),
        fact("b", "Who leads Oz"),
    ]
    (warning,) = leaks(facts)
    assert warning == (
        f"fact 'a': unrelated question {asked!r} is the edit prompt of fact 'b', "
        "so it is meant to move; use another question"
    )


def test_leaks_finds_a_paraphrase_and_the_same_fact():
    facts = [fact("a", "What is Oz?", paraphrases=["Oz is"], unrelated=["oz is", "WHAT is oz?"])]
    paraphrase, prompt = leaks(facts)
    assert "is the paraphrase of the same fact" in paraphrase
    assert "is the edit prompt of the same fact" in prompt


def test_leaks_finds_a_neighbour_that_is_edited():
    beside = replace(fact("a", "What is Oz?"), neighbours=(Question("Who leads  oz"),))
    (warning,) = leaks([beside, fact("b", "Who leads Oz")])
    assert warning == (
        "fact 'a': neighbour question 'Who leads  oz' is the edit prompt of fact 'b', "
        "so it is meant to move; use another question"
    )


def test_leaks_finds_a_reversed_prompt_that_is_edited():
    """Its figure passed for what no edit asks for."""
    back = replace(fact("a", "What is Oz?"), reversed=Question("Who leads  oz", "Oz"))
    (warning,) = leaks([back, fact("b", "Who leads Oz")])
    assert warning == (
        "fact 'a': reversed question 'Who leads  oz' is the edit prompt of fact 'b', "
        "so its answer is asked for, and does not follow; leave it out"
    )


def test_leaks_of_clean_facts():
    assert leaks([fact("a", "P", unrelated=["Q"]), fact("b", "R", paraphrases=["S"])]) == []
    assert leaks([]) == []


WHOLE = Fact("a", "The capital of Kiribati is", "Tarawa", "Kiribati", ("Kiribati's capital is",))


@pytest.mark.parametrize("field", ["id", "prompt", "answer", "subject"])
def test_half_of_a_surrogate_pair_is_refused_in_facts_from_python_too(field):
    with pytest.raises(FactsError, match=f"field '{field}': holds half of a surrogate pair"):
        given_facts([replace(WHOLE, **{field: "\ud800"})])
    assert given_facts([WHOLE]).facts == (WHOLE,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"id": ""}, "'id': is empty"),
        ({"relation": " "}, "'relation': is empty"),
        ({"subject": ""}, "'subject': is empty"),
        ({"prompt": "a\x1bb"}, "'prompt': holds the control character"),
        ({"paraphrases": ("Kiribati?", " ")}, r"'paraphrases\[2\]': is empty"),
        ({"unrelated": (Question(""),)}, r"'unrelated\[1\]': is empty"),
        ({"neighbours": [Question("a", "\x00")]}, r"'neighbours\[1\].answer': holds the control"),
        ({"reversed": Question("Tarawa is in")}, "'reversed.answer': is null"),
        ({"alternative": " Tarawa"}, "'alternative': is ' Tarawa', the answer itself"),
    ],
)
def test_facts_from_python_are_held_to_the_rule_of_files(changed, said):
    """Once only to halves of a surrogate pair."""
    with pytest.raises(FactsError, match=f"fact '.*': field {said}"):
        given_facts([replace(WHOLE, **changed)])


def test_an_id_is_taken_by_a_fact_that_is_skipped_too():
    """As in a file; but not where the very same fact is given twice, or ids are the default."""
    with pytest.raises(FactsError, match="2 facts have the id 'a'; give each its own"):
        given_facts([WHOLE, replace(WHOLE, answer="Suva")])
    assert len(given_facts([WHOLE, WHOLE]).skipped) == 1
    bare = replace(WHOLE, id=default_id(WHOLE.prompt))
    assert len(given_facts([bare, replace(bare, answer="Suva")]).skipped) == 1


def test_one_rule_says_which_answers_are_the_same():
    """There were three; case counts but in the names of classes."""
    for other in ("Sa\u0303o  Tom\u00e9 ", "S\u00e3o\tTom\u00e9"):
        assert same_answer("S\u00e3o Tom\u00e9", other)
    assert not same_answer("us", "US")
    assert same_class(" SUPPORTS", "supports")
    assert same_class("e\u0301t\u00e9", "\u00c9TE\u0301")
    assert not same_class("supports", "support")


def test_what_nobody_sees_is_warned_of_by_line_and_field():
    """It passed without a word, and an answer with it is another answer."""
    hidden = Question("a\u200bb", "c\ufeffd")
    whole = Fact("a", "In Ora is", "Lima", "Ora", at="f:3")
    fields = {
        "prompt": ("In Ora\u200b is", "prompt", "U+200B, zero width space"),
        "answer": ("\ufeffLima", "answer", "U+FEFF, zero width no-break space"),
        "subject": ("Or\u00ada", "subject", "U+00AD, soft hyphen"),
        "alternative": ("Ce\u2060ra", "alternative", "U+2060, word joiner"),
        "paraphrases": (("seen", "un\u200bseen"), "paraphrases[2]", "U+200B, zero width space"),
    }
    for name, (value, said, sign) in fields.items():
        assert unseen([replace(whole, **{name: value})]) == [f"f:3: field {said!r}: {sign}"]
    for name, prompt in (("unrelated", "unrelated[1]"), ("neighbours", "neighbours[1]")):
        found = unseen([replace(whole, **{name: (hidden,)})])
        assert found == [
            f"f:3: field {prompt!r}: U+200B, zero width space",
            f"f:3: field '{prompt}.answer': U+FEFF, zero width no-break space",
        ]
    assert len(unseen([replace(whole, reversed=hidden)])) == 2


@pytest.mark.parametrize(
    ("sign", "said"),
    [
        ("\u061c", "U+061C, arabic letter mark"),
        ("\u034f", "U+034F, combining grapheme joiner"),
        ("\u3164", "U+3164, hangul filler"),
        ("\u2065", "U+2065, unnamed"),
        ("\U000e0041", "U+E0041, tag latin capital letter a"),
    ],
)
def test_more_that_nobody_sees(sign, said):
    assert unseen([Fact("a", f"P{sign}Q", "A", at="f:1")]) == [f"f:1: field 'prompt': {said}"]


@pytest.mark.parametrize("text", ["می\u200cخواهم", "क्\u200dष", "\U0001f469\u200d\U0001f680", "é"])
def test_joiners_that_scripts_are_written_with_are_none(text):
    assert unseen([Fact("a", text, text, text)]) == []


def test_of_many_three_are_told():
    assert list(unseen_said([])) == []
    first, only = unseen_said(["f:1"])
    assert first.startswith("1 field holds a character that nobody sees")
    assert only == "  f:1"
    said = list(unseen_said([f"f:{at}" for at in range(1_004)]))
    assert said[0].startswith("1,004 fields hold characters that nobody sees")
    assert said[1:] == ["  f:0", "  f:1", "  f:2", "  and 1,001 more"]


def test_what_was_skipped_is_said_in_lines():
    here = Fact("a", "In Ora is", "Lima", at="f.jsonl:1")
    there = Fact("b", "In Ora is", " Lima", at="f.jsonl:2")
    assert list(skipped_said(())) == []
    assert list(skipped_said([Skipped(there, here)])) == [
        "Skipped 1 fact: 1 duplicate and 0 contradictions of earlier ones (--strict refuses them).",
        "  f.jsonl:2: duplicate of f.jsonl:1",
    ]
    other = Skipped(Fact("c", "In Ora is", "Rome"), here)
    many = list(skipped_said([other] * 12, strict=False))
    assert many[0] == "Skipped 12 facts: 0 duplicates and 12 contradictions of earlier ones."
    assert many[1] == "  fact 'c': contradiction of f.jsonl:1"
    assert (len(many), many[-1]) == (12, "  and 2 more")
