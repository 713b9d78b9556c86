"""Paraphrases that are no other wording of their fact alone: told, and faults in strict mode."""

from __future__ import annotations

import pytest
from facts_files import MEND, faults_of, lines, own

from malmend.errors import FactsError
from malmend.facts.fact import Fact
from malmend.facts.lint import leaks, unseen
from malmend.facts.readers import given_facts, read_facts

PALAU = own("The capital of Palau is", "Ngerulmud", id="a")
NAURU = own("The capital of Nauru is", "Yaren", id="b")


def warned(save, *entries: dict) -> list[str]:
    return leaks(read_facts(save(lines(*entries))))


def test_a_paraphrase_that_is_edited_is_told_with_its_answer(save):
    """They passed without a word, and GS was scored on what the edit itself asks."""
    said = ["The capital of  Nauru is", "The capital of Palau is", "Palau's capital is"]
    assert warned(save, PALAU | {"paraphrases": said}, NAURU) == [
        "fact 'a': paraphrase 'The capital of  Nauru is' is the edit prompt of fact 'b', whose "
        "answer is 'Yaren', not 'Ngerulmud'; use another, or leave it out",
        "fact 'a': paraphrase 'The capital of Palau is' is the edit prompt of its own fact; use "
        "another, or leave it out",
    ]


@pytest.mark.parametrize(("answer", "count"), [("Yaren", 1), (" Ngerulmud ", 0)])
def test_one_paraphrase_of_two_facts_with_two_answers(save, answer, count):
    shared = {"paraphrases": ["Its capital is"]}
    found = warned(save, PALAU | shared, NAURU | shared | {"answer": answer})
    assert len(found) == count
    for one in found:
        assert one.startswith("fact 'b': paraphrase 'Its capital is' is also one of fact 'a', who")


def test_a_paraphrase_that_is_there_twice_and_one_edited_with_the_same_answer(save):
    entry = PALAU | {"paraphrases": ["Q", " Q", "The capital of Nauru is"]}
    twice, edited = warned(save, entry, NAURU | {"answer": "Ngerulmud"})
    assert twice == "fact 'a': paraphrase ' Q' is there twice; use another, or leave it out"
    assert edited.endswith("is the edit prompt of fact 'b'; use another, or leave it out")


def test_in_strict_mode_they_are_faults(save):
    path = save(lines(NAURU, PALAU | {"paraphrases": ["The capital of Nauru is"]}))
    (fault,) = faults_of(path, lambda file: read_facts(file, strict=True))
    assert fault.startswith("facts:2: paraphrase 'The capital of Nauru is' is the edit prompt of")
    path = save(lines(MEND | {"rephrase": MEND["src"]}))
    (fault,) = faults_of(path, lambda file: read_facts(file, strict=True))
    assert "is the edit prompt of its own fact" in fault
    facts = [Fact("a", "P", "x", paraphrases=("Q", "Q"))]
    assert given_facts(facts).facts == tuple(facts)
    with pytest.raises(FactsError, match="fact 'a': paraphrase 'Q' is there twice"):
        given_facts(facts, strict=True)


def test_clean_facts_pass_in_strict_mode(save):
    path = save(lines(PALAU | {"paraphrases": ["Palau's capital is"]}, NAURU))
    assert len(read_facts(path, strict=True)) == 2


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("\u200e", "left-to-right mark"),
        ("\u200f", "right-to-left mark"),
        ("\u2028", "line separator"),
        ("\u2029", "paragraph separator"),
        ("\u202a", "left-to-right embedding"),
        ("\u202e", "right-to-left override"),
        ("\u2064", "invisible plus"),
        ("\u2066", "left-to-right isolate"),
        ("\u2069", "pop directional isolate"),
        ("\u206f", "nominal digit shapes"),
    ],
)
def test_marks_of_direction_and_separators_are_seen_by_nobody_too(sign, name):
    """They passed without the warning that a zero width space gives."""
    (warning,) = unseen([Fact("a", f"In{sign} Ora is", "Lima", at="f:2")])
    assert warning == f"f:2: field 'prompt': U+{ord(sign):04X}, {name}"


def test_blanks_that_are_seen_are_none():
    assert unseen([Fact("a", "a\u00a0b\u2009c\u202fd\u3000e\tf\ng", "x")]) == []
