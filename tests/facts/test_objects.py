"""What stands in place of JSON objects is one fault, and says what the file seems to be."""

from __future__ import annotations

import json

import pytest
from facts_files import MEND, faults_of, lines, only_fault, own, without

from malmend.facts.readers import read_facts, read_questions

ENTRY = own(unrelated=[{"prompt": "Q", "answer": "x"}], paraphrases=["R"])
APART = "put each object on one line, or all in one list"
TWICE = json.dumps(ENTRY, indent=1) + "\n" + json.dumps(own("S"), indent=1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (json.dumps(ENTRY, indent=1), "facts:1: is one object over several lines, to line 13; put"),
        ("\n\n" + TWICE, f"facts:3: is one object over several lines, to line 15; {APART}"),
        ('{\n "prompt": "P",,\n}', f"facts:1: begins an object over several lines; {APART}"),
        (json.dumps({"facts": [ENTRY]}), "facts:1: holds a list under 'facts'; give that "),
        (json.dumps({"n": 1, "data": [ENTRY]}, indent=1), "facts:1: holds a list under 'data'; "),
        ('"prompt","answer"\n"P, or",x\n', "facts: looks like CSV; malmend reads JSON and JSON Li"),
        ("id;prompt;answer\n1;P;x\n", "facts: looks like CSV; "),
        ("prompt\tanswer\nP\tx\n", "facts: looks like TSV; "),
        ("# mine\nfacts:\n- prompt: P\n  answer: x\n", "facts: looks like YAML; "),
        ("- {prompt: P, answer: x}\n- {prompt: Q, answer: x}\n", "facts: looks like YAML; "),
        ("{prompt: P, answer: x}\n{prompt: Q, answer: x}\n", "facts: looks like YAML; "),
    ],
)
def test_they_are_one_fault(save, text, fault):
    """Each line of them was a fault of its own, and some told all formats each time."""
    found = only_fault(save(text))
    assert found.startswith(fault)
    assert found.count("MEND / zsRE") == ("looks like" in fault)


def test_each_broken_line_of_json_lines_is_still_told(save):
    text = '{"prompt": "P",,}\n{"prompt": "Q" "x"}\n'
    assert [fault.split(";")[0][:27] for fault in faults_of(save(text))] == [
        "facts:1: is not valid JSON ",
        "facts:2: is not valid JSON ",
    ]
    assert len(faults_of(save('{"prompt": "P"} {"prompt": "Q"}\n{'))) == 2


def test_what_is_no_object_does_not_tell_all_formats(save):
    found = faults_of(save('[1, "x", [2]]'))
    assert len(found) == 3
    assert not any("zsRE" in fault for fault in found)


def test_plain_prompts_may_hold_commas_and_colons(save):
    text = "The prompt, or question: answer\nfacts and lies, all\n"
    assert [one.prompt for one in read_questions(save(text))] == text.splitlines()


@pytest.mark.parametrize(
    ("near", "meant"),
    [("rephrse", "rephrase"), ("answer", "answers"), ("loc_answer", "loc_ans"), ("alts", "alt")],
)
def test_a_misspelt_field_of_zsre_is_named(save, near, meant):
    """Its text was lost without a word."""
    path = save(json.dumps([without(MEND, meant) | {near: MEND[meant]}]))
    said = f"facts:1: entry 1: unknown field '{near}'; did you mean '{meant}'?"
    assert faults_of(path)[0] == said
    assert faults_of(path).count(said) == 1
    assert faults_of(path, read_questions)[0] == said


def test_names_near_a_field_of_zsre_that_is_there_are_other_fields(save):
    facts = read_facts(save(lines(MEND))).facts
    more = {"rephrase_count": 1, "alternatives": [], "answer": "x", "object": "Chile", "src_id": 3}
    assert read_facts(save(lines(MEND | more))).facts == facts


def test_one_answer_of_zsre_may_be_a_string(save):
    facts = read_facts(save(lines(MEND | {"answers": "Chile"}))).facts
    assert facts == read_facts(save(lines(MEND))).facts
