"""The JSON objects of a facts file: those of a text, with their places, and those of facts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from malmend.facts.entry import Faults, FileEntry, broken, described, once
from malmend.facts.fact import Fact
from malmend.facts.formats import FORMATS, OWN_FIELDS
from malmend.files import written_beside

OBJECT = "give an object with 'prompt' and 'answer', or with the fields of another format"


def entries_of(text: str, source: str, faults: Faults) -> list[FileEntry]:
    """Every object of a JSON list or of JSON Lines; what is none goes to ``faults``."""
    if is_list(text):
        return list(_list_entries(text, source, faults))
    if not has_objects(text):
        return []
    if whole := _over_lines(text, source):
        faults.append(whole)
        return []
    return list(_line_entries(text, source, faults))


def write_facts(facts: Iterable[Fact], path: str | Path) -> None:
    """Writes what is edited of facts, and their subjects, in malmend's own format."""
    with written_beside(path) as beside, beside.open("w", encoding="utf-8") as file:
        for fact in facts:
            fields = {"id": fact.id, "prompt": fact.prompt, "answer": fact.answer}
            about = {} if fact.subject is None else {"subject": fact.subject}
            file.write(json.dumps(fields | about, ensure_ascii=False) + "\n")


def wrapped(fields: Mapping[str, object]) -> str | None:
    """What is wrong with an object that holds the list of facts, in words."""
    lists = {name: value for name, value in fields.items() if isinstance(value, list)}
    name = next((name for name in lists if any(isinstance(v, dict) for v in lists[name])), None)
    if name is None or any(field in FORMATS for field in fields):
        return None
    return f"holds a list under {name!r}; give that list alone, or one object per line"


def looks_like(text: str) -> str | None:
    """The kind of file that a text without any JSON object seems to be."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")][:5]
    names = "|".join({*FORMATS, *OWN_FIELDS, "facts"})  # which JSON has in quotes
    if any(re.match(rf"\s*(- *)?{{?\s*({names}) *:(\s|$)", line) for line in lines):
        return "YAML"
    if not lines or lines[0].lstrip()[0] in "{[":
        return None
    for sign, kind in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        head = [name.strip().strip("\"'") for name in lines[0].split(sign)]
        if len(head) > 1 and {*head} & {*FORMATS, *OWN_FIELDS}:
            return kind
    return None


def _over_lines(text: str, source: str) -> tuple[int, str] | None:
    """The fault of a text whose first object does not end on its line, as JSON Lines do."""
    start = _past_space(text, 0)
    first, line = text[start:].partition("\n")[0], text.count("\n", 0, start) + 1
    try:
        value, end = json.JSONDecoder(object_pairs_hook=once).raw_decode(text, start)
    except (ValueError, RecursionError):
        if first.strip() != "{":
            return None
        what = "begins an object over several lines"
    else:
        last = line + text.count("\n", start, end)
        if not isinstance(value, dict) or last == line:
            return None
        if inside := wrapped(value):
            return line, f"{source}:{line}: {inside}"
        what = f"is one object over several lines, to line {last}"
    return line, f"{source}:{line}: {what}; put each object on one line, or all in one list"


def is_list(text: str) -> bool:
    """Whether a text begins a JSON list."""
    return text.lstrip(" \t\r\n").startswith("[")


def has_objects(text: str) -> bool:
    """Whether a line of a text begins a JSON object."""
    # any line, not the first one: a stray line must not turn a facts file into plain prompts
    return any(line.lstrip(" \t\r").startswith("{") for line in text.split("\n"))


def is_facts(text: str) -> bool:
    """Whether a text begins with a JSON object or a list of them, as no plain text does."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text, _past_space(text, 0))
    except (ValueError, RecursionError):
        return False
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def _line_entries(text: str, source: str, faults: Faults) -> Iterator[FileEntry]:
    # only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold
    refused = {number for number, _ in faults}  # which are no UTF-8
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            fault = f"{where}: {broken(error)}; give one whole JSON object per line"
            faults += [] if number in refused else [(number, fault)]
        else:
            yield from _object(FileEntry(where, number, number, {}, faults), value)


def _list_entries(text: str, source: str, faults: Faults) -> Iterator[FileEntry]:
    # entry by entry, because json.loads on the whole does not tell at which line an entry starts
    decode = json.JSONDecoder(object_pairs_hook=once).raw_decode
    position, counted, line, number, mark = _past_space(text, text.index("[") + 1), 0, 1, 0, ","
    if text.startswith("]", position):
        position, mark = position + 1, "]"
    while mark == ",":
        position = _past_space(text, position)
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        try:
            value, position = decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            fault = f"{source}:{at}: entry {number}: {broken(error)}; correct the list there"
            faults.append((at, fault))
            return
        where = f"{source}:{line}: entry {number}"
        yield from _object(FileEntry(where, line, number, {}, faults), value)
        position = _past_space(text, position)
        mark, position = text[position : position + 1], position + 1
    if mark != "]":
        line += text.count("\n", counted, position)
        fault = f"{source}:{line}: is not valid JSON after entry {number}; go on with ',' or ']'"
        faults.append((line, fault))
    elif text[position:].strip():
        line += text.count("\n", counted, _past_space(text, position))
        faults.append((line, f"{source}:{line}: text follows the list; give one list per file"))


def _past_space(text: str, position: int) -> int:
    found = re.compile(r"[ \t\r\n]*").match(text, position)
    return found.end() if found else position


def _object(place: FileEntry, value: object) -> Iterator[FileEntry]:
    if isinstance(value, dict):
        place.single(value)
        yield replace(place, fields=value)
    else:
        fault = f"{place.where}: is {described(value)}, not a JSON object; {OBJECT}"
        place.faults.append((place.line, fault))
