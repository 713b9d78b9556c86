"""The facts of a training step, and what facts must have to be trained on: of every trainer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from malmend.errors import EditorError
from malmend.facts.fact import Fact, Question


def check_trainable(
    facts: Sequence[Fact], locality: Sequence[Question], size: int, named: str
) -> None:
    """Raises EditorError for fewer facts than a step has, or where a question must be lacking.

    Args:
        facts: to be trained on.
        locality: unrelated questions for all of them; none where each has its own.
        size: of a step, in facts.
        named: what the user lowers ``size`` by.
    """
    if len(facts) < size:
        raise EditorError(
            f"Facts to train on: {len(facts):,}, expected at least {size}, the facts of one step; "
            f"lower {named}."
        )
    for fact in facts:
        if not (locality or fact.unrelated or fact.neighbours):
            where = f" ({fact.at})" if fact.at else ""
            raise EditorError(
                f"The fact {fact.id!r}{where} has no unrelated question and no "
                "neighbour, one of which training needs; add one to each fact, or give --locality "
                "QUESTIONS."
            )


def drawn(facts: Sequence[Fact], size: int, seed: int, step: int) -> list[Fact]:
    """The facts of a step, by seed and step alone.

    Facts go round in epochs, each in a new order; a short rest of an epoch is left out.
    """
    per_epoch = len(facts) // size
    epoch, part = divmod(step, per_epoch)
    order = random.Random(f"{seed} epoch {epoch}").sample(range(len(facts)), per_epoch * size)
    return [facts[index] for index in order[part * size : (part + 1) * size]]


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Indices of the facts of every step, each epoch in an order of its own."""
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(range(count), count)
        yield from (order[at : at + size] for at in range(0, count, size))
