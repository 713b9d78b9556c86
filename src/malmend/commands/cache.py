"""What is kept of models and facts so as not to compute it again, and how to be rid of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from malmend.files import is_written
from malmend.given import checked
from malmend.models.source import CACHED, cache_folder, stale_copies


@dataclass(frozen=True)
class Cached:
    """One kind: how many entries (models, calibrations) there are, and their bytes on the disk."""

    kind: str
    what: str
    entries: int
    size: int


@dataclass(frozen=True)
class CacheResult:
    """The cache's folder and what it holds, or held before it was to be cleared, and what is left.

    It is ``cleared`` where nothing is.  ``stale`` are copies of GGUF files that nothing reads any
    more: of an older version, or of a file that has changed or is gone.
    """

    folder: Path
    kinds: tuple[Cached, ...]
    cleared: bool
    left: tuple[Cached, ...] = ()
    stale: tuple[Path, ...] = ()


@checked()
def cache(clear: bool = False) -> CacheResult:
    """Says what the cache folder holds, or removes it.

    Everything in it is made again when it is needed.  A run that reads it meanwhile goes on, and
    computes what it misses.

    Args:
        clear: remove it all.
    """
    folder = cache_folder()
    found = tuple(_of(folder, kind, what) for kind, what in CACHED.items())
    stale = tuple(stale_copies())
    # Never what else lies in a folder that MALMEND_CACHE names.
    for kind in CACHED if clear else ():
        for path in (folder / kind).glob("*"):
            if is_written(path):  # what is left of a killed run goes
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):  # one that links to another disk stays
            (folder / kind).rmdir()
    left = tuple(_of(folder, kind, what) for kind, what in CACHED.items() if clear)
    cleared = clear and not any(one.entries for one in left)
    return CacheResult(folder, found, cleared, left, stale)


def _of(folder: Path, kind: str, what: str) -> Cached:
    entries = list((folder / kind).glob("*"))
    return Cached(kind, what, len(entries), sum(_sizes(folder / kind)))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another run removes old ones
            if path.is_file():
                yield path.stat().st_size
