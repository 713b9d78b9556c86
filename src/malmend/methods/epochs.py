"""In which order facts are seen, where a method sees them more than once."""

from __future__ import annotations

import random
from collections.abc import Iterator


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of the facts of every step, each epoch in an order of its own."""
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(range(count), count)
        yield from (order[at : at + size] for at in range(0, count, size))
