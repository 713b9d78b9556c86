"""The two formats of fact verification: MALMEN's FEVER files and KILT's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from facts_files import CLAIM, KILT, MEND, faults_of, lines, only_fault, own, without

from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Question
from malmend.facts.lint import default_id
from malmend.facts.readers import read_facts, read_questions

DATA = Path(os.environ.get("MALMEND_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def one(save, entry: dict):
    (fact,) = read_facts(save(json.dumps([entry])))
    return fact


# --- MALMEN / FEVER


def test_claim_format(save):
    fact = one(save, CLAIM | {"subject": "Lake Ora", "relation": "lies-in", "evidence": 3})
    assert (fact.id, fact.line) == (default_id(CLAIM["prompt"]), 1)
    assert (fact.prompt, fact.answer, fact.alternative) == (CLAIM["prompt"], "SUPPORTS", "REFUTES")
    assert fact.paraphrases == tuple(CLAIM["equiv_prompt"])
    assert fact.unrelated == (Question("Mount Ina is a volcano .", "REFUTES"),)
    assert (fact.subject, fact.relation, fact.tags) == ("Lake Ora", "lies-in", ("lies-in",))


def test_a_claim_in_json_lines(save):
    assert read_facts(save(lines(CLAIM)))[0].answer == "SUPPORTS"


@pytest.mark.parametrize("kept", ["equiv_prompt", "unrel_prompt"])
def test_either_field_tells_a_claim(save, kept):
    fact = one(save, {name: CLAIM[name] for name in ("prompt", "label", kept)})
    assert (fact.answer, fact.alternative) == ("SUPPORTS", None)
    assert bool(fact.paraphrases) == (kept == "equiv_prompt")
    assert bool(fact.unrelated) == (kept == "unrel_prompt")


def test_other_wordings_may_be_one_string_and_are_each_taken_once(save):
    assert one(save, CLAIM | {"equiv_prompt": "A"}).paraphrases == ("A",)
    assert one(save, CLAIM | {"equiv_prompt": ["A", "B", "A"]}).paraphrases == ("A", "B")
    assert one(save, CLAIM | {"equiv_prompt": []}).paraphrases == ()
    assert one(save, CLAIM | {"equiv_prompt": None}).paraphrases == ()


@pytest.mark.parametrize("label", [{}, {"label": None}])
def test_without_a_label_the_edit_aims_at_alt(save, label):
    fact = one(save, without(CLAIM, "label") | label)
    assert (fact.answer, fact.alternative) == ("REFUTES", None)
    assert fact.unrelated == (Question("Mount Ina is a volcano .", "REFUTES"),)


@pytest.mark.parametrize("alt", [None, "", "SUPPORTS", " SUPPORTS"])
def test_claim_alt_that_is_none(save, alt):
    fact = one(save, CLAIM | {"alt": alt})
    assert (fact.answer, fact.alternative) == ("SUPPORTS", None)


def test_labels_are_any_text(save):
    fact = one(save, CLAIM | {"label": "NOT ENOUGH INFO", "alt": "perhaps", "unrel_ans": "ja"})
    assert (fact.answer, fact.alternative) == ("NOT ENOUGH INFO", "perhaps")
    assert fact.unrelated[0].answer == "ja"


def test_claims_turn_towards_the_opposite_label(save):
    (fact,) = towards_alternatives(read_facts(save(json.dumps([CLAIM]))))
    assert (fact.answer, fact.alternative) == ("REFUTES", None)


def test_repeated_claims_are_skipped(save):
    facts = read_facts(save(json.dumps([CLAIM, CLAIM, CLAIM | {"label": "REFUTES"}])))
    assert len(facts) == 1
    assert [skipped.kind for skipped in facts.skipped] == ["duplicate", "contradiction"]


def test_questions_from_claims(save):
    path = save(json.dumps([CLAIM, without(CLAIM, "unrel_ans")]))
    assert read_questions(path) == (
        Question("Mount Ina is a volcano .", "REFUTES"),
        Question("Mount Ina is a volcano ."),
    )


def test_questions_from_claims_without_an_unrelated_one(save):
    bare = without(CLAIM, "unrel_prompt", "unrel_ans")
    # 'alt' is what an edit aims at: it is no answer of a question that must not move
    path = save(json.dumps([bare, without(bare, "label"), bare | {"unrel_prompt": None}]))
    assert read_questions(path) == (
        Question(CLAIM["prompt"], "SUPPORTS"),
        Question(CLAIM["prompt"]),
        Question(CLAIM["prompt"], "SUPPORTS"),
    )


# --- KILT / FEVER


def test_kilt_format(save):
    (fact,) = read_facts(save(lines(KILT)))
    assert (fact.id, fact.line) == ("75397", 1)
    assert (fact.prompt, fact.answer, fact.alternative) == (KILT["input"], "SUPPORTS", None)
    assert fact.paraphrases == tuple(KILT["filtered_rephrases"])
    assert (fact.unrelated, fact.tags) == ((), ())


def test_kilt_needs_only_input_and_output(save):
    (fact,) = read_facts(save(lines({"input": "P", "output": [{"answer": "REFUTES"}]})))
    assert (fact.id, fact.answer, fact.paraphrases) == (default_id("P"), "REFUTES", ())


def test_kilt_ids_may_be_numbers(save):
    entries = [KILT | {"id": number, "input": f"P{number}"} for number in (75397, 0, None)]
    facts = read_facts(save(lines(*entries)))
    assert [fact.id for fact in facts] == ["75397", "0", default_id("PNone")]


@pytest.mark.parametrize("first", [{}, {"provenance": []}, {"answer": None}, {"answer": ""}])
def test_the_first_output_that_has_an_answer(save, first):
    path = save(lines(KILT | {"output": [first, *KILT["output"]]}))
    assert read_facts(path)[0].answer == "SUPPORTS"


def test_filtered_rephrases_go_before_all_rephrases(save):
    # the unfiltered ones are then not looked at: one release has lists of lists there
    both = KILT | {"rephrases": [["A"], 7]}
    assert read_facts(save(lines(both)))[0].paraphrases == tuple(KILT["filtered_rephrases"])
    assert read_facts(save(lines(both | {"filtered_rephrases": []})))[0].paraphrases == ()
    other = without(KILT, "filtered_rephrases") | {"rephrases": ["A", KILT["input"], "B", "A"]}
    assert read_facts(save(lines(other)))[0].paraphrases == ("A", "B")


def test_questions_from_kilt(save):
    path = save(lines(KILT, without(KILT, "output"), KILT | {"output": None}))
    assert read_questions(path) == (
        Question(KILT["input"], "SUPPORTS"),
        Question(KILT["input"]),
        Question(KILT["input"]),
    )


# --- which format it is


def test_own_facts_and_questions_are_still_told(save):
    assert read_facts(save(lines(own())))[0].answer == "two moons"
    assert read_questions(save(lines({"prompt": "P"}, own()))) == (
        Question("P"),
        Question("Mars has", "two moons"),
    )


@pytest.mark.parametrize("name", ["equiv_prompt", "unrel_prompt", "label", "input", "output"])
def test_a_prompt_with_an_answer_is_malmends_own(save, name):
    # else the answer would be dropped without a word
    path = save(lines(own(alternative="x", **{name: "Q"})))
    for reader in read_facts, read_questions:
        assert only_fault(path, reader).startswith(f"facts:1: unknown field '{name}'; ")


@pytest.mark.parametrize("more", [{"input": "Q"}, {"equiv_prompt": "Q"}, {"label": "x"}])
def test_other_formats_keep_their_objects(save, more):
    assert read_facts(save(json.dumps([MEND | more])))[0].answer == "Chile"
    assert read_facts(save(lines({"question": "who", "answer": "Ada"} | more)))[0].answer == "Ada"


@pytest.mark.parametrize("place", [0, 1])
def test_a_claim_without_the_fields_that_tell_is_told_by_the_others(save, place):
    entries = [CLAIM, CLAIM]
    entries[place] = {"prompt": "P", "label": "REFUTES", "alt": "SUPPORTS"}
    fact = read_facts(save(json.dumps(entries)))[place]
    assert (fact.prompt, fact.answer, fact.alternative) == ("P", "REFUTES", "SUPPORTS")


def test_a_prompt_alone_among_own_facts_is_malmends_own(save):
    found = faults_of(save(lines({"prompt": "P"}, own(), CLAIM)))
    assert found[0].startswith("facts:1: field 'answer': is missing; ")
    assert found[1:] == [
        "facts:3: field 'equiv_prompt' is of the MALMEN / FEVER format, but the file is in the "
        "malmend one; keep one format per file"
    ]


def test_mixed_formats_with_claims(save):
    assert faults_of(save(lines(CLAIM, own(), KILT, MEND))) == [
        "facts:2: field 'answer' is of the malmend format, but the file is in the MALMEN / FEVER "
        "one; keep one format per file",
        "facts:3: field 'input' is of the KILT / FEVER format, but the file is in the MALMEN / "
        "FEVER one; keep one format per file",
        "facts:4: field 'src' is of the MEND / zsRE format, but the file is in the MALMEN / FEVER "
        "one; keep one format per file",
    ]
    assert [fault.split(",")[0] for fault in faults_of(save(lines(KILT, CLAIM, own())))] == [
        "facts:2: field 'equiv_prompt' is of the MALMEN / FEVER format",
        "facts:3: field 'prompt' is of the malmend format",
    ]


# --- real files


@pytest.mark.skipif(
    not (DATA / "claims").is_dir(), reason=f"no claims in {DATA}; name their folder in MALMEND_DATA"
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_real_file_is_read_whole(split):
    path = DATA / "claims" / f"{split}.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    facts = read_facts(path)
    assert len(facts) + len(facts.skipped) == len(entries) > 4_000
    for fact in facts:
        entry = entries[fact.line - 1]
        assert (fact.prompt, fact.answer) == (entry["prompt"], entry["label"])
        assert fact.alternative == entry["alt"]
        assert fact.paraphrases == tuple(entry["equiv_prompt"])
        assert fact.unrelated == (Question(entry["unrel_prompt"], entry["unrel_ans"]),)
        assert (fact.subject, fact.relation) == (entry["subject"], entry["relation"])
    assert read_questions(path) == tuple(
        Question(entry["unrel_prompt"], entry["unrel_ans"]) for entry in entries
    )
