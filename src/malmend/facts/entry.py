"""One object of a facts file: the checks on its fields, and faults in words."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

from malmend.errors import nearest
from malmend.facts.fact import Question

EXPECTED = {
    "id": "give a short unique name, or leave the field out",
    "subject": "give what the fact is about, or leave the field out",
    "prompt": "give the text that the answer should follow",
    "answer": "give the text that should follow the prompt",
    "paraphrases": "give a list of other ways to ask",
    "unrelated": "give a list of prompts, or of objects with 'prompt' and 'answer'",
    "tags": "give a list of strings",
    "relation": "give the relation's name, or leave the field out",
    "alternative": "give a false answer of the same relation, or leave the field out",
    "neighbours": "give a list of prompts, or of objects with 'prompt' and 'answer'",
    "reversed": "give an object with 'prompt' and 'answer', or leave the field out",
    "src": "give the text that the answer should follow",
    "answers": "give a list whose first string should follow 'src'",
    "rephrase": "give another way to ask, or leave the field out",
    "rephrases": "give a list of other ways to ask",
    "alt": "give a false answer, or leave the field out",
    "loc": "give an unrelated question",
    "loc_ans": "give the answer to 'loc', or leave the field out",
    "question": "give a question",
    "equiv_prompt": "give a list of other wordings of the claim, or one as a string",
    "label": "give the claim's label, or leave the field out and give 'alt'",
    "unrel_prompt": "give an unrelated claim, or leave the field out",
    "unrel_ans": "give the label of 'unrel_prompt', or leave the field out",
    "input": "give the claim",
    "output": "give a list of objects, one of them with the claim's label as 'answer'",
    "filtered_rephrases": "give a list of other wordings of the claim",
}

Faults = list[tuple[int, str]]  # line, text
# C0 and C1 but for blanks and line ends, of which U+0085 is one.
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One object of a file, with the checks on its fields; what is wrong goes to ``faults``."""

    where: str  # "facts.jsonl:3", or "zsre.json:41: entry 3"
    line: int
    number: int  # the line in JSON Lines, the entry in a list: unique in the file
    fields: dict[str, object]
    faults: Faults

    def fault(self, name: str, what: str) -> None:
        """Note what is wrong with a field, and what was expected there."""
        expected = EXPECTED[re.split(r"[\[.]", name)[0]]
        self.faults.append((self.line, f"{self.where}: field {name!r}: {what}; {expected}"))

    def text(self, name: str, value: object) -> str | None:
        """``value`` if it is usable text; otherwise a fault of the field ``name``."""
        if not isinstance(value, str):
            self.fault(name, f"is {described(value)}, not a string")
        elif not value.strip():
            self.fault(name, "is empty")
        elif control := CONTROL.search(value):
            self.fault(name, f"holds the control character {control[0]!r} in {short(value)}")
        elif not encodes(value):
            self.fault(name, f"holds half of a surrogate pair in {short(value)}")
        else:
            return value
        return None

    def required(self, name: str) -> str | None:
        """The text of a field that must be there."""
        if name not in self.fields:
            self.fault(name, "is missing")
            return None
        return self.text(name, self.fields[name])

    def optional(self, name: str) -> str | None:
        """The text of a field that may be absent."""
        # null is how other tools write an absent field
        return None if self.fields.get(name) is None else self.text(name, self.fields[name])

    def items(self, name: str) -> list[tuple[str, object]]:
        """The items of a list field, each with its name: ``paraphrases[2]`` is the second."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, list):
            self.fault(name, f"is {described(value)}, not a list")
        elif value:
            return [(f"{name}[{i}]", item) for i, item in enumerate(value, start=1)]
        return []

    def strings(self, name: str) -> tuple[str, ...]:
        """The usable items of a list of strings; the others become faults."""
        checked = [self.text(where, item) for where, item in self.items(name)]
        return tuple(text for text in checked if text is not None)

    def questions(self, name: str) -> tuple[Question, ...]:
        """The usable items of a list of prompts, or of objects with prompt and answer."""
        found = []
        for where, item in self.items(name):
            fields = item if isinstance(item, dict) else {"prompt": item}
            self.only(fields, ("prompt", "answer"), f"field {where!r}: ")
            if "prompt" not in fields:
                self.fault(where, "has no 'prompt'")
                continue
            prompt, answer = self.text(where, fields["prompt"]), fields.get("answer")
            answer = None if answer is None else self.text(f"{where}.answer", answer)
            if prompt is not None:
                found.append(Question(prompt, answer))
        return tuple(found)

    def question(self, name: str) -> Question | None:
        """The question of an optional field: an object with both prompt and answer."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fault(name, f"is {described(value)}, not an object")
            return None
        parts = ("prompt", "answer")
        self.only(value, parts, f"field {name!r}: ")
        for part in parts:
            if part not in value:
                self.fault(name, f"has no {part!r}")
        prompt, answer = (
            self.text(f"{name}.{part}", value[part]) if part in value else None for part in parts
        )
        return None if prompt is None or answer is None else Question(prompt, answer)

    def first(self, name: str) -> str | None:
        """The first of a list of gold answers, or the one answer given as a string."""
        value = self.fields.get(name)
        if value == []:
            self.fault(name, "is an empty list")
        if not isinstance(value, list):
            return self.required(name)
        return next(iter(self.strings(name)), None)

    def single(self, given: dict[str, object], within: str = "") -> None:
        """A fault for a field that is there twice."""
        if isinstance(given, Doubled):
            what = f"{within}the field {short(given.name)} is there twice; keep one of the two"
            self.faults.append((self.line, f"{self.where}: {what}"))

    def only(self, given: dict[str, object], valid: tuple[str, ...], within: str = "") -> None:
        """A fault for every field that the format does not have: it is likely misspelt."""
        if within:
            self.single(given, within)
        for name in given:
            if name not in valid:
                hint = nearest(name, valid) or f"; valid are {', '.join(valid)}"
                fault = f"{self.where}: {within}unknown field {short(name)}{hint}"
                self.faults.append((self.line, fault))


def encodes(value: str) -> bool:
    """Whether a text can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def described(value: object) -> str:
    """A JSON value in words, for a fault."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str):
        return f"the string {short(value)}"
    if isinstance(value, int | float):
        return f"the number {short(value)}"
    return "a list" if isinstance(value, list) else "an object"


def short(value: object) -> str:
    """A value as it was given, cut to fit a line."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:50]}...{shown[-1]}"


class Doubled(dict[str, object]):
    """A JSON object that names a field twice, of which Python's decoder keeps the last."""

    name: str


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, for Python's decoder; :class:`Doubled` where a name is there twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled, counts = Doubled(found), Counter(name for name, _ in pairs)
    doubled.name = next(name for name, count in counts.items() if count > 1)
    return doubled


def broken(error: ValueError | RecursionError) -> str:
    """What Python's JSON decoder could not read, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error.msg}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "is JSON nested too deeply"
    return "holds a number with too many digits"  # Python's limit for reading an int
