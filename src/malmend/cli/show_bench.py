"""How a bench's tables look in a terminal; the rest is in show.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from malmend.cli.show import OUT, plain
from malmend.errors import harmless

KEYS = 2  # columns that say what a row is of: m and the method
WIDEST = 28  # signs of a method's name in a line


def bench(markdown: str) -> None:
    """What a bench gave: its Markdown as it is, or in a terminal as tables that fit its width."""
    if not OUT.is_terminal:
        plain(markdown)
        return
    for block in re.split(r"\n\n+", markdown.strip()):
        lines = [_cells(line) for line in block.splitlines() if line.startswith("|")]
        if not lines:
            OUT.print(escape(block.replace("**", "")))
        elif "prompt" in lines[0]:
            _failures(lines[0], lines[2:])
        else:
            _figures(lines[0], lines[2:])


def _cells(line: str) -> list[str]:
    """Those of a line of Markdown, ``\\|`` being a sign of one."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [harmless(one.strip().replace("\\|", "|")) for one in cells]


def _figures(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As many tables as the columns need, each with m and the method in front."""
    widths = [
        max(*map(cell_len, name.split()), *(cell_len(row[at]) for row in rows))
        for at, name in enumerate(head)
    ]
    widths[1] = min(WIDEST, widths[1])
    for columns in _parted(widths):
        table = Table()
        for at in columns:
            table.add_column(
                head[at],
                width=widths[at],
                overflow="fold",
                justify="left" if at == 1 else "right",
            )
        for row in rows:
            if row[1] == "*unedited*":
                table.add_section()
            table.add_row(*(escape(row[at].replace("*unedited*", "unedited")) for at in columns))
        OUT.print(table)


def _parted(widths: Sequence[int]) -> Iterator[list[int]]:
    """The columns of each table; the first stand in all of them."""
    keys = list(range(KEYS))
    chosen = keys[:]
    for at in range(KEYS, len(widths)):
        columns = [*chosen, at]
        if len(chosen) > KEYS and sum(widths[one] + 3 for one in columns) + 1 > OUT.width:
            yield chosen
            columns = [*keys, at]
        chosen = columns
    yield chosen


def _failures(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each answer below its prompt: long texts find no room side by side."""
    for method, size, kind, *texts in rows:
        OUT.print(f"[bold]{escape(method)}[/bold], m {size}, {kind}")
        for name, text in zip(head[3:], texts, strict=True):
            OUT.print(f"  {name:<9} {escape(text) or '(nothing)'}")
    OUT.print()
