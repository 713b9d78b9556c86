"""How much memory something takes beyond what the process held before."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
EVERY = 0.01  # seconds between two looks


class Peak:
    """``most``: bytes of anonymous memory at the peak beyond the start; None where not known.

    Anonymous memory is what no file stands behind: of weights and activations that are mapped from
    files the pages come and go as the system likes.  Read from Linux's accounting, a hundred times
    a second, so a peak that is shorter may be missed.
    """

    most: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watches while the block runs; ``most`` is there when it has ended."""
    found, over = Peak(), threading.Event()
    start = _held()
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


def _held() -> int | None:
    """What is held once all that is free has gone back to the system."""
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
