"""Tables and progress for the terminal: with the show_*.py, how things look."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from malmend.commands.ask import AskResult
from malmend.commands.cache import CacheResult
from malmend.commands.continuations import ContinuationsResult
from malmend.commands.edit import EditResult
from malmend.commands.inspect import Inspection
from malmend.editors.draws import READINGS
from malmend.errors import counted, harmless
from malmend.evaluation.figures import percent
from malmend.evaluation.page import PAGE
from malmend.facts.fact import subject_hash


class _Terminal(Console):
    """A console to which what models say and files hold is text: it gives the terminal no orders.

    ":smile:" stays as it is.
    """

    def render_str(self, text: str, **kept: Any) -> Text:
        return super().render_str(harmless(text), **kept)


Result = TypeVar("Result")
LONGEST = 300  # characters of a text that an inspection shows

OUT = _Terminal(emoji=False, highlight=False)
ERR = _Terminal(stderr=True, emoji=False, highlight=False)


@contextmanager
def bars() -> Iterator[Any]:
    """Progress bars on standard error, one per stage; yields the callback to feed them."""
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    shown = Progress(*columns, console=ERR)
    tasks: dict[str, TaskID] = {}

    def report(stage: str, share: float) -> None:
        shown.start()  # with the first stage: without any it would end with an empty line
        if stage not in tasks:
            tasks[stage] = shown.add_task(escape(stage), total=1.0)
        shown.update(tasks[stage], completed=share)
        if share >= 1.0:
            shown.stop_task(tasks[stage])

    try:
        yield report
    finally:
        if tasks:
            shown.stop()


def with_bars(function: Callable[..., Result], given: Mapping[str, Any]) -> Result:
    """What a command's function gives, while it says how far it is and what comes next."""
    with bars() as report:
        return function(**given, progress=report, told=status)


def silence() -> None:
    """Says nothing more: another process of the same run does."""
    OUT.quiet = ERR.quiet = True


def status(line: str) -> None:
    """What comes next; on standard error, where the bars are."""
    # What is set in cites a place in a file, which stays whole.
    ERR.print(escape(line), soft_wrap=line.startswith(" "))


@contextmanager
def notes() -> Iterator[None]:
    """What malmend logs, such as a file that takes long to read, is said as a status."""
    log, handler = logging.getLogger("malmend"), logging.Handler(logging.INFO)
    handler.emit = lambda record: status(record.getMessage())  # type: ignore[method-assign]
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def edited(result: EditResult) -> None:
    """What an edit did."""
    facts = len(result.facts)
    OUT.print(
        f"Edited {counted(facts, 'fact')} at {counted(len(result.patch.factors), 'layer')} in "
        f"{result.seconds:.1f} s: the edit prompts' answer tokens are right "
        f"{percent(result.edited)} of the time, {percent(result.unedited)} before "
        "(token ratio, teacher forced)."
    )
    settled(result.patch.provenance)
    trained_on(result.patch.provenance.get("trained_on"), facts)
    if result.path is not None:
        size = max(result.path.stat().st_size / 1e6, 0.1)  # to be seen
        OUT.print(f"Patch: {escape(str(result.path))} ({size:,.1f} MB)")
    if result.peak is not None:
        peak(result.peak)
    if result.page is not None:
        page(result.page.parent)


def settled(said: Mapping[str, Any]) -> None:
    """What settling came to, where an edit did: by the patch's header."""
    steps, rounds, readings = (said.get(name, 0) for name in ("steps", "rounds", "readings"))
    if not steps or not rounds:  # that it was discarded is told
        return
    line, taken = f"Settled in {steps:,} steps.", steps * min(READINGS, readings) / readings
    if taken < rounds:
        line = (
            f"Settled in {steps:,} steps, which read each fact {taken:.1f} times in every wording; "
            f"{rounds:g} would take --refine.steps {math.ceil(rounds * readings / READINGS):d}."
        )
    OUT.print(line)


def peak(held: int) -> None:
    """Bytes that were held at most."""
    OUT.print(f"Memory at the peak: {held / 1e9:.2f} GB.")


def trained_on(seen: int | None, facts: int) -> None:
    """A warning where figures are of facts that the editor learned from."""
    if seen:
        OUT.print(
            f"The editor was trained on the subjects of {seen:,} of {counted(facts, 'fact')}; "
            "figures of those say nothing about facts that are new to it."
        )


def page(folder: str | Path) -> None:
    """Where the report's page lies."""
    path = Path(folder) / PAGE
    OUT.print(f"Report: {escape(str(path))} (open it in a browser)", soft_wrap=True)


def asked(result: AskResult) -> None:
    """A prompt and what the model says."""
    OUT.print(f"[bold]{escape(result.prompt)}[/bold]")
    before = _cut(result.unedited, result.unedited_cut)
    if result.edited is None:
        OUT.print(escape(before) if before.strip() else "(nothing)")
        return
    after = _cut(result.edited, result.edited_cut)
    for name, text in (("unedited:", before), ("edited:", after)):
        line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
        OUT.print(f"  {name:<9} {escape(line) or '(nothing)'}", soft_wrap=True)


def _cut(text: str, cut: bool) -> str:
    """An answer that was cut at the token limit ends in a mark that says so."""
    return f"{text} …" if cut else text


def continued(result: ContinuationsResult) -> None:
    """How many passages there are, how many were left out, and the first."""
    first, count = result.facts[0], len(result.facts)
    them = "it" if count == 1 else "them"
    OUT.print(
        f"{counted(count, 'passage')} and what follows {them}: {escape(str(result.path))}",
        soft_wrap=True,
    )
    if left := len(result.skipped):
        begin = "begins as an earlier one does" if left == 1 else "begin as earlier ones do"
        OUT.print(f"Left out {counted(left, 'passage')} that {begin}.")
    OUT.print(f"  ...{escape(first.prompt[-60:])} -> {escape(first.answer)}")
    OUT.print("Edit them with --end-of-answer none: a continuation has no end.")


def say(line: str) -> None:
    """A line of text, folded by nobody but the terminal."""
    OUT.print(escape(line), soft_wrap=True)


def plain(text: str) -> None:
    """Text that may be piped into a file: no markup in it, no line broken."""
    OUT.print(text, end="", markup=False, soft_wrap=True)


def cell(row: Mapping[str, Any]) -> None:
    """One line per finished cell of a bench."""
    shown = [
        f"{kind} {value:.3f}"
        for kind in ("ES", "GS", "LS")
        if (value := row["edited"][kind]["token_ratio"]) is not None
    ]
    ERR.print(
        escape(
            f"{row['name']}, m {row['m']:,}, {row['protocol']}, seed {row['seed']}: "
            f"{'  '.join(shown)}  {row['seconds']:.0f} s"
        ),
        soft_wrap=True,
    )


def cached(result: CacheResult) -> None:
    """What the cache holds, by kind."""
    table = Table(title=f"{escape(str(result.folder))}", title_justify="left")
    table.add_column("kept")
    table.add_column("entries", justify="right")
    table.add_column("MB", justify="right")
    for one in result.kinds:
        table.add_row(one.what, f"{one.entries:,}", f"{one.size / 1e6:,.1f}")
    OUT.print(table)
    if result.stale and not (result.cleared or result.left):
        models = "model is" if len(result.stale) == 1 else "models are"
        OUT.print(
            f"{len(result.stale):,} {models} stale (of an older version, or the file has changed "
            "or is gone) and may be removed alone:"
        )
        for path in result.stale:
            OUT.print(f"  {escape(str(path))}", soft_wrap=True)
    if result.cleared:
        OUT.print("All of it was removed.")
    elif result.left:
        left = sum(one.size for one in result.left)
        OUT.print(f"{left / 1e6:,.1f} MB of it could not be removed; remove the folder by hand.")
    else:
        OUT.print("malmend cache --clear true removes it.")


def inspected(result: Inspection) -> None:
    """Names and values, nested ones indented."""
    OUT.print(f"[bold]{result.kind}[/bold] {escape(result.name)}")
    entries = dict(result.entries)
    if isinstance(joined := entries.get("subjects"), str):  # an editor's, which nobody can read
        entries["subjects"] = len(joined) // len(subject_hash(""))
    _entries(entries, 2)


def _entries(entries: Mapping[str, Any], indent: int) -> None:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            OUT.print(f"{' ' * indent}{escape(name)}:")
            _entries(value, indent + 2)
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            OUT.print(f"{' ' * indent}{escape(name)}: {len(value)}")
            for line in value[:20]:
                OUT.print(f"{' ' * indent}  {escape(_short(line))}")
            if len(value) > 20:
                OUT.print(f"{' ' * indent}  and {len(value) - 20:,} more")
        else:
            if isinstance(value, list) and value and isinstance(value[0], float):
                value = ", ".join(f"{one:.4g}" for one in value)
            counts = isinstance(value, int) and not isinstance(value, bool)
            shown = f"{value:,}" if counts else value
            shown = escape(_short(str(shown)))
            OUT.print(f"{' ' * indent}{escape(name)}: {shown}")


def _short(text: str) -> str:
    """A text of a file, as far as a person reads it in a terminal."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … ({len(text):,} characters)"
