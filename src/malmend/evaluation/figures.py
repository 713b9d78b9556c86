"""Figures as plain values, no HTML: which there are, and the page's tiles, bars and histograms.

A kind of question or a metric that the report lacks is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from malmend.errors import counted
from malmend.evaluation.perplexity import HIGHEST
from malmend.evaluation.protocols import PROTOCOLS, Group, between
from malmend.evaluation.replies import HELD, KINDS, Kind
from malmend.evaluation.report import Report
from malmend.evaluation.view import QUESTIONS, held

# Edges of the bins of KL: half decades from 1e-6 to 10.
EDGES = tuple(10 ** (step / 2) for step in range(-12, 3))
# Powers of ten under the histogram, and how far from the left they stand, 0 to 1.
AXIS = tuple(
    (power, (EDGES.index(10.0**power) + 1) / (len(EDGES) + 1)) for power in (-6, -4, -2, 0)
)

# The figures that come first: kind, metric, name, what it is.
TILES: tuple[tuple[Kind, str, str, str], ...] = (
    ("ES", "exact", "Edit prompts", "whole answer right, teacher forced"),
    ("ES", "generated", "Edit prompts, free-running", "answer right after normalisation"),
    ("GS", "exact", "Paraphrases", "whole answer right, teacher forced"),
    ("NS", "kept", "Neighbours kept", "right before the edit, and right after it"),
    ("NS", "retention", "Neighbour retention", "answer tokens as before, right or wrong"),
    ("LS", "kept", "Unrelated kept", "right before the edit, and right after it"),
    ("LS", "retention", "Unrelated retention", "answer tokens as before, right or wrong"),
)
METRICS = tuple(name for name in PROTOCOLS if name != "interval")  # in the order of all tables
SHARES = tuple(name for name in METRICS if name != "kl")  # those that are shown in percent
PANELS = ("token_ratio", "exact", "generated", "generated_chat")
GROUPED: tuple[Kind, ...] = ("ES", "GS", "NS", "LS")
GROUPS = {
    "relation": ("By relation", "Relation"),
    "answer_tokens": ("By length of answer", "Answer"),
}


@dataclass(frozen=True)
class Line:
    """One metric of one kind of question; None where it does not apply."""

    kind: Kind
    metric: str
    before: float | None
    after: float | None
    before_between: tuple[float, float] | None = None
    after_between: tuple[float, float] | None = None
    count: str = ""  # the share as a count, where it is not of all questions

    @property
    def is_share(self) -> bool:
        """Whether the value is a share, and so shown in percent."""
        return self.metric in SHARES


@dataclass(frozen=True)
class Tile:
    """One figure that comes first."""

    name: str
    what: str
    before: str
    after: str
    count: str = ""


@dataclass(frozen=True)
class Panel:
    """One metric of all kinds of questions, as bars."""

    metric: str
    rows: tuple[Line, ...]

    @property
    def spoken(self) -> str:
        """The bars in words."""
        said = []
        for row in self.rows:
            values = {"unedited": row.before, "edited": row.after}
            known = [f"{percent(v)} {name}" for name, v in values.items() if v is not None]
            said.append(f"{QUESTIONS[row.kind][0]} {', '.join(known)}")
        return f"{self.metric.replace('_', ' ')}: {'; '.join(said)}."


@dataclass(frozen=True)
class Spread:
    """How far the answers to one kind of question moved: KL per question, each counted once."""

    kind: Kind
    questions: int
    changed: int
    median: float
    ninth: float  # nine in ten are no farther
    most: float
    bins: tuple[int, ...]  # below the first edge, between edges, from the last on

    @property
    def heights(self) -> list[float]:
        """The bins as shares of the fullest."""
        return [count / max(self.bins) for count in self.bins]

    @property
    def spoken(self) -> str:
        """The histogram in words."""
        bins = []
        for low, high, count in zip((0.0, *EDGES), (*EDGES, math.inf), self.bins, strict=True):
            if count:
                bins.append(f"{count} between {low:.1g} and {high:.1g}")
        asked = counted(self.questions, "question")
        return (
            f"KL of {asked}: median {kl(self.median)}, nine in ten up to "
            f"{kl(self.ninth)}, farthest {kl(self.most)}; {', '.join(bins)}."
        )


@dataclass(frozen=True)
class Row:
    """One group of facts: by kind of question the share exactly right, before and after."""

    name: str
    facts: int
    exact: dict[Kind, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Table:
    """The groups of one kind, the kinds of questions that any of them has, largest group first."""

    name: str
    head: str
    kinds: tuple[Kind, ...]
    rows: tuple[Row, ...]


def lines(report: Report) -> dict[Kind, list[Line]]:
    """The summary: by kind of question its metrics, unedited beside edited."""
    out: dict[Kind, list[Line]] = {}
    for kind in KINDS:
        before, after = report.unedited.get(kind), report.edited.get(kind)
        found = []
        for metric in METRICS:
            models = (before, after)
            values = [getattr(one, metric) if one else None for one in models]
            count = after.kept_count if after and metric == "kept" else ""
            if values == [None, None] and not count:
                continue
            line = Line(kind, metric, values[0], values[1], count=count)
            if metric == "token_ratio":
                ends = [between(one.token_ratio, one.interval) if one else None for one in models]
                line = replace(line, before_between=ends[0], after_between=ends[1])
            found.append(line)
        if found:
            out[kind] = found
    return out


def label(kind: Kind) -> str:
    """A kind of question as tables of a terminal name it: "ES (edit prompts)"."""
    return f"{kind} ({QUESTIONS[kind][0].lower()})"


def tiles(report: Report) -> list[Tile]:
    """The figures that come first."""
    known = {(line.kind, line.metric): line for found in lines(report).values() for line in found}
    out = [
        Tile(name, what, percent(line.before), percent(line.after), line.count)
        for kind, metric, name, what in TILES
        if (line := known.get((kind, metric))) is not None
    ]
    if report.perplexity:
        values = [report.perplexity.get(key) for key in ("unedited", "edited")]
        before, after = map(perplexity, values)
        out.append(Tile("Perplexity", "of plain text; lower is better", before, after))
    return out


def protocols(report: Report) -> dict[str, str]:
    """What the metrics that the report has mean, by name."""
    known = {line.metric for found in lines(report).values() for line in found}
    return {metric: meaning for metric, meaning in PROTOCOLS.items() if metric in known}


def panels(report: Report) -> list[Panel]:
    """Bars before and after: one panel per metric that several kinds of questions have."""
    known = [line for found in lines(report).values() for line in found]
    found = [
        Panel(metric, tuple(one for one in known if one.metric == metric)) for metric in PANELS
    ]
    return [panel for panel in found if panel.rows]


def tables(report: Report) -> list[Table]:
    """Success by group; only groups that the report has."""
    out = []
    for by, (name, head) in GROUPS.items():
        rows = [_row(group_name, group) for group_name, group in report.groups.get(by, {}).items()]
        if by == "relation":
            rows.sort(key=lambda row: -row.facts)
        else:  # by size, as they come
            rows = [replace(row, name=_tokens(row.name)) for row in rows]
        kinds = tuple(kind for kind in GROUPED if any(kind in row.exact for row in rows))
        if rows:
            out.append(Table(name, head, kinds, tuple(rows)))
    return out


def _tokens(count: str) -> str:
    return "1 token" if count == "1" else f"{count} tokens"


def _row(name: str, group: Group) -> Row:
    pairs = {}
    for kind in GROUPED:
        found = [model.get(kind) for model in (group.unedited, group.edited)]
        before, after = (None if one is None else one.exact for one in found)
        if (before, after) != (None, None):
            pairs[kind] = (before, after)
    return Row(name, group.facts, pairs)


def spreads(report: Report) -> list[Spread]:
    """How the KL of neighbours and of unrelated questions is distributed."""
    out = []
    for kind in HELD:
        known = held(report, kind)
        far = (after.mean_kl for _, _, after in known)
        values = sorted(one for one in far if one is not None)
        if not values:
            continue
        bins = [0] * (len(EDGES) + 1)
        for value in values:
            bins[sum(value >= edge for edge in EDGES)] += 1
        out.append(
            Spread(
                kind=kind,
                questions=len(values),
                changed=sum(bool(after.moved) for _, _, after in known),
                median=values[(len(values) - 1) // 2],
                ninth=values[math.ceil(0.9 * len(values)) - 1],
                most=values[-1],
                bins=tuple(bins),
            )
        )
    return out


def percent(value: float | None) -> str:
    """A share in percent; nothing for None."""
    return "" if value is None else f"{100 * value:.1f}%"


def perplexity(value: float | None) -> str:
    """A perplexity, of which large ones are short; nothing for None."""
    if value is None:
        return ""
    if value >= HIGHEST:
        return f"over {HIGHEST:.0e}"
    return f"{value:.2f}" if value < 1e6 else f"{value:.1e}"


def kl(value: float | None) -> str:
    """Nats; nothing for None."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
