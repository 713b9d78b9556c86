"""A memory budget in one number: how large micro-batches are, and how much is captured in memory.

What one position of a micro-batch takes is measured: the longest questions run forward and backward
once more, after a first run that loads what is loaded once.  Of what the budget leaves beyond what
is held already and the sums of the least squares, half is for micro-batches, half for captured
tensors, which go to disk beyond it (:class:`malmend.memory.Room`).  What an accelerator holds is
not in the budget, which is of the system's memory: there micro-batches stay as they are.

Shape letters: K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, Tokens
from malmend.memory import Room, held, peak_memory, size_of
from malmend.models.capture import capture, token_counts
from malmend.models.device import wide_device
from malmend.models.sites import Site
from malmend.models.trunk import Trunk
from malmend.numerics.ridge import ROWS

REHEARSED, MOST_POSITIONS = 256, 8192
SPARED = 0.9  # of the budget is planned with: allocators round up, and a peak may be missed


@dataclass(frozen=True)
class Work:
    """What is to be done within a budget.

    Attributes:
        questions: that are captured.
        tokens: of them.
        extra: bytes that are needed beside micro-batches, sums and captured tensors.
        also: what else is done with micro-batches of such questions, and is rehearsed too.
        rows: of a solve, at most; None for one of each token that is captured.
    """

    questions: Sequence[Encoded]
    tokens: Tokens = "auto"
    extra: int = 0
    also: Callable[[Sequence[Encoded]], object] | None = None
    rows: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is spent, in bytes but for ``positions``.

    Attributes:
        budget: what the process may hold.
        held: what it holds before the work: model, libraries, editor.
        positions: of a micro-batch.
        rows: captured tensors that stay in memory.
    """

    budget: int
    held: int
    positions: int
    rows: int

    @property
    def said(self) -> str:
        """In a line for a person."""
        return (
            f"Memory: {self.held / 1e9:.2f} of {self.budget / 1e9:.2f} GB is held; micro-batches "
            f"of {self.positions:,} positions; what is captured goes to disk beyond "
            f"{self.rows / 1e9:.2f} GB."
        )


def check_memory(memory: str) -> None:
    """Raises MalmendError for what is no size, or less than the process holds before any work."""
    budget, now = size_of(memory), held() or 0
    if budget < now:
        raise MalmendError(
            f"--memory is {memory}, expected more than {now / 1e9:.1f}GB, which is held before the "
            "work begins; give more."
        )


def plan_memory(trunk: Trunk, memory: str, work: Work) -> MemoryPlan:
    """Measures what a micro-batch takes, and spends the budget.

    Args:
        trunk: the unedited model.
        memory: as people write it: "4GB".
        work: that will be done.

    Raises:
        MalmendError: no size, less than the work needs at least, or a system that does not say
            what a process holds.
    """
    budget, now = size_of(memory), held()
    if now is None:
        raise MalmendError(
            "--memory is measured by Linux's accounting, which this system lacks; leave it out."
        )
    questions, tokens = work.questions, work.tokens
    width = max(len(one.ids) for one in questions)
    here = trunk.model.device.type == "cpu"
    each = _each(trunk, work, width) if here else 0.0
    solved_here = wide_device(trunk.model).type == "cpu"
    rows = work.rows or rows_of(trunk, questions, tokens)
    left = SPARED * budget - now - work.extra - sums_of(trunk.sites, rows, solved_here)
    if left < 2 * each * width:
        least = (budget * SPARED - left + 2 * each * width) / SPARED
        enough = math.ceil(least / 1e8) / 10
        raise MalmendError(
            f"--memory is {memory}, expected at least {enough:.1f}GB: {now / 1e9:.1f} GB is "
            "held before the work begins; give more, or edit fewer layers."
        )
    positions = trunk.settings.batch_tokens
    if here:  # a power of two, so that what else the machine does seldom makes other ones of it
        positions = min(MOST_POSITIONS, 2 ** int(math.log2(max(1.0, left / 2 / each))))
    return MemoryPlan(budget, now, positions, int(left / 2))


def within(trunk: Trunk, plan: MemoryPlan, folder: Path) -> Trunk:
    """The same cut with a plan's micro-batches and room; what goes to disk lies in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return trunk.again(
        replace(trunk.settings, batch_tokens=plan.positions), Room(plan.rows, folder)
    )


@contextmanager
def watched(
    plan: MemoryPlan | None, told: Callable[[str], None]
) -> Iterator[Callable[[], int | None]]:
    """Tells a plan, and yields what says the peak afterwards; does nothing without a plan.

    Tells too where more was held than the budget.
    """
    if plan is None:
        yield lambda: None
        return
    told(plan.said)
    with peak_memory() as taken:
        yield lambda: plan.held + (taken.most or 0)
    most = plan.held + (taken.most or 0)
    if most > plan.budget:
        told(
            f"At the peak {most / 1e9:.2f} GB were held, more than --memory: a model's first edit "
            "calibrates it, which is not in the plan, and is kept for later ones."
        )


def rows_of(trunk: Trunk, questions: Sequence[Encoded], tokens: Tokens) -> int:
    """The tokens that are captured, of the side that has most of them."""
    sides = {site.in_encoder for site in trunk.sites}
    return max(sum(token_counts(questions, tokens, side)) for side in sides)


def sums_of(sites: Sequence[Site], rows: int, solved_here: bool = True) -> int:
    """Bytes of the least squares, in float64, in the CPU's memory; elsewhere solved, the shifts.

    Of each site stay the factor and, by a prior of matrices, that of the prior, K x K, and the
    shift twice; while one is made there are a matrix of the prior besides, and some rows of keys
    and of value differences with their weighted copies.
    """
    if not solved_here:
        return 8 * sum(2 * math.prod(site.shape_VK) for site in sites)
    kept, made = 0, 0
    for value_width, key_width in (site.shape_VK for site in sites):
        kept += 2 * key_width * key_width + 2 * value_width * key_width
        made = max(made, key_width * key_width + 2 * min(rows, ROWS) * (key_width + value_width))
    return 8 * (kept + made)


def _each(trunk: Trunk, work: Work, width: int) -> float:
    """Bytes that a position of a micro-batch takes of the longest questions, ``width`` at most."""
    each = 0.0
    # Only the answer's tokens may be run again and again, so a short prompt may cost more a token.
    for rank in (lambda one: -len(one.ids), lambda one: -len(one.sources) / len(one.ids)):
        some = sorted(work.questions, key=rank)[: max(1, REHEARSED // width)]
        done: list[Callable[[], object]] = [partial(capture, trunk, some, work.tokens)]
        if work.also is not None:
            done.append(partial(work.also, some))
        positions = len(some) * max(len(one.ids) for one in some)
        each = max(each, max(map(_taken, done)) / positions)
    return each


def _taken(run: Callable[[], object]) -> int:
    """Bytes at the peak of a second run."""
    run()
    with peak_memory() as taken:
        run()
    return max(taken.most or 0, 1)
