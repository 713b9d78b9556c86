"""The one error that malmend raises on purpose, and an interrupt that says more.

Every message is one sentence for a person: what was given, what was expected, the nearest valid
name where there is one, and what to do.  The command line prints the message and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MalmendError(ValueError):
    """Bad input of any kind.  Also a ``ValueError``, so that both styles of ``except`` work."""


class Resumable(KeyboardInterrupt):
    """Work was interrupted that the same command goes on with."""


class FactsError(MalmendError):
    """A facts file cannot be used.

    Attributes:
        faults: every fault found, one string each, with file, line and field.
    """

    def __init__(self, summary: str, faults: Sequence[str] = ()):
        self.faults = tuple(faults)
        super().__init__("\n".join([summary, *self.faults]))


class ModelError(MalmendError):
    """A model cannot be loaded, or a layer of it cannot be edited."""


class PatchError(MalmendError):
    """A patch is damaged, or was made for another model."""


class EditorError(MalmendError):
    """An editor or a calibration is damaged, or was made for another model."""


class LedgerError(MalmendError):
    """A ledger is damaged, busy, or is asked for what it does not hold."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(given, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
