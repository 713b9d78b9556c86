"""Files of the cache folder, kept or made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from malmend.errors import MalmendError

Kept = TypeVar("Kept")

# What this process has read or made: a run that needs several must find them all next time.
_USED = set[Path]()


def kept(
    path: Path,
    load: Callable[[Path], Kept],
    make: Callable[[], Kept],
    save: Callable[[Kept, Path], None],
    most_bytes: int,
) -> Kept:
    """What a file of a cache folder holds; where it is not there or damaged, it is made.

    A folder that cannot be read or written makes this slower and is never an error.

    Args:
        path: of the file.
        load: reads it.
        make: makes what it holds.
        save: writes that.
        most_bytes: that the files beside it may take together (:func:`prune`), but for those that
            this process has used.
    """
    with suppress(Exception):  # whatever is wrong with a copy, it is made again
        found = load(path)
        with suppress(OSError):
            os.utime(path)  # the files that were used last are the last to go
        _USED.add(path)
        return found
    found = make()
    with suppress(OSError, MalmendError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(found, path)
        _USED.add(path)
        prune(path.parent, most_bytes, _USED.__contains__)
    return found


def prune(
    folder: Path, most_bytes: int, spared: Callable[[Path], bool] = lambda path: False
) -> None:
    """Removes the oldest files until the others take at most so many bytes; the newest stays.

    Files that are being written (hidden, see :func:`written_beside`) are left alone, and those that
    are ``spared``.

    Raises:
        OSError: the folder cannot be read or written.
    """
    known = [(path.stat(), path) for path in folder.glob("[!.]*") if path.is_file()]
    total = 0
    for index, (about, path) in enumerate(sorted(known, key=lambda one: -one[0].st_mtime_ns)):
        total += about.st_size
        if index and total > most_bytes and not spared(path):
            path.unlink(missing_ok=True)
