"""Who may look at a ledger, and who may change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from malmend.errors import LedgerError, MalmendError
from malmend.files import writable_folder
from malmend.ledgers.ledger import Ledger
from malmend.ledgers.tables import transaction

WAIT = 30.0  # seconds to wait for another process


@contextmanager
def reading(folder: str | Path, wait: float = WAIT) -> Iterator[Ledger]:
    """A ledger as it is now; while the block runs no writer can commit, so keep it short.

    Raises:
        LedgerError: there is none, or it is damaged.
    """
    with transaction(Path(folder), False, wait) as db:
        yield Ledger(Path(folder), db)


@contextmanager
def writing(folder: str | Path, wait: float = WAIT) -> Iterator[Ledger]:
    """A ledger that this process alone may change; committed at the end of the block.

    Files that a killed run left are removed first.

    Raises:
        LedgerError: there is none, it is damaged, or another process writes it for longer than
            ``wait`` seconds, or no file can be made in its folder.
    """
    folder = Path(folder)
    with transaction(folder, True, wait) as db:
        try:
            writable_folder(folder)  # else that is found out once all is solved
        except MalmendError as error:
            raise LedgerError(
                f"The ledger {folder} takes no file, so nothing was changed; make room, or check "
                "who may write there."
            ) from error
        ledger = Ledger(folder, db)
        _sweep(folder, ledger.files())
        try:
            yield ledger
        except BaseException:
            for path in ledger.made:  # not committed yet, so no row names them
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
    if ledger.superseded:  # no row names it any more, and no name is given twice
        with suppress(OSError):
            (folder / ledger.superseded).unlink(missing_ok=True)


def _sweep(folder: Path, named: set[str]) -> None:
    """Removes the files that a killed run left; only the writer calls it."""
    for pattern in ("rows-*.safetensors", "sums-*.safetensors", ".*.safetensors.*.part"):
        for path in folder.glob(pattern):
            if path.name not in named:
                with suppress(OSError):
                    path.unlink()
