"""A ledger: which facts a model carries, and what the least squares need to add and take away.

A folder holds the tables (tables.py), a copy of the editor, the tokens of every fact that was
ever added (rows.py) and the sums of those that are active (sums.py).  Keys and value
gradients are the unedited model's, and the editor is fixed at the start, so a fact's tokens depend
on that fact alone and the shift is a function of the set of active facts, however it came about.
The prior is taken at that set's N (equations 13 and 15).

Everything that changes a ledger is one move: from the active facts to others.  The files of the new
generation are written first, each beside, synced and renamed; the row that names them is committed
last.  A run that is killed before leaves files that no row names, and the next writer removes them.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sqlite3 import Connection
from typing import cast

import torch
from torch import Tensor

from malmend.editors.checkpoint import load_editor
from malmend.editors.editor import Editor
from malmend.errors import SHOWN, EditorError, LedgerError, nearest
from malmend.facts.fact import Fact
from malmend.ledgers.about import About
from malmend.ledgers.entries import (
    Entry,
    Generation,
    change_facts,
    changed_in,
    held_at,
    insert_facts,
    insert_generation,
    read_about,
    read_entries,
    read_generations,
)
from malmend.ledgers.rows import Taken, rows_of, save_rows
from malmend.ledgers.sums import Rows, Sums, joined, load_sums, save_sums
from malmend.ledgers.tables import FILE, spoilt
from malmend.progress import Progress, silent

EDITOR = "editor"  # the folder's name in the ledger's


@dataclass(frozen=True)
class Signed:
    """Who changes a ledger, when (UTC, ISO 8601)."""

    author: str
    time: str


@dataclass(frozen=True, eq=False)
class Moved:
    """What a set of facts comes to.

    Attributes:
        entries: the facts, in the order they came.
        shifts: S by site, V x K, float64.
        sums: of the sites whose sums are smaller than their rows.
        norm: of all shifts, as a share of the edited weights' norm.
    """

    entries: Sequence[Entry]
    shifts: Mapping[str, Tensor]
    sums: Mapping[str, Sums]
    norm: float


class Ledger:
    """A ledger inside one transaction; :mod:`malmend.ledgers.access` gives it.

    Raises:
        LedgerError: what the tables hold was not written by this package.
    """

    def __init__(self, folder: Path, db: Connection):
        path = folder / FILE
        self.folder, self._db = folder, db
        self.about = About.read(read_about(db, path), path)
        self.generations = read_generations(db, path)
        self.entries = read_entries(db, path, len(self.editor.names))
        self.active = [entry for entry in self.entries if entry.is_active]
        self.made: list[Path] = []  # written, and named by no committed row yet
        self.superseded: str | None = None  # sums that a new generation names no more
        now = {entry.number for entry in self.active}
        if now != held_at(db, self.current.number) or len(now) != self.current.facts:
            raise spoilt(path, "its facts are not those of its last generation")

    @property
    def current(self) -> Generation:
        """The last generation."""
        return self.generations[-1]

    @cached_property
    def editor(self) -> Editor:
        """The copy in the folder.

        Raises:
            LedgerError: it is not there, damaged, or another one.
        """
        place, otherwise = self.folder / EDITOR, "put back a copy of the ledger's folder"
        if not (place / "editor.json").is_file():
            raise LedgerError(f"There is no editor in {place} (no editor.json); {otherwise}.")
        try:
            saved = load_editor(place, otherwise)
        except EditorError as error:
            raise LedgerError(str(error)) from error
        if saved.identity != self.about.identity:
            raise LedgerError(f"{place} is not the editor that the ledger began with; {otherwise}.")
        return saved.editor

    def changes(self) -> dict[int, tuple[int, int]]:
        """How many facts came and went, by generation."""
        return changed_in(self._db)

    def named(self, ids: Sequence[str]) -> list[Entry]:
        """The active facts of these ids.

        Raises:
            LedgerError: no active fact has them, each in a sentence.
        """
        active = {entry.id: entry for entry in self.active}
        former = {entry.id: entry for entry in self.entries if not entry.is_active}
        unknown = [one for one in dict.fromkeys(ids) if one not in active]
        lines = []
        for one in unknown[:SHOWN]:
            was = former.get(one)
            why = f", it was {was.status} in generation {was.generation}." if was else ""
            hint = why or nearest(one, active) or "."
            lines.append(f"The ledger holds no active fact {one!r}{hint}")
        if unknown:
            more = [f"Nor {len(unknown) - SHOWN:,} more."] if len(unknown) > SHOWN else []
            end = "Nothing was changed; `malmend ledger list` shows the facts."
            raise LedgerError(" ".join([*lines, *more, end]))
        return [active[one] for one in dict.fromkeys(ids)]

    def at(self, generation: int) -> list[Entry]:
        """The facts of an earlier generation.

        Raises:
            LedgerError: there is no such generation, or it is the current one.
        """
        last = self.current.number
        if not 0 <= generation < last:
            if generation == last:
                raise LedgerError(f"Generation {last} is the current one; there is nothing to do.")
            raise LedgerError(
                f"There is no generation {generation}, the ledger has 0 to {last}; "
                "`malmend ledger history` shows them."
            )
        held = held_at(self._db, generation)
        return [entry for entry in self.entries if entry.number in held]

    def take(self, facts: Sequence[Fact], taken: Taken, source: str, signed: Signed) -> list[Entry]:
        """Writes new facts' tokens and makes their entries, which no table holds yet."""
        path = self._new("rows")
        save_rows(taken, path)
        source = source.encode(errors="replace").decode()  # a path may be no UTF-8
        number, coming = len(self.entries) + 1, self.current.number + 1
        return [
            Entry(
                number + place,
                fact.id,
                fact.prompt,
                fact.answer,
                fact.subject,
                source,
                signed.time,
                signed.author,
                "active",
                coming,
                False,
                path.name,
                place,
                taken.tokens(place),
            )
            for place, fact in enumerate(facts)
        ]

    def move(self, wanted: Sequence[Entry], progress: Progress = silent) -> Moved:
        """Sums and shifts of a set of facts, from those of the active ones where that is less work.

        Raises:
            LedgerError: a file is damaged, or a shift is not finite.
        """
        editor, shifts, sums = self.editor, {}, {}
        known = self.sums() if wanted and self.current.sums else {}
        for site, (name, shape_VK) in enumerate(editor.shapes.items()):
            progress("least squares", site / len(editor.shapes))
            count = sum(entry.tokens[site] for entry in wanted)
            prior = editor.prior(site, count)
            if not count:
                shifts[name] = torch.zeros(shape_VK, dtype=torch.float64)
            elif count < shape_VK[1]:  # rows, as in an edit of these facts alone
                rows = joined(list(rows_of(self.folder, name, shape_VK, site, wanted)))
                shifts[name] = rows.shift(prior)
            else:
                sums[name] = self._summed(site, name, wanted, count, known.get(name))
                shifts[name] = sums[name].shift(prior)
            if not shifts[name].isfinite().all():
                raise LedgerError(
                    f"The shift of {name} holds NaN or infinity, so nothing was changed; take out "
                    "the facts that were added last."
                )
        progress("least squares", 1.0)
        square = sum(shift_VK.square().sum().item() for shift_VK in shifts.values())
        return Moved(wanted, shifts, sums, square**0.5 / self.about.weight_norm)

    def _summed(
        self, site: int, name: str, wanted: Sequence[Entry], count: int, known: Sums | None
    ) -> Sums:
        """One site's sums over the wanted facts."""
        shape_VK = self.editor.shapes[name]

        def rows(entries: Iterable[Entry]) -> Iterator[Rows]:
            return rows_of(self.folder, name, shape_VK, site, list(entries))

        before, after = ({one.number for one in some} for some in (self.active, wanted))
        gone = [entry for entry in self.active if entry.number not in after]
        leaving = sum(entry.tokens[site] for entry in gone)
        if known is None or known.removed + leaving > count:
            return Sums.of(rows(wanted), shape_VK)
        for some in rows(entry for entry in wanted if entry.number not in before):
            known.add(some)
        for some in rows(gone):
            known.remove(some)
        return known

    def sums(self) -> dict[str, Sums]:
        """The current generation's, of the sites that have any."""
        shapes = {
            name: shape_VK
            for site, (name, shape_VK) in enumerate(self.editor.shapes.items())
            if sum(entry.tokens[site] for entry in self.active) >= shape_VK[1]
        }
        return load_sums(self.folder / cast(str, self.current.sums), shapes)

    def commit(
        self,
        moved: Moved,
        action: str,
        signed: Signed,
        status: str = "revoked",
        retention: float | None = None,
    ) -> Generation:
        """Makes a generation of what :meth:`move` gave; ``status`` is of the facts that leave."""
        path = self._new("sums") if moved.sums else None
        if path is not None:
            save_sums(moved.sums, path)
        one = Generation(
            self.current.number + 1,
            action,
            signed.author,
            signed.time,
            len(moved.entries),
            None if path is None else path.name,
            moved.norm,
            retention,
        )
        before, after = ({e.number for e in some} for some in (self.active, moved.entries))
        self.superseded = self.current.sums
        insert_generation(self._db, one)
        insert_facts(self._db, (e for e in moved.entries if e.number > len(self.entries)))
        gone = [entry for entry in self.active if entry.number not in after]
        change_facts(self._db, one.number, gone, status)
        come = [entry for entry in moved.entries if entry.number not in before]
        change_facts(self._db, one.number, come, "active")
        return one

    def _new(self, kind: str) -> Path:
        path = self.folder / f"{kind}-{uuid.uuid4().hex[:12]}.safetensors"
        self.made.append(path)
        return path

    def files(self) -> set[str]:
        """The names of the files that rows name."""
        named = {entry.rows for entry in self.entries}
        return named | ({self.current.sums} if self.current.sums else set())
