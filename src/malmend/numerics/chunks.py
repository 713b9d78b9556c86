"""Rows a few at a time."""

from __future__ import annotations

from collections.abc import Iterator


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover ``count`` rows; the last may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
