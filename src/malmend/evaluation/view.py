"""What the page shows of a report: plain values, no HTML.

Everything the page counts is counted here.  A kind of question or a metric that the report lacks
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from malmend.evaluation.protocols import Asked
from malmend.evaluation.report import PROTOCOLS, FactRow, Report, Scores

KINDS = {
    "ES": ("Edit prompts", "asked word for word as they were edited"),
    "GS": ("Paraphrases", "the same facts in other words, which the edit never saw"),
    "NS": ("Neighbours", "the same question about another subject; its answer must not move"),
    "LS": ("Unrelated questions", "questions about something else; their answers must not move"),
    "RS": ("Reversed", "asked from the answer back to the subject; no edit was made for these"),
}
UNTOUCHED = ("NS", "LS")  # what an edit should leave alone

# Each filter of the facts: its name and what it means.
FILTERS = {
    "all": ("All", "Every fact."),
    "failure": ("Failures", "Edit prompt, a paraphrase or a free-running answer is wrong."),
    "edit": ("Edit prompt", "The edit prompt's answer is not right in every token."),
    "paraphrase": ("Paraphrase", "The answer to a paraphrase is not right in every token."),
    "generated": ("Free-running", "A free-running answer is not the gold answer."),
    "regression": ("Regressions", "The unedited model had an answer right, the edited one not."),
    "moved": ("Others moved", "A neighbour's or an unrelated answer is another one than before."),
}

# Edges of the bins of KL: half decades from 1e-6 to 10.
EDGES = tuple(10 ** (step / 2) for step in range(-12, 3))


@dataclass(frozen=True)
class Line:
    """One metric of one kind of question; None where it does not apply."""

    metric: str
    meaning: str
    before: float | None
    after: float | None
    before_interval: float | None = None
    after_interval: float | None = None

    @property
    def is_share(self) -> bool:
        """Whether the value is a share, and so shown in percent."""
        return self.metric != "kl"


@dataclass(frozen=True)
class Spread:
    """How far the answers to one kind of question moved: KL per question, each counted once."""

    kind: str
    name: str
    questions: int
    changed: int
    median: float
    ninth: float  # nine in ten are below
    most: float
    bins: tuple[int, ...]  # below the first edge, between edges, above the last

    @property
    def shares(self) -> list[float]:
        """Of the questions, per bin."""
        return [count / self.questions for count in self.bins]


@dataclass(frozen=True)
class Moved:
    """A neighbour or unrelated question whose top answer is another one after the edit."""

    kind: str
    prompt: str
    gold: str | None
    before: str | None
    after: str | None
    kl: float | None
    beside: str  # id of the first fact that it stands beside


def lines(report: Report) -> dict[str, list[Line]]:
    """The summary: by kind of question its metrics, unedited beside edited."""
    out: dict[str, list[Line]] = {}
    for kind, before in report.unedited.items():
        after = report.edited.get(kind)
        found = []
        for metric in (one.name for one in fields(Scores) if one.name != "interval"):
            values = [getattr(one, metric) if one else None for one in (before, after)]
            if values == [None, None]:
                continue
            intervals: list[float | None] = [None, None]
            if metric == "token_ratio":
                intervals = [one.interval if one else None for one in (before, after)]
            found.append(Line(metric, PROTOCOLS.get(metric, ""), *values, *intervals))
        if found:
            out[kind] = found
    return out


def pairs(row: FactRow) -> Iterator[tuple[Asked, Asked | None]]:
    """Every question of a fact: the unedited model's reply and the edited one's."""
    after: Sequence[Asked | None] = row.edited or [None] * len(row.unedited)
    yield from zip(row.unedited, after, strict=True)


def kl_of(one: Asked | None) -> float | None:
    """Mean over the answer's tokens; rounding can leave it a hair below zero."""
    return max(0.0, math.fsum(one.kl) / len(one.kl)) if one is not None and one.kl else None


def has_moved(before: Asked, after: Asked | None) -> bool:
    """Whether an answer that should stay has another top prediction than before."""
    return (
        after is not None and before.kind in UNTOUCHED and before.predicted != after.predicted
    )


def flags(row: FactRow) -> list[str]:
    """The names of the filters, beside ``all``, that keep a fact."""
    found = set()
    for before, after in pairs(row):
        last = before if after is None else after
        if before.kind == "ES" and last.exact == 0:
            found |= {"failure", "edit"}
        if before.kind == "GS" and last.exact == 0:
            found |= {"failure", "paraphrase"}
        if before.kind in ("ES", "GS") and last.generated == 0:
            found |= {"failure", "generated"}
        if has_moved(before, after):
            found.add("moved")
        if after is not None and _lost(before, after):
            found.add("regression")
    return [name for name in FILTERS if name in found]


def _lost(before: Asked, after: Asked) -> bool:
    exact = before.exact == 1 and after.exact == 0
    return exact or (before.generated == 1 and after.generated == 0)


def untouched(report: Report, kind: str) -> list[tuple[FactRow, Asked, Asked]]:
    """The distinct questions of a kind that should stay, each with the first fact it is beside."""
    found: dict[object, tuple[FactRow, Asked, Asked]] = {}
    for row in report.rows:
        for before, after in pairs(row):
            if before.kind == kind and after is not None:
                found.setdefault(before.question, (row, before, after))
    return list(found.values())


def spreads(report: Report) -> list[Spread]:
    """How the KL of neighbours and of unrelated questions is distributed."""
    out = []
    for kind in UNTOUCHED:
        known = untouched(report, kind)
        values = sorted(kl for _, _, after in known if (kl := kl_of(after)) is not None)
        if not values:
            continue
        bins = [0] * (len(EDGES) + 1)
        for value in values:
            bins[sum(value >= edge for edge in EDGES)] += 1
        out.append(
            Spread(
                kind=kind,
                name=KINDS[kind][0],
                questions=len(values),
                changed=sum(has_moved(before, after) for _, before, after in known),
                median=values[(len(values) - 1) // 2],
                ninth=values[math.ceil(0.9 * len(values)) - 1],
                most=values[-1],
                bins=tuple(bins),
            )
        )
    return out


def moved(report: Report) -> list[Moved]:
    """What moved although it should have stayed, farthest first."""
    found = [
        Moved(
            kind=before.kind,
            prompt=before.question.prompt,
            gold=before.question.answer,
            before=before.text,
            after=after.text,
            kl=kl_of(after),
            beside=row.id,
        )
        for kind in UNTOUCHED
        for row, before, after in untouched(report, kind)
        if has_moved(before, after)
    ]
    return sorted(found, key=lambda one: -(one.kl or 0.0))


def filters(report: Report) -> list[dict[str, Any]]:
    """The filters that can keep anything, with the number of facts that each keeps."""
    kept = [flags(row) for row in report.rows]
    asked = [one for row in report.rows for one in row.edited or row.unedited]
    absent = set()
    if not any(one.kind == "GS" for one in asked):
        absent.add("paraphrase")
    if all(one.generated is None for one in asked):
        absent.add("generated")
    if not report.edited:
        absent |= {"regression", "moved"}
    if not any(one.kind in UNTOUCHED for one in asked):
        absent.add("moved")
    return [
        {
            "key": key,
            "name": name,
            "meaning": meaning,
            "facts": len(kept) if key == "all" else sum(key in one for one in kept),
        }
        for key, (name, meaning) in FILTERS.items()
        if key not in absent
    ]


def entries(report: Report) -> list[dict[str, Any]]:
    """The facts as the page's script reads them: short keys, None left out."""
    return [_entry(row) for row in report.rows]


def _entry(row: FactRow) -> dict[str, Any]:
    questions = [
        {
            "kind": before.kind,
            "prompt": before.question.prompt,
            "gold": before.question.answer,
            "before": _reply(before),
            "after": None if after is None else _reply(after),
            "moved": has_moved(before, after),
            "kl": kl_of(after),
        }
        for before, after in pairs(row)
    ]
    return _without_none(
        {
            "id": row.id,
            "prompt": row.prompt,
            "answer": row.answer,
            "flags": flags(row),
            "asked": [_without_none(one) for one in questions],
        }
    )


def _reply(one: Asked) -> dict[str, Any]:
    share = None if one.token_ratio is None else round(one.token_ratio * len(one.predicted))
    return _without_none(
        {
            "text": one.text,
            "said": None if one.generated is None else one.generated == 1,
            "exact": None if one.exact is None else one.exact == 1,
            "right": share,
            "tokens": None if share is None else len(one.predicted),
        }
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
