"""The file of ``train --config``: everything wrong in it at once, with lines, as of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from malmend.errors import MalmendError, bad_value, nearest
from malmend.facts.entry import short
from malmend.yaml_file import Fault, read_yaml, refused


def check_config(parser: Any, path: str) -> None:
    """Raises MalmendError with every name and value of a file that the parser does not take.

    What settings say of a value that is of the right kind they say themselves, when they are made.
    """
    given, lines = read_yaml(path)
    if not isinstance(given, Mapping):
        raise MalmendError(
            f"{path} holds no options by name, expected such as 'steps: 80', one on a line; give "
            "one at least, or leave --config out."
        )
    if faults := list(_faults(parser, given)):
        raise refused(f"{path} cannot be used", path, lines, faults)


def _faults(parser: Any, given: Mapping[Any, Any]) -> Iterator[Fault]:
    """What is wrong in a file, and where."""
    known = {one.dest for one in parser._actions} - {"help", "config"}
    known = {name for name in known if not name.endswith(".help")}
    groups = {name.partition(".")[0] for name in known if "." in name}
    for name, value in ((str(name), value) for name, value in given.items()):
        if name in groups and not isinstance(value, Mapping):  # which the parser lets pass
            own = sorted(
                one.removeprefix(f"{name}.") for one in known if one.startswith(f"{name}.")
            )
            what = "empty" if value is None else short(value)
            yield (name,), f"{name} is {what}, expected its own fields by name: {', '.join(own)}"
        elif name in groups:
            for part, inner in value.items():
                yield from _fault(parser, known, (name, str(part)), inner)
        elif isinstance(value, Mapping) and name in known:  # settings of their own, or null
            for part, inner in value.items():
                for _, said in _fault(parser, known, (name,), {part: inner}):
                    yield (name, str(part)), said
        else:
            yield from _fault(parser, known, (name,), value)


def _fault(parser: Any, known: set[str], at: tuple[str, ...], value: Any) -> Iterator[Fault]:
    """What the parser has against one value, if anything."""
    if (dotted := ".".join(at)) not in known:
        yield (
            at,
            f"unknown field {dotted!r}{nearest(dotted, known) or '; see malmend train --help'}",
        )
        return
    alone = value
    for name in reversed(at):
        alone = {name: alone}
    needed = {one.dest: "given" for one in parser._actions if one.required}
    try:
        parser.parse_object(needed | alone)
    except MalmendError as error:
        yield at, bad_value(" ".join(str(error.__cause__).split()), str) or str(error)
