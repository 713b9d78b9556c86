"""The rows of a ledger's tables: facts, and the generations that they came and went in.

What is read is checked as a stranger's would be: the file may have been changed by anything.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malmend.facts.fact import Fact
from malmend.ledgers.tables import spoilt

# Of ledgers of earlier versions "revoked" is also what left by a rollback.
STATUSES = ("active", "revoked", "replaced", "rolled back")
_OWN_FILE = re.compile(r"(rows|sums)-[0-9a-f]{12}\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A fact of a ledger.

    Attributes:
        number: counts all facts that the ledger ever held, from 1.
        status: one of :data:`STATUSES`.
        generation: in which it got this status.
        held: whether the model gave the answer right after the fact was added.
        rows, place: the file with its tokens, and its place among that file's facts.
        tokens: how many it has at each site.
    """

    number: int
    id: str
    prompt: str
    answer: str
    subject: str | None
    source: str
    time: str
    author: str
    status: str
    generation: int
    held: bool
    rows: str
    place: int
    tokens: tuple[int, ...]

    @property
    def fact(self) -> Fact:
        """What was edited in."""
        return Fact(self.id, self.prompt, self.answer, self.subject, line=self.number)

    @property
    def is_active(self) -> bool:
        """Whether the model carries the fact now."""
        return self.status == "active"


@dataclass(frozen=True)
class Generation:
    """One state of a ledger.

    Attributes:
        number: from 0, which holds no fact.
        action: what made it: "init", "add", "revoke", "replace" or "rollback to N".
        facts: how many are active.
        sums: the file with its sums; None where the facts' own rows are smaller, and of any
            generation but the last.
        norm: of the shift, as a share of the edited weights' own norm.
        retention: as measured when it was made; None where no model was asked.
    """

    number: int
    action: str
    author: str
    time: str
    facts: int
    sums: str | None
    norm: float
    retention: float | None


def read_about(db: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """What was fixed at the start, by name."""
    try:
        pairs = db.execute("SELECT name, value FROM about").fetchall()
        return {name: json.loads(value) for name, value in pairs}
    except (ValueError, TypeError, RecursionError) as error:
        raise spoilt(path, f"its table 'about': {error}") from error


def insert_about(db: sqlite3.Connection, about: Mapping[str, Any]) -> None:
    """Fixes what is fixed at the start."""
    pairs = [(name, json.dumps(value, allow_nan=False)) for name, value in about.items()]
    db.executemany("INSERT INTO about VALUES (?, ?)", pairs)


def read_entries(db: sqlite3.Connection, path: Path, sites: int) -> list[Entry]:
    """All facts that the ledger ever held, in the order they came."""
    rows = db.execute(
        "SELECT number, id, prompt, answer, subject, source, time, author, status, generation, "
        "held, rows, place, tokens FROM facts ORDER BY number"
    ).fetchall()
    entries = []
    for row in rows:
        try:
            fields = dict(zip(Entry.__dataclass_fields__, row, strict=True))
            entry = Entry(**{**fields, "tokens": tuple(json.loads(fields["tokens"]))})
            _check_entry(entry, sites)
        except (ValueError, TypeError, RecursionError) as error:
            raise spoilt(path, f"fact {row[0]!r}: {error}") from error
        entries.append(replace(entry, held=bool(entry.held)))
    ids = Counter(entry.id for entry in entries if entry.is_active)
    if twice := [one for one, count in ids.items() if count > 1]:
        raise spoilt(path, f"two active facts have the id {twice[0]!r}")
    return entries


def _check_entry(entry: Entry, sites: int) -> None:
    """Raises ValueError for what this package never writes."""
    texts = (entry.id, entry.prompt, entry.answer, entry.source, entry.time, entry.author)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a field is no text")
    if entry.subject is not None and not isinstance(entry.subject, str):
        raise ValueError("its subject is no text")
    if entry.status not in STATUSES:
        raise ValueError(f"its status is {entry.status!r}, expected one of {', '.join(STATUSES)}")
    own_file(entry.rows, "rows")
    counts = (entry.place, entry.generation, entry.held, *entry.tokens)
    if not all(type(one) is int and one >= 0 for one in counts) or len(entry.tokens) != sites:
        raise ValueError("a count is no whole number, or one is missing")


def own_file(name: object, kind: str) -> None:
    """Raises ValueError unless it is a name that malmend gives, which lies in the folder."""
    if not isinstance(name, str) or not _OWN_FILE.fullmatch(name) or not name.startswith(kind):
        raise ValueError(f"it names the file {name!r}, expected {kind}-....safetensors beside it")


def read_generations(db: sqlite3.Connection, path: Path) -> list[Generation]:
    """All generations, the first (which is empty) first."""
    rows = db.execute(
        "SELECT number, action, author, time, facts, sums, norm, retention FROM generations "
        "ORDER BY number"
    ).fetchall()
    generations = [Generation(*row) for row in rows]
    if [one.number for one in generations] != list(range(len(rows))) or not rows:
        raise spoilt(path, "a generation is missing")
    for one in generations:
        try:
            if one.sums is not None:
                own_file(one.sums, "sums")
            if type(one.facts) is not int or not isinstance(one.norm, int | float):
                raise ValueError("a figure is no number")
            if not 0 <= one.norm < math.inf:
                raise ValueError(f"its norm is {one.norm}, expected a number of at least 0")
            if not isinstance(one.retention, int | float | None):
                raise ValueError("a figure is no number")
            if one.retention is not None and not 0 <= one.retention <= 1:
                raise ValueError(f"its retention is {one.retention}, expected a share from 0 to 1")
        except ValueError as error:
            raise spoilt(path, f"generation {one.number}: {error}") from error
    return generations


def held_at(db: sqlite3.Connection, generation: int) -> set[int]:
    """The numbers of the facts that a generation held."""
    held: set[int] = set()
    for fact, entered in db.execute(
        "SELECT fact, entered FROM changes WHERE generation <= ? ORDER BY generation", (generation,)
    ):
        (held.add if entered else held.discard)(fact)
    return held


def changed_in(db: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """How many facts came and went, by generation."""
    rows = db.execute(
        "SELECT generation, sum(entered <> 0), sum(entered = 0) FROM changes GROUP BY generation"
    )
    return {generation: (came, went) for generation, came, went in rows}


def insert_generation(db: sqlite3.Connection, one: Generation) -> None:
    """Adds a generation; only the last has sums."""
    db.execute("UPDATE generations SET sums = NULL")
    values = (one.number, one.action, one.author, one.time, one.facts, one.sums, one.norm)
    db.execute("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, one.retention))


def insert_facts(db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    """Adds facts that the ledger never held."""
    values = [tuple((vars(one) | {"tokens": json.dumps(one.tokens)}).values()) for one in entries]
    marks = ", ".join("?" * len(Entry.__dataclass_fields__))
    db.executemany(f"INSERT INTO facts VALUES ({marks})", values)


def change_facts(
    db: sqlite3.Connection, generation: int, facts: Iterable[Entry], status: str
) -> None:
    """Notes that facts came into a generation (status "active") or left it."""
    numbers = [one.number for one in facts]
    entered = int(status == "active")
    db.executemany(
        "INSERT INTO changes VALUES (?, ?, ?)", [(generation, one, entered) for one in numbers]
    )
    db.executemany(
        "UPDATE facts SET status = ?, generation = ? WHERE number = ?",
        [(status, generation, one) for one in numbers],
    )
