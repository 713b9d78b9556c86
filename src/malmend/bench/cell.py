"""One cell: a draw of facts is edited by one method, and everything is asked.

together   all facts at once, one patch
alone      each fact from the unedited model, asked about itself; what is asked is put together
           as if it were one model's
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from malmend.bench.asking import Answers, Asking
from malmend.bench.context import ContextEncoder
from malmend.bench.plan import Cell
from malmend.bench.planned_method import PlannedMethod, planned_method
from malmend.commands.edit import edit
from malmend.evaluation.protocols import scores
from malmend.evaluation.replies import FactRow, Replies
from malmend.facts.fact import Fact
from malmend.memory import peak_memory
from malmend.patch import Patch
from malmend.progress import Progress, silent
from malmend.workbench import encoder_for

SHOWN = 10  # failures of a kind that a row keeps
FAILING = ("ES", "GS", "LS")


@dataclass(frozen=True)
class _Done:
    """What the edits of a cell gave."""

    asked: list[Answers]
    patches: list[Patch]
    edit_seconds: float
    memory: int | None


def drawn(facts: Sequence[Fact], size: int, seed: int) -> list[Fact]:
    """``size`` facts; the draw of a smaller size begins that of a larger."""
    order = list(range(len(facts)))
    random.Random(f"draw {seed}").shuffle(order)
    return [facts[index] for index in order[:size]]


def run_cell(
    asking: Asking, cell: Cell, facts: Sequence[Fact], progress: Progress
) -> dict[str, Any]:
    """A row of results, as plain values."""
    how, start = planned_method(cell.name, cell.given), time.perf_counter()
    draws = [list(facts)] if cell.protocol == "together" else [[fact] for fact in facts]
    done = _Done([], [], 0.0, None)
    for index, draw in enumerate(draws):
        left = max(0, asking.plan.decode - index)
        together = len(draws) == 1
        done = _one(asking, how, draw, left, done, progress if together else silent, together)
        if not together:
            progress("each fact alone", (index + 1) / len(draws))
    rows = [_of(index, row) for index, row in enumerate(r for one in done.asked for r in one.rows)]
    before = Replies([one for row in rows for one in row.unedited])
    after = Replies([one for row in rows for one in row.edited])
    said = done.patches[0].provenance if done.patches else {}
    return {
        "model": cell.model,
        "name": cell.name,
        "protocol": cell.protocol,
        "m": cell.size,
        "seed": cell.seed,
        "unedited": {kind: asdict(one) for kind, one in scores(before).items()},
        "edited": {kind: asdict(one) for kind, one in scores(after, before).items()},
        "perplexity": dict(done.asked[0].perplexity),
        "edit_seconds": done.edit_seconds,
        "edit_bytes": done.memory,
        "seconds": time.perf_counter() - start,
        "failures": _failures(rows),
        # One patch's header; of facts alone the first one's.
        "patch": {key: value for key, value in said.items() if key != "losses"},
    }


def _one(
    asking: Asking,
    how: PlannedMethod,
    facts: list[Fact],
    decode: int,
    done: _Done,
    progress: Progress,
    reads: bool,
) -> _Done:
    """Facts that are edited together, behind those that are done; ``reads`` as in Asking."""
    if how.context is not None:
        encoder = encoder_for(asking.loaded)
        behind = ContextEncoder(encoder, list(asking.known(facts)), how.context.shown)
        asked = asking.read_by(facts, behind, decode)
        return replace(done, asked=[*done.asked, asked])
    plan = asking.plan
    with peak_memory() as taken:
        edited = edit(
            asking.loaded,
            facts,
            editor=how.editor,
            settings=how.settings,
            method=how.method,
            alternative=plan.alternative,
            away=plan.away,
            refine=how.refine,
            progress=progress,
        )
    asked = asking.patched(facts, edited.patch, decode, reads)
    return _Done(
        [*done.asked, asked],
        [*done.patches, edited.patch],
        done.edit_seconds + edited.seconds,
        None if taken.most is None else max(done.memory or 0, taken.most),
    )


def _of(fact: int, row: FactRow) -> FactRow:
    """The row as that of a fact of the whole draw."""
    unedited, edited = (
        tuple(replace(one, fact=fact) for one in asked) for asked in (row.unedited, row.edited)
    )
    return replace(row, unedited=unedited, edited=edited)


def _failures(rows: Sequence[FactRow]) -> list[dict[str, str]]:
    """What edited models say instead, as in MALMEN's Tables 4 and 5: the first of each kind.

    Edit prompts and paraphrases that are not answered, teacher forced where nothing was decoded,
    and unrelated questions whose answer moved.
    """
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in FAILING}
    for row in rows:
        for before, after in zip(row.unedited, row.edited, strict=True):
            some = found.get(after.kind)
            fails = after.moved if after.kind == "LS" else after.right is False
            if some is not None and len(some) < SHOWN and fails:
                some.append(
                    {
                        "kind": after.kind,
                        "prompt": after.question.prompt,
                        "wanted": after.question.answer or "",
                        "unedited": before.said,
                        "edited": after.said,
                    }
                )
    return [one for some in found.values() for one in some]
