from __future__ import annotations

import hashlib
import json
import re

import pytest
from facts_files import MEND, lines, only_fault, own
from hypothesis import example, given, settings
from hypothesis import strategies as st

from malmend.errors import FactsError, MalmendError
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.entry import EXPECTED
from malmend.facts.fact import Fact, FactSet, Question, facts_digest
from malmend.facts.formats import OWN_FIELDS
from malmend.facts.lint import skipped_said, unseen
from malmend.facts.readers import read_facts, read_questions, read_text

# --- malmend's own format


def test_own_format_with_all_fields(save):
    path = save(
        lines(
            {
                "id": "m1",
                "subject": "Mars",
                "prompt": "Mars has",
                "answer": "two moons",
                "paraphrases": ["The planet Mars has"],
                "unrelated": ["Venus has", {"prompt": "Earth has", "answer": "one moon"}],
                "tags": ["space", "moons"],
                "relation": "moons_of",
                "alternative": "three moons",
                "neighbours": ["Venus has", {"prompt": "Earth has", "answer": "one moon"}],
                "reversed": {"prompt": "Two moons has", "answer": "Mars"},
            }
        )
    )
    facts = read_facts(path)
    (fact,) = facts
    assert facts.source == str(path)
    assert facts.skipped == ()
    assert (fact.id, fact.subject, fact.prompt, fact.answer) == (
        "m1",
        "Mars",
        "Mars has",
        "two moons",
    )
    assert fact.paraphrases == ("The planet Mars has",)
    assert fact.unrelated == (Question("Venus has"), Question("Earth has", "one moon"))
    assert fact.tags == ("space", "moons")
    assert (fact.relation, fact.alternative) == ("moons_of", "three moons")
    assert fact.neighbours == fact.unrelated
    assert fact.reversed == Question("Two moons has", "Mars")
    assert fact.line == 1


def test_only_prompt_and_answer_are_required(save):
    (fact,) = read_facts(save(lines(own())))
    assert (fact.subject, fact.paraphrases, fact.unrelated, fact.tags) == (None, (), (), ())
    absent = (fact.relation, fact.alternative, fact.neighbours, fact.reversed)
    assert absent == (None, None, (), None)


def test_null_is_an_absent_optional_field(save):
    optional = set(OWN_FIELDS) - {"prompt", "answer"}
    path = save(lines(own(**dict.fromkeys(optional))))
    assert read_facts(path).facts == read_facts(save(lines(own()), "bare")).facts


def test_text_is_kept_as_it_stands(save):
    (fact,) = read_facts(save(lines(own(" Mars  has\n", " två månar "))))
    assert (fact.prompt, fact.answer) == (" Mars  has\n", " två månar ")


def test_default_id_survives_other_lines(save):
    alone = read_facts(save(lines(own("P")), "one"))[0]
    later = read_facts(save(lines(own("Q"), own("P")), "two"))[1]
    assert alone.id == later.id
    assert later.line == 2


def test_blank_lines_crlf_and_byte_order_mark(save):
    text = lines(own("P"), own("Q")).replace("\n", "\r\n\r\n")
    facts = read_facts(save(b"\xef\xbb\xbf\r\n  \r\n" + text.encode()))
    assert [(fact.prompt, fact.line) for fact in facts] == [("P", 3), ("Q", 5)]


def test_line_separators_inside_a_string_do_not_end_a_line(save):
    (fact,) = read_facts(save('{"prompt": "a\u2028b\x85c", "answer": "d"}'))
    assert fact.prompt == "a\u2028b\x85c"


def test_own_format_as_one_list(save):
    facts = read_facts(save(json.dumps([own("P"), own("Q")])))
    assert [fact.prompt for fact in facts] == ["P", "Q"]


def test_path_may_be_a_string_and_the_extension_does_not_matter(save):
    assert read_facts(str(save(lines(own()), "facts.csv")))[0].prompt == "Mars has"
    assert read_facts(save(json.dumps([MEND]), "facts.jsonl"))[0].answer == "Chile"


# --- MEND / zsRE


def test_mend_format(save):
    (fact,) = read_facts(save(json.dumps([MEND])))
    assert (fact.prompt, fact.answer, fact.subject) == (MEND["src"], "Chile", "Lake Ora")
    assert fact.paraphrases == ("Lake Ora is found where?",)
    # no question mark is added
    assert fact.unrelated == (Question("nq question: who wrote the hobbit", "Tolkien"),)
    assert (fact.tags, fact.relation) == (("lies-in",), "lies-in")
    assert fact.alternative == "Peru"


@pytest.mark.parametrize("alt", [None, "", "Chile", "Chile "])
def test_mend_alt_that_is_none(save, alt):
    assert read_facts(save(json.dumps([MEND | {"alt": alt}])))[0].alternative is None


def test_mend_rephrase_comes_first_and_once(save):
    entry = MEND | {"rephrase": "B", "rephrases": ["A", "B", "C"]}
    assert read_facts(save(json.dumps([entry])))[0].paraphrases == ("B", "A", "C")
    del entry["rephrase"]
    assert read_facts(save(json.dumps([entry]), "g"))[0].paraphrases == ("A", "B", "C")


def test_mend_needs_only_src_and_answers(save):
    (fact,) = read_facts(save(json.dumps([{"src": "P", "answers": ["x"], "loc": None}])))
    assert (fact.prompt, fact.paraphrases, fact.unrelated, fact.tags) == ("P", (), (), ())


def test_mend_facts_count_entries_and_faults_name_the_line(save):
    good = json.dumps(MEND, indent=1)
    bad = json.dumps(MEND | {"src": "S", "answers": []}, indent=1)
    path = save(f"[\n{good},\n{bad}\n]\n")
    line = 2 + good.count("\n") + 1
    assert only_fault(path) == (
        f"facts:{line}: entry 2: field 'answers': is an empty list; "
        "give a list whose first string should follow 'src'"
    )
    assert [f.line for f in read_facts(save(f"[{good},\n\n{good.replace('Ora', 'Una')}]"))] == [
        1,
        2,
    ]


# --- NQ-open


@pytest.mark.parametrize("given", ["who is she", "who is she?", " who is she ?? ? "])
def test_nq_question_ends_with_one_question_mark(save, given):
    (fact,) = read_facts(save(lines({"question": given, "answer": ["Ada", "Ada L."]})))
    assert (fact.prompt, fact.answer) == ("who is she?", "Ada")


def test_nq_answer_may_be_one_string_and_other_fields_are_ignored(save):
    path = save(lines({"question": "who", "answer": "Ada", "example_id": 7}))
    assert read_facts(path)[0].answer == "Ada"


def test_nq_question_of_marks_alone(save):
    path = save(lines({"question": " ?? ", "answer": "Ada"}))
    assert only_fault(path) == "facts:1: field 'question': is ' ?? '; give a question"


# --- repeats and the limit


def repeated(save):
    return save(lines(own("P", "x"), own("P ", "x"), own("P", "y"), own("Q", "z"), own("R", "z")))


def test_repeats_are_skipped_and_recorded(save):
    facts = read_facts(repeated(save))
    assert [fact.prompt for fact in facts] == ["P", "Q", "R"]
    assert [(s.fact.line, s.earlier.line, s.kind) for s in facts.skipped] == [
        (2, 1, "duplicate"),
        (3, 1, "contradiction"),
    ]


def test_strict_refuses_repeats_with_both_lines(save):
    path = repeated(save)
    with pytest.raises(FactsError, match="cannot be used: 2 faults") as caught:
        read_facts(path, strict=True)
    assert caught.value.faults == (
        f"{path}:2: duplicate of {path}:1: prompt 'P '; keep one of the two",
        f"{path}:3: contradiction of {path}:1: prompt 'P' has answer 'y' here and 'x' there; "
        "keep one of the two",
    )


def test_strict_in_a_list_names_line_and_entry(save):
    path = save(f"[{json.dumps(MEND)},\n{json.dumps(MEND)}]")
    with pytest.raises(FactsError, match=re.escape(":2: entry 2: duplicate of ")) as caught:
        read_facts(path, strict=True)
    assert f"of {path}:1: entry 1: prompt" in str(caught.value)


def test_every_word_on_a_fact_of_a_file_cites_file_and_line(save):
    """Faults of a file said facts.jsonl:2, warnings about its facts "line 2"."""
    first = {"prompt": "Lake Ora lies in", "answer": "Peru"}
    hidden = first | {"answer": "Chile\u200b"}
    path = save(lines(first, hidden))
    facts = read_facts(path)
    assert list(skipped_said(facts.skipped))[1] == f"  {path}:2: contradiction of {path}:1"
    path = save(lines(hidden))
    assert unseen(read_facts(path)) == [f"{path}:1: field 'answer': U+200B, zero width space"]
    with pytest.raises(FactsError, match=re.escape(f"no alternative ({path}:1); give it")):
        towards_alternatives(read_facts(path))
    path = save(f"[\n{json.dumps(first)},\n\n{json.dumps(hidden)}\n]")
    assert list(skipped_said(read_facts(path).skipped)) == [
        "Skipped 1 fact: 0 duplicates and 1 contradiction of earlier ones (--strict refuses them).",
        f"  {path}:4: entry 2: contradiction of {path}:2: entry 1",
    ]


def test_strict_passes_distinct_facts(save):
    assert len(read_facts(save(lines(own("P"), own("Q"))), strict=True)) == 2


def test_limit_counts_usable_facts(save):
    facts = read_facts(repeated(save), limit=2)
    assert [fact.prompt for fact in facts] == ["P", "Q"]
    assert len(facts.skipped) == 2
    assert len(read_facts(repeated(save), limit=99)) == 3


def test_limit_does_not_hide_later_faults(save):
    path = save(lines(own("P"), own("Q", "")))
    with pytest.raises(FactsError, match=r":2: field 'answer': is empty"):
        read_facts(path, limit=1)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one(save, limit):
    with pytest.raises(MalmendError, match=f"limit is {limit}; give 1 or more"):
        read_facts(save(lines(own())), limit=limit)


# --- questions


def test_questions_from_every_format(save):
    nq = save(lines({"question": "who is she", "answer": ["Ada", "A"]}, {"question": "why?"}))
    assert read_questions(nq) == (
        Question("nq question: who is she", "Ada"),
        Question("nq question: why?"),
    )
    assert read_questions(save(lines(own(tags=["t"]), {"prompt": "P"}), "own")) == (
        Question("Mars has", "two moons"),
        Question("P"),
    )
    second = {"loc": "nq question: who"}
    assert read_questions(save(json.dumps([MEND, second]), "mend")) == (
        Question("nq question: who wrote the hobbit", "Tolkien"),
        Question("nq question: who"),
    )


def test_questions_from_plain_text(save):
    path = save(b"\xef\xbb\xbfWho is she?\r\n\r\n  Oz is ruled by \r\nlast\x85one")
    with pytest.raises(FactsError, match="byte 0x85"):
        read_questions(path)
    path = save("\ufeffWho is she?\r\n\r\n  Oz is ruled by \r\nlast\u2028one")
    assert read_questions(path) == (
        Question("Who is she?"),
        Question("Oz is ruled by"),
        Question("last\u2028one"),
    )


# --- text


def test_read_text(save):
    path = save(b'\xef\xbb\xbf One line.\r\n\r\n{"a": 1}\n \xc3\xa9\n')
    assert read_text(path) == ' One line.\n\n{"a": 1}\n é\n'


# --- any bytes at all


FIELDS = st.sampled_from([*EXPECTED, "promt"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.just("x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(FIELDS, VALUES, max_size=6) | VALUES, max_size=5)
FILES = (
    st.binary(max_size=200)
    | RECORDS.map(lambda records: json.dumps(records).encode())
    | RECORDS.map(lambda records: lines(*records).encode())
    | RECORDS.flatmap(
        lambda records: st.binary(max_size=3).map(
            lambda noise: lines(*records).encode()[:-5] + noise
        )
    )
)


def attempt(reader, *given):
    try:
        return reader(*given)
    except FactsError as error:
        return error


@settings(max_examples=150)
@given(content=FILES, strict=st.booleans(), limit=st.none() | st.integers(1, 3))
@example(content=b'[{"src":"P","answers":["x"]}] \xff', strict=False, limit=None)
@example(content=b"[" * 100_000, strict=False, limit=None)
def test_any_bytes_give_facts_or_a_malmend_error(tmp_path_factory, content, strict, limit):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    facts = attempt(read_facts, path, limit, strict)
    if isinstance(facts, FactsError):
        assert facts.faults
        assert str(path) in str(facts)
    else:
        assert isinstance(facts, FactSet)
        assert 1 <= len(facts) <= (limit or len(facts))
        assert len({fact.id for fact in facts}) == len(facts)
        assert all(fact.prompt.strip() and fact.answer.strip() for fact in facts)
    str(facts).encode()  # whatever came can be printed
    for reader in (read_questions, read_text):
        result = attempt(reader, path)
        assert result.faults if isinstance(result, FactsError) else result


def test_the_digest_of_facts_by_its_definition():
    """As docs/formats.md has it: prompt, byte 1F, answer, byte 1E of each fact, in order."""
    facts = [Fact("a", "A is", "B"), Fact("b", "C is", "D é")]
    said = "A is\x1fB\x1eC is\x1fD é\x1e"
    assert facts_digest(facts) == hashlib.sha256(said.encode()).hexdigest()
