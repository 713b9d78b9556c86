"""How figures look in a terminal, and the demo, which shows all; the rest is in show.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from malmend.cli.show import OUT, asked, edited, page, trained_on
from malmend.commands.demo import DemoResult
from malmend.errors import counted, harmless
from malmend.evaluation import figures
from malmend.evaluation.protocols import Group, Scores
from malmend.evaluation.report import Report
from malmend.facts.lint import unseen_said

# Columns of the tables of groups: a kind and a metric.
GROUPED = (
    ("ES", "token_ratio"),
    ("ES", "generated"),
    ("GS", "token_ratio"),
    ("GS", "generated"),
    ("NS", "token_ratio"),
)
FIGURE = 8  # signs of a column at least: "ES token", "11.1% →"
MOST_GROUPS = 12  # rows of such a table; all are in the report's JSON


def report(result: Report) -> None:
    """Unedited beside edited, each column's protocol named."""
    trained_on(result.about.get("trained_on"), result.facts)
    _leaks(result.leaks)
    for line in unseen_said(result.unseen):
        OUT.print(escape(line))
    table = Table(title=f"{counted(result.facts, 'fact')}, {escape(str(result.about['model']))}")
    table.add_column("question")
    table.add_column("protocol")
    table.add_column("unedited", justify="right")
    if result.edited:
        table.add_column("edited", justify="right")
    for kind, found in figures.lines(result).items():
        for index, one in enumerate(found):
            name = figures.label(kind) if index == 0 else ""
            cells = _cells(one)[: 2 if result.edited else 1]
            table.add_row(name, one.metric.replace("_", " "), *cells)
        table.add_section()
    if result.perplexity:
        cells = list(map(figures.perplexity, result.perplexity.values()))
        table.add_row("text", "perplexity", *cells)
    OUT.print(table)
    if result.perplexity and result.about.get("text"):
        text = escape(str(result.about["text"]))
        OUT.print(f"  perplexity: of {text}; lower is better", style="dim")
    for metric, meaning in figures.protocols(result).items():
        OUT.print(f"  {metric.replace('_', ' ')}: {meaning}", style="dim")
    if any(one.interval for model in (result.unedited, result.edited) for one in model.values()):
        OUT.print("  (from–to): a 95% interval, in percent", style="dim")
    for by, groups in result.groups.items():
        _groups(by.replace("_", " "), groups)


def _leaks(leaks: Sequence[str]) -> None:
    """A warning where questions that should stay, or other wordings, are also edited."""
    if not leaks:
        return
    one = len(leaks) == 1
    OUT.print(
        f"{counted(len(leaks), 'question')} beside facts {'is' if one else 'are'} edited or "
        "answered otherwise too, so figures of them mislead:"
    )
    for leak in leaks[:3]:
        OUT.print(f"  {escape(leak)}")
    if len(leaks) > 3:
        OUT.print(f"  and {len(leaks) - 3:,} more (--json has all)")


def _groups(by: str, groups: Mapping[str, Group]) -> None:
    """One line per group of facts, the largest where there are many; nothing for a single one."""
    if len(groups) < 2:
        return
    largest = sorted(groups, key=lambda name: -groups[name].facts)[:MOST_GROUPS]
    columns = [
        (kind, metric)
        for kind, metric in GROUPED
        if any(_figure(group.unedited, kind, metric) is not None for group in groups.values())
    ]
    heads = [by, "facts", *(f"{kind} {metric.replace('_', ' ')}" for kind, metric in columns)]
    rows = []
    for name in (name for name in groups if name in largest):
        group = groups[name]
        rows.append([harmless(name), f"{group.facts:,}"])
        for kind, metric in columns:
            values = [_figure(model, kind, metric) for model in (group.unedited, group.edited)]
            rows[-1].append(
                " → ".join(figures.percent(value) for value in values if value is not None)
            )
    title = f"by {by}, unedited to edited"
    has_edited = any(group.edited for group in groups.values())
    widths = _widths([heads, *rows])
    has_room = sum(widths) <= OUT.width - (3 * len(heads) + 1)
    table = Table(title=title if has_edited else f"by {by}", pad_edge=has_room)
    for at, (head, width) in enumerate(zip(heads, widths, strict=True)):
        table.add_column(head, width=width, overflow="fold", justify="right" if at else "left")
    for name, *cells in rows:
        table.add_row(escape(_folded(name, widths[0])), *cells)
    OUT.print(table)
    if len(groups) > len(largest):
        OUT.print(f"  and {len(groups) - len(largest)} smaller groups (--json has all)")


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """Of a table's columns: figures as narrow as they fold well, where names need the room."""
    columns = list(zip(*lines, strict=True))
    wide = [max(map(cell_len, column)) for column in columns]
    room = OUT.width - (3 * len(columns) - 1)  # without lines, and blanks but at the edges
    if sum(wide) <= room:
        return wide
    words = [max(cell_len(word) for text in column for word in text.split()) for column in columns]
    narrow = [min(all_of_it, max(FIGURE, one)) for all_of_it, one in zip(wide, words, strict=True)]
    return [min(wide[0], max(FIGURE, room - sum(narrow[1:]))), *narrow[1:]]


def _folded(name: str, width: int) -> str:
    """A group's name in lines, which end with a word of it or an underscore where they can."""
    lines = [""]
    for part in re.findall(r"[^_\s]*[_\s]+|[^_\s]+", name):
        if lines[-1] and cell_len(f"{lines[-1]}{part}".rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _figure(model: Mapping[str, Scores], kind: str, metric: str) -> float | None:
    found: float | None = getattr(model[kind], metric) if kind in model else None
    return found


def _cells(line: figures.Line) -> list[str]:
    """Unedited and edited, with the interval, and what is kept as a count."""
    cells = []
    for value, ends in ((line.before, line.before_between), (line.after, line.after_between)):
        said = "" if value is None else figures.percent(value) if line.is_share else f"{value:.3f}"
        if ends:
            said += " ({:.1f}–{:.1f})".format(*(100 * end for end in ends))
        cells.append(said)
    if line.count:
        cells[1] = f"{cells[1]} ({line.count})" if cells[1] else line.count
    return cells


def demonstrated(result: DemoResult) -> None:
    """The demo's figures, answers and the proof that the weights came back."""
    edited(result.edit)
    report(result.report)
    decoded = result.report.about["decoded_facts"]
    OUT.print(
        f"  generated is over the first {counted(decoded, 'fact')}\n"
        "  neighbours ask the same about another subject, which other reports seldom do\n"
        f"  not asked: {result.report.about['left_out']}",
        style="dim",
    )
    OUT.print("\nIn free-running text:")
    for one in result.asked:
        asked(one)
    OUT.print("\nSHA-256 over every bit of every weight:")
    digests = {
        "unedited": result.weights_before,
        "with the patch on": result.weights_during,
        "patch off again": result.weights_after,
    }
    for name, digest in digests.items():
        OUT.print(f"  {name:<18} {digest}", soft_wrap=True)
    back = result.weights_before == result.weights_after
    OUT.print(
        "The weights are bit for bit what they were."
        if back
        else "The weights did NOT come back as they were; please report this."
    )
    OUT.print()
    page(result.page.parent)
