"""Whether what is given in Python is of the types that it is annotated with; no parser sees it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from malmend.errors import EditorError, MalmendError, nearest

NAMES = {int: "a whole number", float: "a number", str: "a text", NoneType: "None"}
NAMES |= {bool: "True or False", Path: "a Path"}
# Of a setting that is a number: single precision holds it, and what is made of it; of less than the
# least the logarithm is that of zero.
LEAST, MOST = 1e-30, 1e12
DIGITS = 18  # of a seed: what a generator takes is a little more
Function = TypeVar("Function", bound=Callable[..., Any])


def checked(*own: str) -> Callable[[Function], Function]:
    """A function that refuses arguments of other types; what cannot be judged is let pass.

    Args:
        own: parameters that the function judges itself, in more words.

    Raises:
        MalmendError: from the function, in one sentence, before it does anything.
    """

    def check(function: Function) -> Function:
        @wraps(function)
        def called(*args: Any, **named: Any) -> Any:
            bound, hints = signature(function).bind(*args, **named), _hints_of(function)
            given = bound.arguments
            for name, value in given.items():
                kinds = get_args(hints.get(name)) or (hints.get(name),)
                if Path in kinds and isinstance(value, str) and not value:  # the current folder
                    raise MalmendError(f"{name} is empty, expected a path; give one.")
                if isinstance(value, Path) and str in kinds and Path not in kinds:
                    given[name] = str(value)  # a model's folder
            judged = [name for name in given if name in hints and name not in own]
            for said in faults(given, {name: hints[name] for name in judged}):
                raise MalmendError(f"{said}; see help({function.__name__}).")
            return function(*bound.args, **bound.kwargs)

        return cast(Function, called)

    return check


def check_fields(settings: Any) -> None:
    """Raises EditorError where a field of settings is not of its type."""
    for said in faults_of(settings):
        raise EditorError(f"{said}.")


def check_range(
    settings: Any,
    names: Collection[str],
    least: float = LEAST,
    most: float = MOST,
    prefix: str = "",
    advice: str | None = None,
) -> None:
    """Raises EditorError where a field, or one of its several numbers, is out of its range.

    Args:
        settings: whose fields are of their types.
        names: the fields; one that is None is let pass.
        least: of a count an ``int``, of any other number a ``float``.
        most: the largest value.
        prefix: stands before the name; two hyphens make both together an option, to be changed.
        advice: what to do in place of that.
    """
    for name in names:
        value = getattr(settings, name)
        several = isinstance(value, Collection)
        numbers = value if several else [value]
        if value is None or (numbers and all(least <= one <= most for one in numbers)):
            continue
        if isinstance(least, int):
            below = most == MOST and value < least
            expected = f"{least} or more" if below else f"{least} to {most:,g}"
        else:
            kind = "share" if most <= 1 else "number"
            expected = f"one or more {kind}s" if several else f"a {kind}"
            above = " above 0," if least == LEAST else ""
            expected += f"{above} from {least:g} to {most:,g}"
        _refuse(name, value, expected, prefix, advice)


def check_seed(settings: Any, prefix: str) -> None:
    """The same of a seed."""
    if abs(settings.seed) >= 10**DIGITS:
        expected = f"a whole number of at most {DIGITS} digits"
        _refuse("seed", settings.seed, expected, prefix)


def _refuse(
    name: str, value: object, expected: str, prefix: str, advice: str | None = None
) -> None:
    option = prefix.startswith("--")
    if option and advice is None:
        advice = f"change {prefix}{name.replace('_', '-')}"
    called = name if option else prefix + name
    end = f"; {advice}." if advice else "."
    raise EditorError(f"{called} is {shown(value)}, expected {expected}{end}")


def shown(value: object) -> str:
    """A value as an error says it; of a number of thousands of digits Python says none."""
    try:
        return (f"{value}" if isinstance(value, Real) else repr(value))[:80]
    except ValueError:
        return "too large"


def faults_of(thing: Any) -> list[str]:
    """In words, every field of a dataclass that is not of its type."""
    hints = _hints(thing.__class__)
    return faults({name: getattr(thing, name) for name in hints}, hints)


def faults(given: Mapping[str, object], hints: Mapping[str, Any]) -> list[str]:
    """In words, every value that is not of the type of its name."""
    found = []
    for name, hint in hints.items():
        value = given[name]
        if _is_of(value, hint):
            continue
        inner = faults_of(value) if is_dataclass(value) and not isinstance(value, type) else []
        said, wanted = shown(value), _words(hint)
        near = nearest(said.strip("'"), re.findall("'(.*?)'", wanted))
        plain = f"{name} is {said}{near or ','} expected {wanted}"
        found += [f"{name}.{one}" for one in inner] or [plain]
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


@cache
def _hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    hints, known = {}, vars(sys.modules[function.__module__])  # also of what wraps another
    for name, one in signature(function).parameters.items():
        said = one.annotation
        with suppress(NameError):  # of what is imported for a type checker alone
            if said is not one.empty:
                hints[name] = eval(said, known) if isinstance(said, str) else said
    return hints


def _is_of(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin in (tuple, Sequence):  # for which a list does as well, and for the latter an array
        listed = isinstance(value, tuple | list if origin is tuple else Collection)
        if not listed or isinstance(value, str):
            return False
        return all(_is_of(one, parts[0]) for one in cast(Collection[object], value))
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Callable:
        return callable(value)
    if hint in (int, float):  # numpy's too
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    try:
        right = isinstance(value, hint)
    except TypeError:  # of a protocol, say, or a mapping of such and such, nothing is known
        return True
    # What holds a model or tensors is equal to itself alone, and is not looked into.
    deep = is_dataclass(hint) and cast(Any, hint).__dataclass_params__.eq
    return right and not (deep and faults_of(value))


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (tuple, Sequence):
        return f"several, each {_words(parts[0])}"
    if origin is Callable:
        return "a function"
    return " or ".join(map(_words, parts)) or NAMES.get(hint) or str(hint.__name__)
