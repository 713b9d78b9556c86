"""Whether what is given in Python is of the types that it is annotated with; no parser sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from malmend.errors import EditorError, nearest

NAMES = {int: "a whole number", float: "a number", str: "a text", NoneType: "None"}


def check_fields(settings: Any) -> None:
    """Raises EditorError where a field of settings is not of its type."""
    for said in faults_of(settings):
        raise EditorError(f"{said}.")


def faults_of(thing: Any) -> list[str]:
    """In words, every field of a dataclass that is not of its type."""
    hints = _hints(thing.__class__)
    return faults({name: getattr(thing, name) for name in hints}, hints)


def faults(given: Mapping[str, object], hints: Mapping[str, Any]) -> list[str]:
    """In words, every value that is not of the type of its name."""
    found = []
    for name, hint in hints.items():
        if not _is_of(given[name], hint):
            said, wanted = repr(given[name])[:80], _words(hint)
            near = nearest(said.strip("'"), re.findall("'(.*?)'", wanted))
            found.append(f"{name} is {said}{near or ','} expected {wanted}")
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


def _is_of(value: object, hint: Any) -> bool:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(hint) is tuple:  # for which a list does as well
        return isinstance(value, tuple | list) and all(_is_of(one, parts[0]) for one in value)
    if parts:
        return any(_is_of(value, part) for part in parts)
    if hint in (int, float):  # numpy's too
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint) and not (is_dataclass(hint) and faults_of(value))


def _words(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, parts))
    if get_origin(hint) is tuple:
        return f"several, each {_words(parts[0])}"
    return " or ".join(map(_words, parts)) or NAMES.get(hint) or str(hint.__name__)
