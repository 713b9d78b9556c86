"""Tables and progress for the terminal: the only file beside cli.py that knows how things look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from malmend.commands.ask import AskResult
from malmend.commands.cache import CacheResult
from malmend.commands.continuations import ContinuationsResult
from malmend.commands.demo import DemoResult
from malmend.commands.edit import EditResult
from malmend.commands.finetune import FinetuneResult
from malmend.commands.inspect import Inspection
from malmend.commands.train import TrainResult
from malmend.editors.training import StepRecord
from malmend.evaluation.page import PAGE
from malmend.evaluation.protocols import PROTOCOLS, Group, Scores
from malmend.evaluation.replies import KINDS
from malmend.evaluation.report import Report
from malmend.evaluation.view import QUESTIONS
from malmend.facts.fact import FactSet
from malmend.models.finetune import EpochRecord

# What a model says is text: ":smile:" stays as it is.
OUT = Console(emoji=False)
ERR = Console(stderr=True, emoji=False)
METRICS = ("token_ratio", "exact", "generated", "generated_chat", "retention", "kl", "kept")
# Columns of the tables of groups: a kind and a metric.
GROUPED = (
    ("ES", "token_ratio"),
    ("ES", "generated"),
    ("GS", "token_ratio"),
    ("GS", "generated"),
    ("NS", "token_ratio"),
)
MOST_GROUPS = 12  # rows of such a table; all are in the report's JSON


@contextmanager
def bars() -> Iterator[Any]:
    """Progress bars on standard error, one per stage; yields the callback to feed them."""
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=ERR) as shown:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(escape(stage), total=1.0)
            shown.update(tasks[stage], completed=share)
            if share >= 1.0:
                shown.stop_task(tasks[stage])

        yield report


def silence() -> None:
    """Says nothing more: another process of the same run does."""
    OUT.quiet = ERR.quiet = True


def status(line: str) -> None:
    """What comes next; on standard error, where the bars are."""
    ERR.print(escape(line), highlight=False)


def edited(result: EditResult) -> None:
    """What an edit did."""
    skipped(result.facts)
    facts = len(result.facts)
    OUT.print(
        f"Edited {facts:,} fact{'s' * (facts != 1)} at {len(result.patch.factors)} layers in "
        f"{result.seconds:.1f} s: the edit prompts' answer tokens are right "
        f"{_percent(result.edited)} of the time, {_percent(result.unedited)} before "
        "(token ratio, teacher forced)."
    )
    _trained_on(result.patch.provenance.get("trained_on"), facts)
    if result.path is not None:
        size = result.path.stat().st_size / 1e6
        OUT.print(f"Patch: {escape(str(result.path))} ({size:.1f} MB)")
    if result.peak is not None:
        _peak(result.peak)
    if result.page is not None:
        page(result.page.parent)


def _peak(held: int) -> None:
    OUT.print(f"Memory at the peak: {held / 1e9:.2f} GB.")


def _trained_on(seen: int | None, facts: int) -> None:
    """A warning where figures are of facts that the editor learned from."""
    if seen:
        OUT.print(
            f"The editor was trained on the subjects of {seen:,} of these {facts:,} facts; figures "
            "of those say nothing about facts that are new to it."
        )


def page(folder: str | Path) -> None:
    """Where the report's page lies."""
    path = Path(folder) / PAGE
    OUT.print(
        f"Report: {escape(str(path))} (open it in a browser)", highlight=False, soft_wrap=True
    )


def skipped(facts: FactSet) -> None:
    """Which facts were left out, and why."""
    if not facts.skipped:
        return
    kinds = [one.kind for one in facts.skipped]
    OUT.print(
        f"Skipped {len(kinds)} facts: {kinds.count('duplicate')} duplicates and "
        f"{kinds.count('contradiction')} contradictions of earlier lines (--strict refuses them)."
    )
    for one in facts.skipped[:10]:
        OUT.print(f"  line {one.fact.line}: {one.kind} of line {one.earlier.line}", highlight=False)
    if len(kinds) > 10:
        OUT.print(f"  and {len(kinds) - 10} more")


def report(result: Report) -> None:
    """Unedited beside edited, each column's protocol named."""
    _trained_on(result.about.get("trained_on"), result.facts)
    _leaks(result.leaks)
    table = Table(title=f"{result.facts:,} facts, {escape(str(result.about['model']))}")
    table.add_column("question")
    table.add_column("protocol")
    table.add_column("unedited", justify="right")
    if result.edited:
        table.add_column("edited", justify="right")
    shown = set()
    for kind in KINDS:
        before = result.unedited.get(kind)
        if before is None or not before.questions:
            continue
        after = result.edited.get(kind)
        for index, (metric, cells) in enumerate(_lines(before, after)):
            label = f"{kind} ({QUESTIONS[kind][0].lower()})" if index == 0 else ""
            table.add_row(label, metric.replace("_", " "), *cells[: 2 if result.edited else 1])
            shown.add(metric)
        table.add_section()
    if result.perplexity:
        cells = [f"{result.perplexity[key]:.2f}" for key in result.perplexity]
        table.add_row("text", "perplexity", *cells)
    OUT.print(table)
    if result.perplexity and result.about.get("text"):
        text = escape(str(result.about["text"]))
        OUT.print(f"  perplexity: of {text}; lower is better", style="dim", highlight=False)
    for metric, meaning in PROTOCOLS.items():
        if metric in shown:
            OUT.print(f"  {metric.replace('_', ' ')}: {meaning}", style="dim", highlight=False)
    for by, groups in result.groups.items():
        _groups(by.replace("_", " "), groups)


def _leaks(leaks: Sequence[str]) -> None:
    """A warning where questions that should stay are also edited."""
    if not leaks:
        return
    one = len(leaks) == 1
    OUT.print(
        f"{len(leaks):,} question{'' if one else 's'} that should stay {'is' if one else 'are'} "
        "also edited, so what was kept looks worse than it is:"
    )
    for leak in leaks[:3]:
        OUT.print(f"  {escape(leak)}", highlight=False)
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
    title = f"by {by}, unedited to edited"
    table = Table(title=title if any(g.edited for g in groups.values()) else f"by {by}")
    table.add_column(by)
    table.add_column("facts", justify="right")
    for kind, metric in columns:
        table.add_column(f"{kind} {metric.replace('_', ' ')}", justify="right")
    for name in (name for name in groups if name in largest):
        group = groups[name]
        cells = []
        for kind, metric in columns:
            values = [_figure(model, kind, metric) for model in (group.unedited, group.edited)]
            cells.append(" → ".join(_percent(value) for value in values if value is not None))
        table.add_row(escape(name), f"{group.facts:,}", *cells)
    OUT.print(table)
    if len(groups) > len(largest):
        OUT.print(f"  and {len(groups) - len(largest)} smaller groups (--json has all)")


def _figure(model: Mapping[str, Scores], kind: str, metric: str) -> float | None:
    found: float | None = getattr(model[kind], metric) if kind in model else None
    return found


def _lines(before: Scores, after: Scores | None) -> Iterator[tuple[str, list[str]]]:
    for metric in METRICS:
        values = [getattr(one, metric) if one else None for one in (before, after)]
        count = after.kept_count if after and metric == "kept" else ""
        if values == [None, None] and not count:
            continue
        if metric == "kl":
            cells = ["" if value is None else f"{value:.3f}" for value in values]
        else:
            cells = ["" if value is None else _percent(value) for value in values]
        if metric == "token_ratio":
            for index, one in enumerate((before, after)):
                if one and one.interval:
                    cells[index] += f" ± {100 * one.interval:.1f}"
        if count:
            cells[1] = f"{cells[1]} ({count})" if cells[1] else count
        yield metric, cells


def asked(result: AskResult) -> None:
    """A prompt and what the model says."""
    OUT.print(f"[bold]{escape(result.prompt)}[/bold]", highlight=False)
    before = _cut(result.unedited, result.unedited_cut)
    if result.edited is None:
        OUT.print(escape(before), highlight=False)
        return
    after = _cut(result.edited, result.edited_cut)
    for name, text in (("unedited:", before), ("edited:", after)):
        line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
        OUT.print(f"  {name:<9} {escape(line) or '(nothing)'}", highlight=False, soft_wrap=True)


def _cut(text: str, cut: bool) -> str:
    """An answer that was cut at the token limit ends in a mark that says so."""
    return f"{text} …" if cut else text


def step(record: StepRecord, steps: int) -> None:
    """One line per training step."""
    ERR.print(
        f"step {record.step:>4}/{steps}  loss {record.loss:.4f}  "
        f"generality {record.gen:.4f}  locality {record.loc:.4f}  "
        f"gradient {record.grad_norm:.3g}  eta {record.eta:.3g}  {record.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def learning(record: Any, steps: int) -> None:
    """One line per step of a method that is no editor: every figure of its record."""
    figures = {name: value for name, value in vars(record).items() if name != "step"}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    ERR.print(f"step {record.step:>4}/{steps}  {shown}", highlight=False, soft_wrap=True)


def trained(result: TrainResult) -> None:
    """Where the editor lies and how the loss went."""
    if result.leaks:
        OUT.print(
            f"{len(result.leaks)} questions that must not move are also edit prompts; the first:"
        )
        OUT.print(f"  {escape(result.leaks[0])}")
    first, last = result.records[0], result.records[-1]
    OUT.print(
        f"Trained {last.step} steps: meta-loss {first.loss:.3f} at the first, "
        f"{last.loss:.3f} at the last.  Editor: {escape(str(result.folder))}"
    )
    if result.peak is not None:
        _peak(result.peak)


def epoch(record: EpochRecord) -> None:
    """One line per epoch of fine-tuning."""
    judged = "held out" if record.phase == "choice" else "learned"
    ERR.print(
        f"epoch {record.epoch:>3}  loss {record.loss:.4f}  right of what is {judged} "
        f"{record.accuracy:.3f}  {record.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def finetuned(result: FinetuneResult) -> None:
    """Where the model lies and how much it knows."""
    last = result.records[-1]
    epochs = f"{last.epoch} epoch{'s' * (last.epoch != 1)}"
    OUT.print(
        f"Fine-tuned on {result.questions:,} questions in {epochs}, of which the model "
        f"now answers {last.accuracy:.1%}.  Model: {escape(str(result.folder))}",
        soft_wrap=True,
    )


def continued(result: ContinuationsResult) -> None:
    """How many passages there are, and the first."""
    first = result.facts[0]
    OUT.print(
        f"{len(result.facts):,} passages and what follows them: {escape(str(result.path))}",
        soft_wrap=True,
    )
    OUT.print(f"  ...{escape(first.prompt[-60:])} -> {escape(first.answer)}", highlight=False)
    OUT.print("Edit them with --end-of-answer none: a continuation has no end.")


def plain(text: str) -> None:
    """Text that may be piped into a file: as it is, no line broken."""
    OUT.print(text, end="", markup=False, highlight=False, soft_wrap=True)


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
        highlight=False,
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
    said = "All of it was removed." if result.cleared else "malmend cache --clear true removes it."
    OUT.print(said)


def inspected(result: Inspection) -> None:
    """Names and values, nested ones indented."""
    OUT.print(f"[bold]{result.kind}[/bold] {escape(result.name)}", highlight=False)
    _entries(result.entries, 2)


def _entries(entries: Mapping[str, Any], indent: int) -> None:
    for name, value in entries.items():
        if isinstance(value, Mapping):
            OUT.print(f"{' ' * indent}{escape(name)}:", highlight=False)
            _entries(value, indent + 2)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            OUT.print(f"{' ' * indent}{escape(name)}: {len(value)}", highlight=False)
            for line in value[:20]:
                OUT.print(f"{' ' * indent}  {escape(line)}", highlight=False)
        else:
            if isinstance(value, list) and value and isinstance(value[0], float):
                value = ", ".join(f"{one:.4g}" for one in value)
            counts = isinstance(value, int) and not isinstance(value, bool)
            shown = f"{value:,}" if counts else value
            OUT.print(f"{' ' * indent}{escape(name)}: {escape(str(shown))}", highlight=False)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def demonstrated(result: DemoResult) -> None:
    """The demo's figures, answers and the proof that the weights came back."""
    edited(result.edit)
    report(result.report)
    decoded = result.report.about["decoded_facts"]
    OUT.print(
        f"  generated is over the first {decoded:,} facts\n"
        "  neighbours ask the same about another subject, which other reports seldom do\n"
        f"  not asked: {result.report.about['left_out']}",
        style="dim",
        highlight=False,
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
        OUT.print(f"  {name:<18} {digest}", highlight=False, soft_wrap=True)
    back = result.weights_before == result.weights_after
    OUT.print(
        "The weights are bit for bit what they were."
        if back
        else "The weights did NOT come back as they were; please report this."
    )
    OUT.print()
    page(result.page.parent)
