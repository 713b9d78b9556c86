from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from facts_files import MEND, faults_of, lines, only_fault, own
from safetensors.torch import save_file

from malmend.errors import FactsError
from malmend.facts.readers import read_facts, read_questions, read_text

# --- faults of fields


TEXT_AFTER = "give the text that should follow the prompt"


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"prompt": "P"}, f"field 'answer': is missing; {TEXT_AFTER}"),
        (
            {"answer": "x"},
            "field 'prompt': is missing; give the text that the answer should follow",
        ),
        (own("P", ""), f"field 'answer': is empty; {TEXT_AFTER}"),
        (own("P", " \t\n"), f"field 'answer': is empty; {TEXT_AFTER}"),
        (own("P", None), f"field 'answer': is null, not a string; {TEXT_AFTER}"),
        (own("P", 17), f"field 'answer': is the number 17, not a string; {TEXT_AFTER}"),
        (own("P", True), f"field 'answer': is true, not a string; {TEXT_AFTER}"),
        (own("P", ["x"]), f"field 'answer': is a list, not a string; {TEXT_AFTER}"),
        (own("P", {}), f"field 'answer': is an object, not a string; {TEXT_AFTER}"),
        (own("P", float("nan")), f"field 'answer': is the number nan, not a string; {TEXT_AFTER}"),
        (
            own("P", "a\ud800b"),
            rf"field 'answer': holds half of a surrogate pair in 'a\ud800b'; {TEXT_AFTER}",
        ),
        (
            own("P", "a\x00b"),
            rf"field 'answer': holds the control character '\x00' in 'a\x00b'; {TEXT_AFTER}",
        ),
        (own(paraphrases=["Q", "\x1b[31m"]), r"field 'paraphrases[2]': holds the control "),
        (
            own("P", "\x80"),
            rf"field 'answer': holds the control character '\x80' in '\x80'; {TEXT_AFTER}",
        ),
        (own("a\x9b2J"), r"field 'prompt': holds the control character '\x9b' in 'a\x9b2J'; "),
        (own("a\x9fb"), r"field 'prompt': holds the control character '\x9f' in 'a\x9fb'; "),
        (own("a\x1fb"), r"field 'prompt': holds the control character '\x1f' in 'a\x1fb'; "),
        (own(id=7), "field 'id': is the number 7, not a string; give a short unique name, "),
        (own(id=" "), "field 'id': is empty; give a short unique name, "),
        (own(subject=[]), "field 'subject': is a list, not a string; give what the fact is about"),
        (
            own(paraphrases="Q"),
            "field 'paraphrases': is the string 'Q', not a list; give a list of other ways to ask",
        ),
        (
            own(paraphrases=["Q", 3]),
            "field 'paraphrases[2]': is the number 3, not a string; give a list of other ways",
        ),
        (own(paraphrases=[""]), "field 'paraphrases[1]': is empty; "),
        (own(tags={"a": 1}), "field 'tags': is an object, not a list; give a list of strings"),
        (own(tags=[None]), "field 'tags[1]': is null, not a string; give a list of strings"),
        (own(unrelated="Q"), "field 'unrelated': is the string 'Q', not a list; "),
        (
            own(unrelated=["Q", 5]),
            "field 'unrelated[2]': is the number 5, not a string; "
            "give a list of prompts, or of objects with 'prompt' and 'answer'",
        ),
        (own(unrelated=[{"answer": "x"}]), "field 'unrelated[1]': has no 'prompt'; "),
        (own(unrelated=[{"prompt": " "}]), "field 'unrelated[1]': is empty; "),
        (
            own(unrelated=[{"prompt": "Q", "answer": 4}]),
            "field 'unrelated[1].answer': is the number 4, not a string; ",
        ),
        (
            own(unrelated=[{"prompt": "Q", "anser": "x"}]),
            "field 'unrelated[1]': unknown field 'anser'; did you mean 'answer'?",
        ),
        (
            own(relation=3),
            "field 'relation': is the number 3, not a string; give the relation's name",
        ),
        (own(alternative=[]), "field 'alternative': is a list, not a string; give a false answer"),
        (
            own("P", "two  moons", alternative="two moons"),
            "field 'alternative': is 'two moons', the answer itself; give a false answer",
        ),
        (own(neighbours="Q"), "field 'neighbours': is the string 'Q', not a list; "),
        (own(neighbours=[{"answer": "x"}]), "field 'neighbours[1]': has no 'prompt'; "),
        (
            own(reversed="Q"),
            "field 'reversed': is the string 'Q', not an object; "
            "give an object with 'prompt' and 'answer', or leave the field out",
        ),
        (own(reversed={"prompt": "Q"}), "field 'reversed': has no 'answer'; give an object"),
        (
            own(reversed={"prompt": "Q", "answer": 4}),
            "field 'reversed.answer': is the number 4, not a string; give an object",
        ),
        (
            own(reversed={"prompt": "Q", "answer": "x", "promt": "P"}),
            "field 'reversed': unknown field 'promt'; did you mean 'prompt'?",
        ),
        (MEND | {"alt": 3}, "field 'alt': is the number 3, not a string; give a false answer"),
        (own(paraphrase=["Q"]), "unknown field 'paraphrase'; did you mean 'paraphrases'?"),
        (
            own(zzz=1),
            "unknown field 'zzz'; valid are id, subject, prompt, answer, "
            "paraphrases, unrelated, tags, relation, alternative, neighbours, reversed",
        ),
        ({"src": "P"}, "field 'answers': is missing; give a list whose first string "),
        (
            {"answers": ["x"]},
            "field 'src': is missing; give the text that the answer should follow",
        ),
        ({"src": "P", "answers": ["x", 2]}, "field 'answers[2]': is the number 2, not a string; "),
        (MEND | {"rephrase": ["a"]}, "field 'rephrase': is a list, not a string; "),
        (MEND | {"rephrases": "a"}, "field 'rephrases': is the string 'a', not a list; "),
        (MEND | {"relation": 3}, "field 'relation': is the number 3, not a string; "),
        (MEND | {"loc": ""}, "field 'loc': is empty; give an unrelated question"),
        (MEND | {"loc_ans": 6}, "field 'loc_ans': is the number 6, not a string; "),
        ({"question": "who"}, f"field 'answer': is missing; {TEXT_AFTER}"),
        ({"question": "who", "answer": []}, f"field 'answer': is an empty list; {TEXT_AFTER}"),
        ({"question": "who", "answer": [1]}, "field 'answer[1]': is the number 1, not a string; "),
        ({"question": 5, "answer": "x"}, "field 'question': is the number 5, not a string; "),
    ],
)
def test_fault_of_a_field(save, entry, fault):
    found = only_fault(save(lines(entry)))
    assert found.startswith(f"facts:1: {fault}")


def test_a_misspelt_prompt_is_named(save):
    path = save(lines(own(), {"promt": "P", "answer": "x"}))
    assert faults_of(path) == [
        "facts:2: unknown field 'promt'; did you mean 'prompt'?",
        "facts:2: field 'prompt': is missing; give the text that the answer should follow",
    ]


def test_a_long_value_is_shortened(save):
    fault = only_fault(save(lines(own(paraphrases="x" * 10_000))))
    assert len(fault) < 200
    assert "xxx...'" in fault


def test_duplicate_ids(save):
    path = save(lines(own("P", id="a"), own("Q", id="b"), own("R", id="a")))
    assert only_fault(path) == (
        "facts:3: field 'id': 'a' is taken by facts:1; "
        "give a short unique name, or leave the field out"
    )


def test_a_repeated_prompt_with_one_given_id(save):
    # two facts that ask for one name are refused, though the second would be skipped
    path = save(lines(own("P", id="a"), own("P", id="a")))
    assert "facts:2: field 'id': 'a' is taken by facts:1; " in only_fault(path)


def test_an_id_equal_to_a_default_id(save):
    taken = read_facts(save(lines(own("P")), "first"))[0].id
    for entries in [own("P"), own("Q", id=taken)], [own("Q", id=taken), own("P")]:
        path = save(lines(*entries))
        assert f"facts:2: field 'id': '{taken}' is taken by facts:1; " in only_fault(path)


# --- faults of files


def test_all_faults_at_once_in_file_order(save):
    path = save(
        lines(own("P", "")) + "{broken\n" + lines([1], own("Q", id="a"), own("R", 3, id="b"))
        + lines(own("S", id="a")) + '{"prompt": "caf'
    )  # fmt: skip
    found = faults_of(path)
    assert [fault.split(":")[1] for fault in found] == ["1", "2", "3", "5", "6", "7"]


def test_message_shows_twenty_faults_and_the_error_holds_all(save):
    path = save(lines(own()) + lines(*[own(f"P{i}", "") for i in range(30)]))
    with pytest.raises(FactsError, match="cannot be used: 30 faults") as caught:
        read_facts(path)
    assert len(caught.value.faults) == 30
    assert str(caught.value).count("is empty") == 20
    assert str(caught.value).endswith("\nand 10 more")
    assert caught.value.faults[29].startswith(f"{path}:31: ")


def test_one_fault_is_not_many_and_nothing_more_is_announced(save):
    path = save(lines(own("P", "")))
    with pytest.raises(FactsError, match="cannot be used: 1 fault\n") as caught:
        read_facts(path)
    assert "more" not in str(caught.value)


@pytest.mark.parametrize(("count", "last"), [(20, "fault 19"), (21, "and 1 more")])
def test_every_message_of_faults_shows_twenty(count, last):
    error = FactsError("f.jsonl: what is wrong:", [f"fault {i}" for i in range(count)])
    shown = str(error).splitlines()
    assert (shown[0], shown[20], shown[-1]) == ("f.jsonl: what is wrong:", "fault 19", last)
    assert len(error.faults) == count


ALL_READERS = pytest.mark.parametrize("reader", [read_facts, read_questions, read_text])


@ALL_READERS
def test_missing_file(save, reader):
    path = save(lines(own()), "facts.jsonl")
    with pytest.raises(FactsError, match=r"no such file; did you mean 'facts\.jsonl'"):
        reader(path.with_name("fcats.jsonl"))
    with pytest.raises(FactsError, match="there is no such file; check the path"):
        reader(path.with_name("zzz"))
    with pytest.raises(FactsError, match="there is no such file; check the path"):
        reader(path.parent / "no" / "facts.jsonl")


@ALL_READERS
def test_a_folder(tmp_path, reader):
    with pytest.raises(FactsError, match="is a folder; give a file"):
        reader(tmp_path)


@ALL_READERS
def test_unreadable_file(save, reader, monkeypatch):
    # chmod would not stop a test that runs as root
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = save(lines(own()))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(FactsError, match=r"facts: may not be read \(permission denied\)"):
        reader(path)


@ALL_READERS
@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "facts/inside"])
def test_impossible_paths(save, reader, name):
    parent = save(lines(own())).parent
    with pytest.raises(FactsError, match="cannot be read"):
        reader(parent / name)


@ALL_READERS
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n\t\n"])
def test_empty_file(save, reader, content):
    with pytest.raises(FactsError, match="facts: is empty; give a file with some text"):
        reader(save(content))


@ALL_READERS
def test_bytes_that_are_not_utf8(save, reader):
    path = save(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n{"prompt": "\xe9", "answer": "b"}\n')
    # 3 bytes of mark, 31 of the first line, 12 before the bad one
    assert only_fault(path, reader) == (
        "facts:2: byte 0xe9 at offset 46 is not UTF-8; save the file as UTF-8 text"
    )


def test_every_line_that_is_not_utf8_is_reported_with_other_faults(save):
    path = save(b'{"prompt": "\xff"}\n{"prompt": "b", "answer": "\xc3"}\n')
    assert [fault.split(";")[0] for fault in faults_of(path)] == [
        "facts:1: byte 0xff at offset 12 is not UTF-8",
        "facts:1: field 'answer': is missing",
        "facts:2: byte 0xc3 at offset 43 is not UTF-8",
    ]


def test_utf16(save):
    found = faults_of(save(lines(own()).encode("utf-16")))
    what = "facts: is no UTF-8 text (byte 0x00 at offset 3)"
    assert found == [f"{what}; give a file of text, saved as UTF-8"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"prompt": "P",, "answer": "x"}', "facts:1: is not valid JSON (Expecting property name"),
        ('{"prompt": "P"} {"prompt": "Q"}', "facts:1: is not valid JSON (Extra data, column 17); "),
        (
            '[\n {"src": "P", "answers": "x"},\n {\'a\': 1}]',
            "facts:3: entry 2: is not valid JSON (Expecting property name",
        ),
        ('[{"src": "P", "answers": ["x"]}', "facts:1: is not valid JSON after entry 1; go on with"),
        ('[{"src": "P", "answers": ["x"]}\n 5]', "facts:2: is not valid JSON after entry 1; "),
        ('[{"src": "P", "answers": ["x"]}\n,\n]', "facts:3: entry 2: is not valid JSON (Expecting"),
        ("[", "facts:1: entry 1: is not valid JSON (Expecting value, column 2); correct the list"),
        ("[]\n[]", "facts:2: text follows the list; give one list per file"),
        ("[]", "facts: holds an empty list; give JSON Lines with 'prompt' and 'answer', a MEND"),
        ("[17]", "facts:1: entry 1: is the number 17, not a JSON object; give an object with "),
        ("[" * 100_000, "facts:1: entry 1: is JSON nested too deeply; correct the list there"),
        ("[\n\n" + "[" * 100_000, "facts:3: entry 1: is JSON nested too deeply; correct the list"),
        ('{"prompt": ' + "[" * 100_000, "facts:1: is JSON nested too deeply; give one whole JSON"),
        ('{"prompt": ' + "9" * 9999 + "}", "facts:1: holds a number with too many digits; "),
        ("[" + "9" * 9999 + "]", "facts:1: entry 1: holds a number with too many digits; "),
        (
            "subject,prompt,answer\nMars,Mars has,two",
            "facts: looks like CSV; malmend reads JSON and",
        ),
        ('{"text": "a", "label": 1}', "facts:1: the fields ('text', 'label') are of no format of"),
        ("{}", "facts:1: the fields (none) are of no format of facts; give JSON Lines with"),
    ],
)
def test_fault_of_a_file(save, content, fault):
    path = save(content)
    assert only_fault(path).startswith(fault)


@pytest.mark.parametrize("form", ["{0}\n{1}", "[{0},\n{1}]"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_field_that_is_there_twice(save, form, inner):
    """Python's decoder keeps the last, and says nothing; what follows is read all the same."""
    twice = '{"prompt": "P", "answer": "x", "answer": "y"}'
    if inner:
        twice = '{"prompt": "P", "answer": "x", "reversed": ' + twice + "}"
    first, second = faults_of(save(form.format(twice, '{"prompt": "Q", "answer": ""}')))
    assert first.startswith("facts:1")
    assert first.endswith("the field 'answer' is there twice; keep one of the two")
    assert ("field 'reversed': " in first) == inner
    assert second.startswith("facts:2")


def test_a_name_that_is_there_twice_in_what_is_ignored_does_no_harm(save):
    entry = '{"src": "P", "answers": ["x"], "meta": {"a": 1, "a": 2}}'
    assert read_facts(save(f"[{entry}]"))[0].prompt == "P"


def test_a_line_that_is_no_object(save):
    path = save(lines(own(), "text", 3))
    assert [fault.split(";")[0] for fault in faults_of(path)] == [
        "facts:2: is the string 'text', not a JSON object",
        "facts:3: is the number 3, not a JSON object",
    ]


def test_mixed_formats(save):
    path = save(lines(own(), MEND, {"question": "who", "answer": "x"}))
    assert faults_of(path) == [
        "facts:2: field 'src' is of the MEND / zsRE format, but the file is in the malmend "
        "one; keep one format per file",
        "facts:3: field 'question' is of the NQ-open format, but the file is in the malmend "
        "one; keep one format per file",
    ]


def test_infinity_and_nan_in_ignored_fields_do_no_harm(save):
    path = save('[{"src": "P", "answers": ["x"], "score": NaN, "cond": -Infinity, "pred": 1e999}]')
    assert len(read_facts(path)) == 1


# --- faults in questions


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            lines({"prompt": "P", "anwser": "x"}),
            "facts:1: unknown field 'anwser'; did you mean 'ans",
        ),
        (lines({"prompt": 3}), "facts:1: field 'prompt': is the number 3, not a string; "),
        (lines({"prompt": "P", "answer": ""}), "facts:1: field 'answer': is empty; "),
        (
            json.dumps([{"src": "P"}]),
            "facts:1: entry 1: field 'loc': is missing; give an unrelated",
        ),
        (lines({"question": " "}), "facts:1: field 'question': is empty; give a question"),
        (lines({"question": "who", "answer": 3}), "facts:1: field 'answer': is the number 3, not"),
        (
            "# questions\n" + lines({"question": "who"}),
            "facts:1: is not valid JSON (Expecting value",
        ),
    ],
)
def test_fault_in_questions(save, content, fault):
    assert only_fault(save(content), read_questions).startswith(fault)


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n',
        '\n[\n {"prompt": "a",\n  "answer": "b"}\n]\n',
    ],
)
def test_a_facts_file_is_no_plain_text(tmp_path, content):
    path = tmp_path / "facts"
    path.write_text(content)
    with pytest.raises(FactsError, match="looks like a facts file, expected plain text; give"):
        read_text(path)


@pytest.mark.parametrize("content", ["{ braces } are text\n", "[1] as a note\n", "[1, 2]\n", '"a"'])
def test_plain_text_may_begin_with_brackets(tmp_path, content):
    path = tmp_path / "text"
    path.write_text(content)
    assert read_text(path) == content


@pytest.mark.parametrize("read", [read_facts, read_questions, read_text])
def test_a_file_that_is_no_text_has_one_fault(tmp_path, read):
    path = tmp_path / "facts"
    save_file({"a": torch.ones(999)}, path)
    with pytest.raises(FactsError) as refused:
        read(path)
    (fault,) = refused.value.faults
    assert fault.startswith(f"{path}: is no UTF-8 text (byte 0x00 at offset ")


def test_of_a_line_that_is_no_utf8_nothing_more_is_said(tmp_path):
    path = tmp_path / "facts"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n\xff\xfe\n{"prompt"\n')
    with pytest.raises(FactsError) as refused:
        read_facts(path)
    first, second = refused.value.faults
    assert "facts:2: byte 0xff" in first
    assert "facts:3: is not valid JSON" in second
