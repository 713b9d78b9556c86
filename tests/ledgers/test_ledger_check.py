"""Facts held against a ledger's: where faults are said to be, and that finding them is cheap."""

from __future__ import annotations

import json

import pytest

from malmend.errors import FactsError
from malmend.facts.fact import Fact, FactSet
from malmend.facts.readers import read_facts
from malmend.ledgers.check import paired, unlike
from malmend.ledgers.entries import Entry


def active(*pairs: tuple[str, str]) -> list[Entry]:
    rest = (None, "s", "t", "a", "active", 1, True, "rows", 0, (1,))
    return [Entry(n, f"f{n}", *pair, *rest) for n, pair in enumerate(pairs, start=1)]


def faults_of(check, held, known) -> list[str]:
    with pytest.raises(FactsError) as caught:
        check(held, known, False)
    return list(caught.value.faults)


@pytest.mark.parametrize(("name", "said"), [("a.json", "6: entry 2"), ("a.jsonl", "2")])
def test_a_fault_names_the_entry_of_a_list_and_the_line_of_lines(name, said, tmp_path):
    rows = [{"prompt": "P", "answer": "x"}, {"prompt": "Q", "answer": "other"}]
    text = json.dumps(rows, indent=1) if name == "a.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    [fault] = faults_of(unlike, active(("Q", "y")), read_facts(tmp_path / name))
    assert fault.startswith(f"{tmp_path / name}:{said}: prompt 'Q' has answer 'other' here")


def test_a_fault_of_a_fact_of_no_file_names_its_id():
    known = FactSet("facts", (Fact("b", "Q", "other"),))
    [fault] = faults_of(unlike, active(("Q", "y")), known)
    assert fault.startswith("fact 'b': prompt 'Q'")


def test_the_wrong_file_is_not_compared_with_every_prompt(monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(
        "malmend.ledgers.check.nearest", lambda given, valid: tried.append(given) or ""
    )
    known = FactSet("f", tuple(Fact(f"x{i}", f"Lake {i} is in", "Peru", line=i) for i in range(50)))
    held = active(*((f"Mount {i} is in", "Chile") for i in range(10)))
    assert len(faults_of(paired, held, known)) == 50
    assert tried == ["Lake 0 is in", "Lake 1 is in", "Lake 2 is in"]


def test_an_answer_in_another_form_of_the_same_letters_is_the_same():
    known = FactSet("f", (Fact("b", "Q", "Me\N{COMBINING ACUTE ACCENT}xico  City"),))
    fresh, duplicates = unlike(
        active(("Q", "M\N{LATIN SMALL LETTER E WITH ACUTE}xico City")), known, False
    )
    assert (fresh, duplicates) == ([], [*known])
