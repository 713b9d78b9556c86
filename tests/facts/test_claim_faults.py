"""Faults in the two formats of fact verification."""

from __future__ import annotations

import json

import pytest
from facts_files import CLAIM, KILT, faults_of, lines, only_fault, without

from malmend.facts.readers import read_facts, read_questions

LABEL = "give the claim's label, or leave the field out and give 'alt'"
OUTPUT = "give a list of objects, one of them with the claim's label as 'answer'"


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (without(CLAIM, "prompt"), "field 'prompt': is missing; give the text that the answer"),
        (CLAIM | {"prompt": " "}, "field 'prompt': is empty; "),
        (CLAIM | {"prompt": ["P"]}, "field 'prompt': is a list, not a string; "),
        (without(CLAIM, "label", "alt"), f"field 'label': is missing; {LABEL}"),
        (without(CLAIM, "label") | {"alt": ""}, f"field 'label': is missing; {LABEL}"),
        (without(CLAIM, "label") | {"alt": 3}, "field 'alt': is the number 3, not a string; "),
        (without(CLAIM, "alt") | {"label": None}, "field 'label': is null, not a string; "),
        (CLAIM | {"label": ""}, f"field 'label': is empty; {LABEL}"),
        (CLAIM | {"label": True}, f"field 'label': is true, not a string; {LABEL}"),
        (CLAIM | {"label": 1}, f"field 'label': is the number 1, not a string; {LABEL}"),
        (CLAIM | {"alt": ["x"]}, "field 'alt': is a list, not a string; give a false answer"),
        (
            CLAIM | {"equiv_prompt": {}},
            "field 'equiv_prompt': is an object, not a list; give a list of other wordings of the "
            "claim, or one as a string",
        ),
        (CLAIM | {"equiv_prompt": ""}, "field 'equiv_prompt': is empty; give a list of other"),
        (CLAIM | {"equiv_prompt": ["A", 2]}, "field 'equiv_prompt[2]': is the number 2, not a st"),
        (CLAIM | {"unrel_prompt": ""}, "field 'unrel_prompt': is empty; give an unrelated claim"),
        (CLAIM | {"unrel_prompt": ["Q"]}, "field 'unrel_prompt': is a list, not a string; "),
        (
            CLAIM | {"unrel_ans": 0},
            "field 'unrel_ans': is the number 0, not a string; give the label of 'unrel_prompt'",
        ),
        (CLAIM | {"subject": []}, "field 'subject': is a list, not a string; "),
        (CLAIM | {"relation": 3}, "field 'relation': is the number 3, not a string; "),
        (KILT | {"input": ""}, "field 'input': is empty; give the claim"),
        (KILT | {"input": None}, "field 'input': is null, not a string; give the claim"),
        (without(KILT, "input"), "field 'input': is missing; give the claim"),
        (without(KILT, "output"), f"field 'output': is missing; {OUTPUT}"),
        (KILT | {"output": None}, f"field 'output': is null, not a list; {OUTPUT}"),
        (KILT | {"output": []}, f"field 'output': is an empty list; {OUTPUT}"),
        (KILT | {"output": "SUPPORTS"}, "field 'output': is the string 'SUPPORTS', not a list; "),
        (KILT | {"output": ["x"]}, "field 'output[1]': is the string 'x', not an object; "),
        (KILT | {"output": [{}, {"answer": ""}]}, "field 'output': has no 'answer' in any object"),
        (
            KILT | {"output": [{"answer": "x"}, {"answer": 2}]},
            f"field 'output[2].answer': is the number 2, not a string; {OUTPUT}",
        ),
        (KILT | {"output": [{"answer": " "}]}, "field 'output[1].answer': is empty; "),
        (KILT | {"id": 1.5}, "field 'id': is the number 1.5, not a string; "),
        (KILT | {"id": True}, "field 'id': is true, not a string; "),
        (
            KILT | {"filtered_rephrases": "A"},
            "field 'filtered_rephrases': is the string 'A', not a list; give a list of other word",
        ),
        (KILT | {"filtered_rephrases": [" "]}, "field 'filtered_rephrases[1]': is empty; "),
        (
            without(KILT, "filtered_rephrases") | {"rephrases": [1]},
            "field 'rephrases[1]': is the number 1, not a string; ",
        ),
    ],
)
def test_fault_of_a_field(save, entry, fault):
    assert only_fault(save(lines(entry))).startswith(f"facts:1: {fault}")


@pytest.mark.parametrize(
    ("entry", "near", "meant"),
    [
        (CLAIM, "equiv_promt", "equiv_prompt"),
        (CLAIM, "unrel_prompts", "unrel_prompt"),
        (CLAIM, "unrel_answer", "unrel_ans"),
        (CLAIM, "alts", "alt"),
        (CLAIM, "labels", "label"),
        (KILT, "filtered_rephrase", "filtered_rephrases"),
        (KILT, "rephrase", "rephrases"),
    ],
)
def test_a_misspelt_field_is_named(save, entry, near, meant):
    dropped = "filtered_rephrases" if entry is KILT else meant
    path = save(lines(without(entry, dropped) | {near: entry.get(meant, ["A"])}))
    assert f"facts:1: unknown field '{near}'; did you mean '{meant}'?" in faults_of(path)
    found = faults_of(path, read_questions)
    assert found == [f"facts:1: unknown field '{near}'; did you mean '{meant}'?"]


@pytest.mark.parametrize("reader", [read_facts, read_questions])
def test_a_misspelt_answer_of_nq_open_is_named(save, reader):
    """As a question its answer was lost without a word."""
    path = save(lines({"question": "who?", "answers": ["A"]}))
    found = faults_of(path, reader)
    assert found[0] == "facts:1: unknown field 'answers'; did you mean 'answer'?"


def test_a_misspelt_claim_is_named(save):
    claims = save(lines(without(CLAIM, "prompt") | {"promt": "P"}))
    assert [fault.split(";")[0] for fault in faults_of(claims)] == [
        "facts:1: unknown field 'promt'",
        "facts:1: field 'prompt': is missing",
    ]
    kilt = save(lines(KILT, without(KILT, "input", "id") | {"imput": "P"}))
    assert faults_of(kilt) == [
        "facts:2: unknown field 'imput'; did you mean 'input'?",
        "facts:2: field 'input': is missing; give the claim",
    ]


def test_fields_that_tell_misspelt_in_the_whole_file(save):
    entry = {"prompt": "P", "equiv_promt": ["Q"], "label": "SUPPORTS"}
    assert faults_of(save(lines(entry, entry | {"prompt": "R"}))) == [
        f"facts:{line}: unknown field 'equiv_promt'; did you mean 'equiv_prompt'?"
        for line in (1, 2)
    ]


def test_names_near_a_field_that_is_there_are_other_fields(save):
    facts = read_facts(save(lines(CLAIM))).facts
    more = {"label_id": 0, "prompts": 3, "object": "Chile", "prompt_id": 7}
    assert read_facts(save(lines(CLAIM | more))).facts == facts
    assert read_facts(save(lines(KILT | {"outputs": 1, "idx": 2})))[0].answer == "SUPPORTS"


def test_claims_with_no_claim_in_the_whole_file(save):
    bare = {"label": "SUPPORTS", "unrel_ans": "REFUTES"}
    assert only_fault(save(lines(bare))).startswith("facts:1: field 'prompt': is missing; ")
    bare = {"id": 3, "output": KILT["output"]}
    assert only_fault(save(lines(bare))).startswith("facts:1: field 'input': is missing; ")


def test_kilt_ids_are_unique(save):
    path = save(lines(KILT, KILT | {"id": 75397, "input": "P"}))
    assert only_fault(path).startswith("facts:2: field 'id': '75397' is taken by facts:1; ")


def test_all_faults_of_claims_at_once_with_line_and_entry(save):
    bad = CLAIM | {"label": 1, "equiv_prompt": [2], "unrel_prompt": ""}
    path = save(f"[{json.dumps(CLAIM)},\n{json.dumps(bad)},\n{json.dumps({'label': 'x'})}]")
    assert [[*fault.split(":", 3)[:3], fault.split("'")[1]] for fault in faults_of(path)] == [
        ["facts", "2", " entry 2", "equiv_prompt[1]"],
        ["facts", "2", " entry 2", "unrel_prompt"],
        ["facts", "2", " entry 2", "label"],
        ["facts", "3", " entry 3", "prompt"],
    ]
