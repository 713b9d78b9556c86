"""One cell: a draw of facts is edited by one method, and everything is asked.

together   all facts at once, one patch
alone      each fact from the unedited model, asked about itself; what is asked is put together
           as if it were one model's
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from malmend.bench.context import InContext, asked_in_context
from malmend.bench.plan import Cell, Plan, Way, way_of
from malmend.commands.edit import edit
from malmend.commands.evaluate import evaluate
from malmend.evaluation.protocols import scores
from malmend.evaluation.replies import Asked, FactRow, Replies
from malmend.facts.fact import Fact
from malmend.models.load import LoadedModel
from malmend.patch import Patch
from malmend.progress import Progress

SHOWN = 10  # failed facts that a row keeps


@dataclass(frozen=True)
class _Done:
    """What the edits of a cell gave."""

    rows: list[FactRow]
    patches: list[Patch]
    edit_seconds: float
    perplexity: Mapping[str, float]


def drawn(facts: Sequence[Fact], size: int, seed: int) -> list[Fact]:
    """``size`` facts; the draw of a smaller size begins that of a larger."""
    order = list(range(len(facts)))
    random.Random(f"draw {seed}").shuffle(order)
    return [facts[index] for index in order[:size]]


def run_cell(
    loaded: LoadedModel, cell: Cell, facts: Sequence[Fact], plan: Plan, progress: Progress
) -> dict[str, Any]:
    """A row of results, as plain values."""
    way, start = way_of(cell.name, cell.given), time.perf_counter()
    if way.context is not None:
        done = _in_context(loaded, way.context, cell, facts, plan)
    else:
        run = _together if cell.protocol == "together" else _alone
        done = run(loaded, way, facts, plan, progress)
    before = Replies([one for row in done.rows for one in row.unedited])
    after = Replies([one for row in done.rows for one in row.edited])
    said = done.patches[0].provenance if done.patches else {}
    return {
        "model": cell.model,
        "name": cell.name,
        "protocol": cell.protocol,
        "m": cell.size,
        "seed": cell.seed,
        "unedited": {kind: asdict(one) for kind, one in scores(before).items()},
        "edited": {kind: asdict(one) for kind, one in scores(after, before).items()},
        "perplexity": dict(done.perplexity),
        "edit_seconds": done.edit_seconds,
        "seconds": time.perf_counter() - start,
        "failures": _failures(loaded, done.rows),
        # One patch's header; of facts alone the first one's.
        "patch": {key: value for key, value in said.items() if key != "losses"},
    }


def _together(
    loaded: LoadedModel, way: Way, facts: Sequence[Fact], plan: Plan, progress: Progress
) -> _Done:
    patch, seconds = _edited(loaded, way, facts, plan, progress)
    report = evaluate(
        loaded,
        facts,
        patch,
        alternative=plan.alternative,
        away=plan.away,
        decode_facts=plan.decode,
        text=plan.text,
        progress=progress,
    )
    return _Done(list(report.rows), [patch], seconds, report.perplexity)


def _alone(
    loaded: LoadedModel, way: Way, facts: Sequence[Fact], plan: Plan, progress: Progress
) -> _Done:
    rows, patches, seconds = list[FactRow](), list[Patch](), 0.0
    for index, fact in enumerate(facts):
        patch, took = _edited(loaded, way, [fact], plan, _quiet)
        report = evaluate(
            loaded,
            [fact],
            patch,
            alternative=plan.alternative,
            away=plan.away,
            decode_facts=int(index < plan.decode),
            text="none",
        )
        (row,) = report.rows
        rows.append(replace(row, unedited=_of(index, row.unedited), edited=_of(index, row.edited)))
        patches.append(patch)
        seconds += took
        progress("each fact alone", (index + 1) / len(facts))
    return _Done(rows, patches, seconds, {})


def _in_context(
    loaded: LoadedModel, settings: InContext, cell: Cell, facts: Sequence[Fact], plan: Plan
) -> _Done:
    """Facts in the prompts: of one alone, its own before everything."""
    draws = [list(facts)] if cell.protocol == "together" else [[fact] for fact in facts]
    rows = list[FactRow]()
    for index, draw in enumerate(draws):
        decode = plan.decode if len(draws) == 1 else int(index < plan.decode)
        found = asked_in_context(loaded, draw, settings, plan.alternative, plan.away, decode)
        if len(draws) > 1:
            found = [
                replace(row, unedited=_of(index, row.unedited), edited=_of(index, row.edited))
                for row in found
            ]
        rows += found
    return _Done(rows, [], 0.0, {})


def _edited(
    loaded: LoadedModel, way: Way, facts: Sequence[Fact], plan: Plan, progress: Progress
) -> tuple[Patch, float]:
    done = edit(
        loaded,
        facts,
        editor=way.editor,
        settings=way.settings,
        method=way.method,
        alternative=plan.alternative,
        away=plan.away,
        refine=way.refine,
        progress=progress,
    )
    return done.patch, done.seconds


def _of(fact: int, asked: Sequence[Asked]) -> tuple[Asked, ...]:
    return tuple(replace(one, fact=fact) for one in asked)


def _quiet(stage: str, share: float) -> None:
    """The stages of one fact of many are not told."""


def _failures(loaded: LoadedModel, rows: Sequence[FactRow]) -> list[dict[str, str]]:
    """The first facts whose edit prompt is not answered, and what is said instead.

    Teacher forced where nothing was decoded.
    """
    found: list[dict[str, str]] = []
    for row in rows:
        (before,), (after,) = (
            [one for one in asked if one.kind == "ES"] for asked in (row.unedited, row.edited)
        )
        wrong = after.generated == 0.0 if after.generated is not None else after.exact == 0.0
        if wrong and len(found) < SHOWN:
            found.append(
                {
                    "prompt": row.prompt,
                    "wanted": row.answer,
                    "unedited": _said(loaded, before),
                    "edited": _said(loaded, after),
                }
            )
    return found


def _said(loaded: LoadedModel, asked: Asked) -> str:
    if asked.text is not None:
        return asked.text
    if loaded.reading.form == "classes":
        return ", ".join(loaded.reading.classes[index] for index in asked.predicted)
    return str(loaded.tokenizer.decode(list(asked.predicted))).strip()
