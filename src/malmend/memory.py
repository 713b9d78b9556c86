"""How much memory a process holds and takes, and where large tensors go beyond a budget."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from malmend.errors import MalmendError

STATUS = Path("/proc/self/status")
EVERY = 0.01  # seconds between two looks


class Peak:
    """``most``: bytes of anonymous memory at the peak beyond the start; None where not known.

    Anonymous memory is what no file stands behind: of weights and activations that are mapped from
    files the pages come and go as the system likes.  What is freed while it watches and kept by the
    allocator counts, since the process holds it.  Read from Linux's accounting, a hundred times a
    second, so a peak that is shorter may be missed.
    """

    most: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watches while the block runs; ``most`` is there when it has ended."""
    found, over = Peak(), threading.Event()
    start = held()
    if start is None:
        yield found
        return
    found.most = 0

    def watch() -> None:
        while not over.wait(EVERY):
            look()

    def look() -> None:
        now = _anonymous()
        found.most = max(found.most or 0, (now or start) - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        look()
        over.set()
        watcher.join()


def held() -> int | None:
    """Bytes of anonymous memory, once all that is free has gone back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATUS.is_file() else None
    if trim is not None:
        trim(0)
    return _anonymous()


def _anonymous() -> int | None:
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def _stretched(handle: int, start: int, size: int) -> None:
    os.truncate(handle, start + size)


UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_of(text: str) -> int:
    """Bytes of a size as people write it: "4GB", "500 MB", "1.5GiB".

    Raises:
        MalmendError: no such size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in UNITS or len(found[1]) > 40:
        raise MalmendError(f"--memory is {text!r}, expected a size such as 4GB, 500MB or 1.5GiB.")
    return int(float(found[1]) * UNITS[found[2]])


class Room:
    """Where large tensors stand: in memory up to a budget, beyond it in files that nobody names.

    A file has no name once it is mapped, so it is gone with its tensor, whatever ends the process.

    Args:
        budget: bytes in memory; None for no bound.
        folder: of the files; None for the system's own for such things.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None):
        self.budget, self.folder = budget, folder
        self.in_memory = 0
        self.on_disk = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape with nothing in it.

        Raises:
            OSError: the disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.budget is None or self.in_memory + size <= self.budget:
            self.in_memory += size
            found = torch.empty(*shape, dtype=dtype)
            # Of what stands behind a tensor and all that share its numbers.
            weakref.finalize(found.untyped_storage(), self._left, size)
            return found
        handle, name = tempfile.mkstemp(prefix="malmend-", dir=self.folder)
        try:
            # A full disk is an error now, where the system can say so, and not a crash later.
            getattr(os, "posix_fallocate", _stretched)(handle, 0, max(size, 1))
            count = math.prod(shape)
            flat = torch.from_file(name, shared=True, size=count, dtype=dtype)
        finally:
            os.close(handle)
            with suppress(OSError):
                os.unlink(name)
        self.on_disk += size
        return flat.view(*shape)

    def _left(self, size: int) -> None:
        self.in_memory -= size
