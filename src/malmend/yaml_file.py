"""A YAML file: its values, and where they stand; refused where it names a thing twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from malmend.errors import MalmendError, counted

At = tuple[str | int, ...]  # where in a file, by names and places: ("sizes", 0)
Lines = dict[At, int]
Fault = tuple[At, str]  # where, and what is wrong


def read_yaml(path: str | Path) -> tuple[Any, Lines]:
    """The values of a file, and the lines on which they stand.

    Raises:
        MalmendError: it is no UTF-8, no YAML, or a name is in one mapping twice.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MalmendError(f"{path}:{line}: {what}; save the file as UTF-8 text") from error
    try:
        made = yaml.SafeLoader(text)
        root = made.get_single_node()
        lines: Lines = {}
        twice = list(_walk(root, (), lines, set())) if root else []
        value = made.construct_document(root) if root and not twice else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else None
        raise _broken(path, str(error.problem or error.context), place) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise _broken(path, error.reason, place) from error
    # Of a date, of what nests too deeply, or of a value that is not of the kind its tag says.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise _broken(path, " ".join(str(error).split())[:300]) from error
    if twice:
        raise MalmendError("\n".join(f"{path}:{one}" for one in twice))
    return value, lines


def refused(head: str, path: str | Path, lines: Lines, faults: Sequence[Fault]) -> MalmendError:
    """The error of a file that holds faults: all of them, by line, of a value or of its field."""
    found = [(lines.get(at) or lines.get(at[:1], 0), what) for at, what in faults]
    said = [
        f"{path}:{line}: {what}" if line else f"{path}: {what}"
        for line, what in sorted(found, key=lambda one: one[0])
    ]
    return MalmendError("\n".join([f"{head}: {counted(len(said), 'fault')}", *said]))


def _broken(path: str | Path, why: str, place: tuple[int, int] | None = None) -> MalmendError:
    """The error of what is no YAML, at its line and column where they are known."""
    if place is None:
        return MalmendError(f"{path}: is no YAML ({why}); correct the file")
    line, column = place
    return MalmendError(f"{path}:{line}: is no YAML ({why}, column {column}); correct it there")


def _walk(node: yaml.Node, at: At, lines: Lines, seen: set[int]) -> Iterator[str]:
    """Notes every value's line, and yields what is wrong with a name that is there twice."""
    lines[at] = node.start_mark.line + 1
    if id(node) in seen or isinstance(node, yaml.ScalarNode):  # an alias may hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*at, index), lines, seen)
        return
    first: dict[str, int] = {}
    for key, item in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first:
            what = f"the field {name!r} is there twice, first on line {first[name]}"
            yield f"{line}: {what}; keep one of the two"
        first.setdefault(name, line)
        yield from _walk(item, (*at, name), lines, seen)
        lines[*at, name] = line
