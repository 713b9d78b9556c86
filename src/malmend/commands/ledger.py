"""What is done with a ledger without a model; of the rest see ledger_init.py, ledger_facts.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from malmend.commands.ledger_facts import LedgerChange
from malmend.commands.ledger_init import signed_by
from malmend.errors import LedgerError
from malmend.facts.fact import facts_digest
from malmend.files import writable
from malmend.given import checked
from malmend.ledgers.access import WAIT, reading, writing
from malmend.ledgers.entries import Entry, Generation
from malmend.ledgers.ledger import Ledger, Moved
from malmend.methods.by_editor import described
from malmend.patch import Patch, make_patch, versions
from malmend.patch_file import replaced, save_patch
from malmend.progress import Progress, silent


@dataclass(frozen=True)
class Step:
    """A line of a ledger's history: a generation, and how many facts came and went in it."""

    generation: Generation
    entered: int
    left: int


@checked()
def revoke(
    ledger: str | Path,
    ids: str | Sequence[str],
    author: str | None = None,
    wait: float = WAIT,
    progress: Progress = silent,
) -> LedgerChange:
    """Takes facts out again, as if they had never been added; needs no model.

    Args:
        ledger: its folder.
        ids: of the facts, or of one.
        author: who does this; null for the user's name.
        wait: seconds to wait for another process that writes the ledger.
        progress: called with stage and share done.

    Raises:
        LedgerError: an id is not that of an active fact; nothing is changed then.
    """
    signed = signed_by(author)
    with writing(ledger, wait) as open_ledger:
        gone = open_ledger.named([ids] if isinstance(ids, str) else ids)
        if not gone:
            raise LedgerError("No fact was named, expected the id of at least one.")
        numbers = {entry.number for entry in gone}
        rest = [entry for entry in open_ledger.active if entry.number not in numbers]
        moved = open_ledger.move(rest, progress)
        return LedgerChange(open_ledger.commit(moved, "revoke", signed), left=gone)


@checked()
def rollback(
    ledger: str | Path,
    generation: int,
    author: str | None = None,
    wait: float = WAIT,
    progress: Progress = silent,
) -> LedgerChange:
    """Makes a new generation with the facts of an earlier one; needs no model.

    Nothing is forgotten: a rollback is rolled back the same way.

    Args:
        ledger: its folder.
        generation: whose facts are to be active again; 0 holds none.
        author: who does this; null for the user's name.
        wait: seconds to wait for another process that writes the ledger.
        progress: called with stage and share done.

    Raises:
        LedgerError: there is no such generation, or it is the current one.
    """
    signed = signed_by(author)
    with writing(ledger, wait) as open_ledger:
        wanted = open_ledger.at(generation)
        before = {entry.number for entry in open_ledger.active}
        after = {entry.number for entry in wanted}
        moved = open_ledger.move(wanted, progress)
        return LedgerChange(
            open_ledger.commit(moved, f"rollback to {generation}", signed, "rolled back"),
            entered=[entry for entry in wanted if entry.number not in before],
            left=[entry for entry in open_ledger.active if entry.number not in after],
        )


@checked()
def patch(
    ledger: str | Path,
    out: str | Path | None = None,
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> Patch:
    """The current generation as an ordinary patch; needs no model.

    Of a ledger without facts the shift is zero, and the model with it is the base bit for bit.

    Args:
        ledger: its folder.
        out: where the patch goes, in place of the file that lies there; None keeps it in memory.
        progress: called with stage and share done.
        told: called about a file that the patch will replace, before the work.
    """
    if out is not None:
        writable(out, ledger)
    with reading(ledger) as open_ledger:
        for line in () if out is None else replaced(out):
            told(line)
        moved = open_ledger.move(open_ledger.active, progress)
        made = patch_of(open_ledger, moved)
    return made if out is None else save_patch(made, out)


@checked()
def list_facts(ledger: str | Path, former: bool = False) -> list[Entry]:
    """The facts that the model carries, in the order they came.

    Args:
        ledger: its folder.
        former: those too that it carries no more.
    """
    with reading(ledger) as open_ledger:
        return open_ledger.entries if former else open_ledger.active


@checked()
def history(ledger: str | Path) -> list[Step]:
    """All generations, the first one first.

    Args:
        ledger: its folder.
    """
    with reading(ledger) as open_ledger:
        changes = open_ledger.changes()
        return [Step(one, *changes.get(one.number, (0, 0))) for one in open_ledger.generations]


def patch_of(ledger: Ledger, moved: Moved) -> Patch:
    """What :meth:`Ledger.move` gave, as a patch that says where it is from."""
    about, settings = ledger.about, ledger.editor.settings
    sites = range(len(ledger.editor.names))
    tokens = max(sum(entry.tokens[site] for entry in moved.entries) for site in sites)
    header = {
        **versions(),
        "model": about.model,
        "base": about.base,
        "dtype": about.dtype,
        "method": settings.method,
        "facts": len(moved.entries),
        "skipped": 0,
        "facts_source": str(ledger.folder),
        "facts_sha256": facts_digest(entry.fact for entry in moved.entries),
        "created": ledger.current.time,
        **{name: about.editor[name] for name in ("editor", "editor_id") if name in about.editor},
        **described(ledger.editor, about.form),
        "passes": 1,
        "frames": list(about.frames),
        "tokens": tokens,
        "generation": ledger.current.number,
        **({"configuration": dict(about.settings)} if about.settings else {}),
    }
    return make_patch(moved.shifts, tokens, header)
