"""How long work says how far it is: a function called with a stage's name and the share done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(stage: str, share: float) -> None:
    """Reports to nobody."""


def counting(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Takes how many more are done, and reports the share of them."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done / max(total, 1))

    return count
