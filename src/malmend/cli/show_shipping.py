"""How exports, differences and conflicts look in a terminal; the rest is in show.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from malmend.cli.show import OUT, say
from malmend.commands.conflicts import ConflictsResult
from malmend.commands.diff import DiffResult
from malmend.commands.export import ExportResult
from malmend.evaluation import figures
from malmend.evaluation.protocols import Scores
from malmend.evaluation.replies import KINDS
from malmend.shipping.conflict import Overlap
from malmend.shipping.measure import Measured, of_facts
from malmend.shipping.truncate import VLLM_RANKS, served_rank

MOST_NAMES = 10  # of layers that are in one model only
MOST_ROWS = 60  # of the table of differences


def exported(result: ExportResult) -> None:
    """What was written, what it lost, and what it answers."""
    record = result.record
    sites: Mapping[str, Mapping[str, Any]] = record["sites"]
    if record["to"] == "lora":
        _adapter(record, sites)
    else:
        lost = max(one["lost"] for one in sites.values())
        unmoved = max(one["unmoved"] for one in sites.values())
        say(
            f"Merged into {len(sites)} layers, {record['dtype']}: rounding took at most {lost:.2g} "
            f"of a layer's shift, and {100 * unmoved:.1f}% of its weights did not move."
        )
    if result.metrics:
        counts = of_facts(record["asked"], record["decoded_facts"])
        _scores(f"asked of what was read back, {counts}", result.metrics)
    say(f"Folder: {result.folder} (README.md is its card, malmend.json has all figures)")


def _adapter(record: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]) -> None:
    worst = max(one["error"] for one in sites.values())
    rank, needed = record["rank"], served_rank(record["rank"])
    if record["exact"]:
        say(f"LoRA of rank {rank} at {len(sites)} layers: exact, off by {worst:.1g} (rounding).")
    else:
        table = Table(title=f"cut to rank {rank}, relative errors")
        for heading in ("layer", "rank was", "on keys", "Frobenius"):
            _column(table, heading, left=heading == "layer")
        for name, one in sites.items():
            cells = (f"{one['error_on_keys']:.3g}", f"{one['error']:.3g}")
            table.add_row(escape(name), f"{one['rank']:,}", *cells)
        OUT.print(table)
        say(f"  on keys: of {record['keys']}")
    if needed is None:
        say(f"vLLM takes ranks up to {VLLM_RANKS[-1]}; give --rank for one that it serves.")
    else:
        say(f"vLLM serves it with --max-lora-rank {needed}.")


def pushed(address: str) -> None:
    """Where the upload lies."""
    say(f"Uploaded: {address}")


def differing(result: DiffResult) -> None:
    """One line per weight that differs, then what only one model has."""
    found = result.comparison
    edited, rounded = found.edited, len(found.rounded)
    if edited:
        table = Table(title=f"{escape(result.model)} and {escape(result.other)}")
        for heading in ("weight", "shape", "norm", "rank"):
            _column(table, heading, left=heading == "weight")
        for one in edited[:MOST_ROWS]:
            rank = "" if one.rank is None else f"{one.rank:,} of {min(one.shape):,}"
            shape = " x ".join(map(str, one.shape))
            table.add_row(escape(one.name), shape, f"{one.norm:.3g}", rank)
        OUT.print(table)
        if len(edited) > MOST_ROWS:
            say(f"  and {len(edited) - MOST_ROWS:,} more")
        say("  norm: of the difference, relative to the weight; rank: above what rounding gives")
    say(f"{len(edited):,} weights differ, {found.same:,} are equal bit for bit.")
    if rounded:
        say(f"{rounded:,} more differ by rounding alone: one model is kept in less precision.")
    if result.settings:
        said = [f"{name} ({a!r} and {b!r})" for name, (a, b) in result.settings.items()]
        say(f"The configurations differ in {', '.join(said)}: one computes otherwise.")
    for where, names in ((result.model, found.only_here), (result.other, found.only_there)):
        if names:
            more = f" and {len(names) - MOST_NAMES:,} more" * (len(names) > MOST_NAMES)
            say(f"Only in {where}: {', '.join(names[:MOST_NAMES])}{more}")
    for name, (here, there) in found.reshaped.items():
        say(f"Of another shape: {name}, {here} and {there}")
    if result.path is not None:
        say(f"Patch: {result.path}; measure it with malmend eval --patch.")


def conflicting(result: ConflictsResult) -> None:
    """Where patches meet, then each one's facts, alone and stacked."""
    pairs = dict.fromkeys(one.patches for one in result.meetings)
    for pair in pairs:
        table = Table(title=escape(" and ".join(pair)))
        for heading in ("layer of both", "ranks", "cosine", "keys", "values"):
            _column(table, heading, left=heading == "layer of both")
        for one in result.meetings:
            if one.patches == pair:
                ranks = "+".join(map(str, one.ranks))
                cells = (f"{one.cosine:+.3f}", _overlap(one.keys), _overlap(one.values))
                table.add_row(escape(one.site), ranks, *cells)
        OUT.print(table)
    if pairs:
        say("  keys, values: overlap of row and of column spaces (what chance gives)")
    else:
        say("No two of the patches shift the same layer.")
    for name, found in result.metrics.items():
        asking = result.asked[name]
        _scores(f"{name}, asked {of_facts(len(asking.facts), asking.decoded)}", found)


def _column(table: Table, heading: str, left: bool) -> None:
    table.add_column(heading, justify="left" if left else "right", overflow="fold")


def _overlap(one: Overlap) -> str:
    return f"{one.found:.2f} ({one.chance:.2f})"


def _scores(title: str, found: Measured) -> None:
    """A column per form, a row per kind and metric."""
    table = Table(title=escape(title))
    table.add_column("question")
    table.add_column("protocol")
    for form in found:
        table.add_column(form, justify="right")
    for kind in KINDS:
        first = True
        for metric in figures.SHARES:
            values = [_figure(kinds.get(kind), metric) for kinds in found.values()]
            if all(value is None for value in values):
                continue
            label = figures.label(kind) if first else ""
            shown = ["" if value is None else f"{100 * value:.1f}%" for value in values]
            table.add_row(label, metric.replace("_", " "), *shown)
            first = False
    OUT.print(table)


def _figure(one: Scores | None, metric: str) -> float | None:
    value: float | None = getattr(one, metric) if one is not None and one.questions else None
    return value
