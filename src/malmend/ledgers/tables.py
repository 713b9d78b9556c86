"""The tables of a ledger, in SQLite: which facts it holds, and how that came to be.

A writer holds SQLite's own lock from before it reads until it commits, so two never build on the
same generation; the lock of a process that was killed is gone with it, and what it had not
committed is taken back when the file is next opened.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from malmend.errors import LedgerError

FILE = "ledger.sqlite"
FORMAT = 1
LONGEST = 86_400.0  # seconds to wait
READERS = 600.0  # seconds that a writer whose work is done waits for readers at most
APPLICATION = 0x6D6C6564  # "mled", in the file's header
TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE generations (
  number INTEGER PRIMARY KEY, action TEXT NOT NULL, author TEXT NOT NULL, time TEXT NOT NULL,
  facts INTEGER NOT NULL, sums TEXT, norm REAL NOT NULL, retention REAL);
CREATE TABLE facts (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL,
  subject TEXT, source TEXT NOT NULL, time TEXT NOT NULL, author TEXT NOT NULL,
  status TEXT NOT NULL, generation INTEGER NOT NULL, held INTEGER NOT NULL,
  rows TEXT NOT NULL, place INTEGER NOT NULL, tokens TEXT NOT NULL);
CREATE TABLE changes (
  generation INTEGER NOT NULL, fact INTEGER NOT NULL, entered INTEGER NOT NULL,
  PRIMARY KEY (generation, fact));
"""


@contextmanager
def transaction(folder: Path, write: bool, wait: float) -> Iterator[sqlite3.Connection]:
    """One transaction on a ledger's tables: committed at the end, or as if it never was.

    Args:
        folder: of the ledger.
        write: whether to take the writer's lock.
        wait: seconds to wait for another process's lock.

    Raises:
        LedgerError: there is no ledger, it is busy, damaged, or of another format.
    """
    path = folder / FILE
    if not 0 <= wait <= LONGEST:
        raise LedgerError(
            f"wait is {wait:g}, expected seconds from 0 to {LONGEST:g}; change --wait."
        )
    if not path.is_file():
        raise LedgerError(
            f"There is no ledger in {folder} (no {FILE}); give a folder that `malmend ledger init` "
            "made."
        )
    with _in_words(path, wait), closing(_connected(path, wait)) as db:
        db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
        _check_format(db, path)
        yield db
        if write:  # readers are waited for, else the work would be lost by one that is slow
            db.execute(f"PRAGMA busy_timeout = {int(1000 * max(wait, READERS))}")
        db.execute("COMMIT")


@contextmanager
def created(folder: Path) -> Iterator[sqlite3.Connection]:
    """Makes the tables; they are there once the block, which fills them, has succeeded.

    Raises:
        LedgerError: there is a ledger already, or another process is making one.
    """
    path = folder / FILE
    with _in_words(path, 0.0), closing(_connected(path, 0.0, "rwc")) as db:
        db.execute("BEGIN IMMEDIATE")
        if not _is_empty(db):  # one that a killed `init` left is
            raise LedgerError(f"{folder} holds a ledger already; give another folder.")
        for statement in TABLES.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {FORMAT}")
        yield db
        db.execute("COMMIT")


def holds_tables(folder: Path) -> bool:
    """Whether a folder holds tables; a file that a killed `init` left holds none.

    Raises:
        LedgerError: the file is another program's, or damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return False
    # Opening it takes back what was not committed.
    with _in_words(path, 0.0), closing(_connected(path, 0.0)) as db:
        return not _is_empty(db)


def _is_empty(db: sqlite3.Connection) -> bool:
    return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def _connected(path: Path, wait: float, mode: str = "rw") -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}"
    db = sqlite3.connect(uri, timeout=wait, isolation_level=None, uri=True)
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA synchronous = EXTRA")  # the journal's removal is on the disk too
    except sqlite3.Error:
        db.close()
        raise
    return db


@contextmanager
def _in_words(path: Path, wait: float) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerError(
                f"{path.parent} is being written by another process and was still after {wait:g} "
                "seconds, so nothing was changed; try again, or, where the command has it, wait "
                "longer with --wait."
            ) from error
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            raise LedgerError(
                f"{path} cannot be written ({error}), so nothing was changed; make room, or check "
                "who may write there."
            ) from error
        raise spoilt(path, str(error)) from error
    except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
        raise spoilt(path, str(error)) from error


def spoilt(path: Path, why: str) -> LedgerError:
    """What is said of tables that cannot be used."""
    return LedgerError(
        f"{path} is no ledger or is damaged ({why[:300]}); give a folder that `malmend ledger "
        "init` made, or put back a copy of it."
    )


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    if _is_empty(db):
        raise LedgerError(
            f"{path.parent} holds no ledger, for its `malmend ledger init` did not finish; run "
            "that again."
        )
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise spoilt(path, "another program's tables")
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found != FORMAT:
        raise LedgerError(
            f"{path} has ledger format {found}, this version reads {FORMAT}; use the malmend "
            "version that wrote it."
        )
    health = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if health != "ok":
        raise spoilt(path, str(health).splitlines()[0])
