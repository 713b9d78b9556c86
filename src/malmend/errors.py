"""The one error that malmend raises on purpose, and an interrupt that says the run can be resumed.

Every message is one sentence for a person: what was given, what was expected, the nearest valid
name where there is one, and what to do.  The command line prints the message and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence


class MalmendError(ValueError):
    """Bad input of any kind.  Also a ``ValueError``, so that both styles of ``except`` work."""


class Resumable(KeyboardInterrupt):
    """Interrupted; the same command resumes the work."""


SHOWN = 20  # faults in the message of an error; its .faults holds all


class FactsError(MalmendError):
    """A facts file cannot be used; the message shows the first faults.

    Attributes:
        faults: every fault found, one string each, with file, line and field.
    """

    def __init__(self, summary: str, faults: Sequence[str] = ()):
        self.faults = tuple(faults)
        more = len(self.faults) - SHOWN
        rest = [f"and {more:,} more"] if more > 0 else []
        super().__init__("\n".join([summary, *self.faults[:SHOWN], *rest]))


class ModelError(MalmendError):
    """A model cannot be loaded, or a layer of it cannot be edited."""


class PatchError(MalmendError):
    """A patch is damaged, or was made for another model."""


class EditorError(MalmendError):
    """An editor or a calibration is damaged, or was made for another model."""


class LedgerError(MalmendError):
    """A ledger is damaged, busy, or is asked for what it does not hold."""


# What torch's errors, known by what they say, begin with, and say of memory.
_OF_DEVICE = ("CUDA error", "cusolver error", "cuDNN error")
_FULL = re.compile(r"out of memory|_ALLOC(ATION)?_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, or a device's, had no room."""
    here = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or here or is_full_device(error)


def is_full_device(error: BaseException) -> bool:
    """Whether a device's memory had no room, its libraries' included."""
    full = type(error).__name__ == "OutOfMemoryError" or _FULL.search(str(error))
    return isinstance(error, RuntimeError) and bool(full)


def is_of_device(error: BaseException) -> bool:
    """Whether a device failed, of which nothing follows for the model."""
    said = type(error).__name__ == "AcceleratorError" or str(error).startswith(_OF_DEVICE)
    return isinstance(error, RuntimeError) and said


# What orders a terminal about, or the reading direction: C0 but for tab and line end, DEL, C1, and
# Unicode's embeddings, overrides and isolates.  And what it cannot write: a path's bytes that are
# no UTF-8.
_ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Text that gives a terminal no orders: an escape is shown as it is written, ``\\x1b[2J``."""
    return _ORDERS.sub(lambda one: ascii(one[0])[1:-1], text)


def nearest(given: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(given, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def counted(number: int, thing: str) -> str:
    """A number of things: "1 fact", "1,024 facts"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


MOST_SHOWN = 300  # characters of a value


def bad_value(text: str, spelt: Callable[[str], str]) -> str | None:
    """jsonargparse's complaint about a value, in plain words: option, value, what was expected."""
    found = re.match(r'Parser key "([\w.]+)": (.*)(?:Got value|Given value):\s?(.*)$', text)
    kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", text)
    if found is None or not kinds:
        return None
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    part = re.search(r"NestedArg\(key='([\w.]+)', val=(.*)\)", found[3])
    # What is said of a setting of settings comes before what they are in place of: null.
    if inner := re.search(r"- --(\S+ is .*?, expected .*?)(?:; see malmend| - |$)", found[2]):
        return f"{spelt(found[1])}.{inner[1]}"
    if inner := re.search(r" has '(\w+)', which is no option of [\w ]+(?:; (did.*?\?))?", found[2]):
        near = inner[2] and f" ({inner[2]})"
        return f"{spelt(found[1])} has no setting {inner[1]!r}{near or ''}"
    if part is not None:
        return f"{spelt(found[1])}.{part[1]} is {part[2][:MOST_SHOWN]}, which is not taken"
    names["tuple"] = """a list such as '["one", "two"]'"""
    wanted = [names.get(kind, kind) or choices for kind, choices in kinds if kind != "NoneType"]
    if not wanted:  # of settings, which have options of their own
        wanted = [f"null, or its own options, {spelt(found[1])}.*"]
    given = found[3].rstrip(".")[:MOST_SHOWN]
    near = nearest(given, re.findall(r"'(.*?)'", "".join(choices for _, choices in kinds)))
    close = near and f" ({near.removeprefix('; ')})"
    shown = given if re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", given) else repr(given)
    return f"{spelt(found[1])} is {shown}{close}, expected {' or '.join(wanted)}"
