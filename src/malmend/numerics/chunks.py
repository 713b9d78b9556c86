"""Rows a few at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

APART = 0.05  # of a full batch: what a batch costs beside its positions


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover ``count`` rows; the last may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def padded_chunks(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Slices that cover rows, the longest first, each padded to its first row.

    None has more than ``most`` positions, padding included, unless it is a single row.  A slice
    ends where it is full or where the next row is shorter; of those the cheapest, where each costs
    its positions and :data:`APART` of ``most``.
    """
    count, rows = len(lengths), range(len(lengths))
    shorter = [at for at in rows[1:] if lengths[at] < lengths[at - 1]]
    costs, stops = [0.0] * (count + 1), [count] * count
    for start in reversed(rows):
        full = min(count, start + max(1, most // lengths[start]))
        first = bisect_right(shorter, start)
        between = shorter[first : bisect_right(shorter, full)]
        costs[start], stops[start] = min(
            ((stop - start) * lengths[start] + APART * most + costs[stop], stop)
            for stop in (*between, full)
        )
    start = 0
    while start < count:
        yield slice(start, stops[start])
        start = stops[start]


def two_sided_chunks(lengths: Sequence[tuple[int, int]], most: int) -> Iterator[slice]:
    """Slices that cover rows in their order, each side of a slice padded to its own longest.

    None has more than ``most`` positions, padding included, unless it is a single row.
    """
    start, widest = 0, (0, 0)
    for at, (one, other) in enumerate(lengths):
        wider = max(widest[0], one), max(widest[1], other)
        if at > start and (at + 1 - start) * sum(wider) > most:
            yield slice(start, at)
            start, wider = at, (one, other)
        widest = wider
    if lengths:
        yield slice(start, len(lengths))
