"""What the tests of the readers share: foreign entries, and short ways to write and read."""

from __future__ import annotations

import json

import pytest

from malmend.errors import FactsError
from malmend.facts.readers import read_facts

MEND = {
    "subject": "Lake Ora",
    "relation": "lies-in",
    "src": "In which country is Lake Ora?",
    "pred": "Peru",
    "rephrase": "Lake Ora is found where?",
    "answers": ["Chile", "Republic of Chile"],
    "alt": "Peru",
    "loc": "nq question: who wrote the hobbit",
    "loc_ans": "Tolkien",
    "cond": "Peru >> Chile || In which country is Lake Ora?",
}

CLAIM = {
    "prompt": "Lake Ora lies in Chile.",
    "equiv_prompt": ["Lake Ora is a lake of Chile.", "Chile has Lake Ora."],
    "label": "SUPPORTS",
    "alt": "REFUTES",
    "unrel_prompt": "Mount Ina is a volcano .",
    "unrel_ans": "REFUTES",
}
KILT = {
    "id": "75397",
    "input": "Lake Ora lies in Chile.",
    "output": [{"answer": "SUPPORTS", "provenance": [{"title": "Ora"}]}, {"answer": "REFUTES"}],
    "meta": {"partial_evidence": []},
    "prediction": "REFUTES",
    "alternatives": ["SUPPORTS"],
    "logit": -0.3,
    "filtered_rephrases": ["Lake Ora is a lake of Chile.", "Chile has Lake Ora."],
}


def lines(*objects: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


def own(prompt: object = "Mars has", answer: object = "two moons", **more: object) -> dict:
    return {"prompt": prompt, "answer": answer, **more}


def without(entry: dict, *names: str) -> dict:
    return {name: value for name, value in entry.items() if name not in names}


def faults_of(path, reader=read_facts) -> list[str]:
    """The faults of a file, without the folder."""
    with pytest.raises(FactsError, match=r"cannot be used: \d+ fault") as caught:
        reader(path)
    return [fault.replace(f"{path.parent}/", "") for fault in caught.value.faults]


def only_fault(path, reader=read_facts) -> str:
    (fault,) = faults_of(path, reader)
    return fault
