"""Methods side by side: runs a plan's cells, and makes tables and figures of what they gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from malmend.bench.asking import Asking
from malmend.bench.cell import drawn, run_cell
from malmend.bench.making import asked, key_of, making, unsaid
from malmend.bench.plan import Cell, Plan, read_plan
from malmend.bench.planned_method import named_method, planned_method
from malmend.bench.plot import plot
from malmend.bench.results import NAME, Results
from malmend.bench.table import Row, failures, latest, markdown
from malmend.editors.checkpoint import load_editor
from malmend.editors.training_folder import check_unlike
from malmend.errors import SHOWN, MalmendError, counted, is_out_of_memory
from malmend.facts.fact import Fact, facts_digest
from malmend.facts.lint import skipped_said
from malmend.facts.readers import read_facts, read_text
from malmend.files import reason, writable_folder
from malmend.given import checked
from malmend.methods.trained import trained_method
from malmend.models.device import device_of, places_of
from malmend.models.load import load_config, load_model
from malmend.one_writer import only_writer
from malmend.patch import now
from malmend.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class BenchResult:
    """A plan that is done: its rows, in the order of its cells, and where they lie."""

    folder: Path
    rows: tuple[dict[str, Any], ...]


@checked()
def bench(
    plan: str | Path | Plan,
    out: str | Path,
    device: str = "cpu",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
    stepped: Callable[[dict[str, Any]], None] = lambda row: None,
) -> BenchResult:
    """Runs every cell of a plan that is not in ``out`` yet.

    Stopped at any time it loses the running cell; the same command goes on.  A cell that fails
    stops no other; the same command tries it again.

    Args:
        plan: a plan's file, or a plan.
        out: the folder of results.
        device: models are put on: "cpu", "cuda" or another accelerator that torch finds, one of
            several as "cuda:1", or "auto" for spread over all.
        progress: called with stage and share done.
        told: called about facts that were skipped, and with what the plan will cost, before the
            work and whenever facts become more.
        stepped: called with the row of every finished cell.

    Raises:
        MalmendError: any bad input, in one sentence; or once the others are done, a line for each
            cell that failed.
    """
    plan = plan if isinstance(plan, Plan) else read_plan(plan)
    known = read_facts(plan.facts)
    facts = list(known)
    _check_files(plan)
    device_of(device)
    cells = list(plan.cells())
    if not cells:
        raise MalmendError("The plan has no cell: every size is above its methods' `most`.")
    if max(cell.size for cell in cells) > len(facts):
        raise MalmendError(
            f"The plan edits {max(cell.size for cell in cells):,} facts and {plan.facts} has "
            f"{len(facts):,}; give smaller sizes, or more facts."
        )
    check_unlike(Path(out))
    folder = writable_folder(out)
    for line in skipped_said(known.skipped, strict=False):
        told(line)
    with only_writer(folder):  # from the first look at what is done
        return _run(plan, cells, facts, folder, device, progress, told, stepped)


def _run(
    plan: Plan,
    cells: Sequence[Cell],
    facts: Sequence[Fact],
    folder: Path,
    device: str,
    progress: Progress,
    told: Callable[[str], None],
    stepped: Callable[[dict[str, Any]], None],
) -> BenchResult:
    """Every cell that is not in the folder yet, as :func:`bench` says."""
    results = Results(folder)
    keyed = {key_of(cell, facts, plan): cell for cell in cells}
    left = {key: cell for key, cell in keyed.items() if key not in results.rows}
    told(cost(list(left.values()), len(keyed), results))
    for place in sorted(
        _elsewhere(device, [results.rows[key] for key in keyed if key not in left])
    ):
        told(f"Some of what is done ran on {place}; give another --out to run it on {device}.")
    asking: Asking | None = None
    failed = list[str]()
    size = next(iter(left.values())).size if left else 0
    for index, (key, cell) in enumerate(left.items()):
        if cell.size != size:  # what smaller ones took says more than was known before
            told(cost(list(left.values())[index:], len(keyed), results))
            size = cell.size
        try:
            if asking is None or asking.loaded.name != cell.model:
                asking = None  # before another is loaded
                asking = Asking(load_model(cell.model, device=device), plan)
            row = _row(asking, cell, facts, progress)
        except Exception as error:  # whatever a method raises
            failed.append(_failure(cell, error))
            told(f"Failed: {failed[-1]}")
            continue
        results.add(key, row)
        stepped(results.rows[key])
    _check_done(failed, len(keyed), folder)
    return BenchResult(folder, tuple(results.rows[key] for key in keyed))


def _row(asking: Asking, cell: Cell, facts: Sequence[Fact], progress: Progress) -> dict[str, Any]:
    """What a cell gave, and what it was made of."""
    draw, base = drawn(facts, cell.size, cell.seed), asking.loaded.fingerprint
    return {
        **run_cell(asking, cell, draw, progress),
        "malmend": version("malmend"),
        "torch": version("torch"),
        "finished": now(),
        "base": base,
        "made": making(cell, facts, asking.plan, asking.loaded),
        "facts_sha256": facts_digest(draw),
        "device": places_of(asking.loaded.model),
        "threads": torch.get_num_threads(),
        "facts": asking.plan.facts,
        "asked": asked(asking.plan),
        "given": dict(cell.given),
        "unsaid": unsaid(cell),
    }


def _failure(cell: Cell, error: Exception) -> str:
    """A line about a cell that gave nothing."""
    why, kind = reason(error), type(error).__name__
    if is_out_of_memory(error):
        why = "there was not enough memory"
    elif not isinstance(error, MalmendError) and why != kind:
        why = f"{kind}: {why}"
    about = f"{cell.model}, {cell.name}, m {cell.size:,}, {cell.protocol}, seed {cell.seed}"
    return f"{' '.join(about.split())}: {why}"


def _check_done(failed: Sequence[str], count: int, folder: Path) -> None:
    """Raises MalmendError where cells failed, with a line for each of the first."""
    if failed:
        many = [f"and {len(failed) - SHOWN:,} more"] * (len(failed) > SHOWN)
        raise MalmendError(
            f"{len(failed)} of {counted(count, 'cell')} failed; the same command tries "
            f"{'it' if len(failed) == 1 else 'them'} again, and what the others gave is in "
            + "\n  ".join([f"{folder}:", *failed[:SHOWN], *many])
        )


def _elsewhere(device: str, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Where rows were run, where that is another kind of device than is asked for."""
    kind = device.partition(":")[0]
    ran = {str(row["device"]) for row in rows if "device" in row}
    return {one for one in ran if (one == "cpu") != (kind == "cpu")}


def _check_files(plan: Plan) -> None:
    """Raises MalmendError where models, editors or the text that a plan names are not there."""
    faults = list[MalmendError]()
    checks: list[Callable[[], object]] = [partial(load_config, model) for model in plan.models]
    checks += [partial(_check_editor, name, given) for name, given in plan.methods.items()]
    checks += [partial(read_text, plan.text)] if plan.text != "none" else []
    for check in checks:
        try:
            check()
        except MalmendError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        head = f"What the plan names cannot be used: {counted(len(faults), 'fault')}"
        raise MalmendError("\n".join([head, *map(str, faults)])) from faults[0]


def _check_editor(name: str, given: Mapping[str, Any]) -> None:
    """Raises MalmendError where a method's editor is not there, or is of another method."""
    editor = planned_method(name, given).editor
    if editor in ("auto", "none"):
        return
    trained = trained_method(editor)
    found = trained.name if trained else load_editor(editor).editor.settings.method
    if (wanted := named_method(name, given) or found) != found:
        raise MalmendError(
            f"The plan's method {name!r} is {wanted}, and {editor} holds an editor of the "
            f"method {found}; give another name or folder."
        )


def cost(left: Sequence[Cell], count: int, results: Results) -> str:
    """How many cells there are, and how long they will take by those that are done."""
    cells = counted(count, "cell")
    if not left:
        return f"{cells}, all done."
    seconds, unknown = 0.0, dict[str, None]()
    for cell in left:
        each = results.seconds_per_fact(cell.model, cell.name, cell.protocol)
        if each is None:
            unknown[cell.name] = None
        else:
            seconds += each * cell.size
    said = f"{cells}, {len(left)} to do"
    if seconds:
        said += f": about {max(1, round(seconds / 60)):,} minutes by what is done"
    if unknown:
        said += f"; how long a cell takes is not known yet of {', '.join(unknown)}"
    return f"{said}."


@checked()
def bench_table(folder: str | Path, failed: bool = False) -> str:
    """What a folder's cells gave, as Markdown.

    Args:
        folder: that ``malmend bench`` wrote.
        failed: what edited models said instead of the answers, in place of the figures.
    """
    rows = _rows(folder)
    return failures(rows) if failed else markdown(rows)


@checked()
def bench_plot(folder: str | Path) -> list[Path]:
    """Draws curves over m of what a folder's cells gave, into the folder.

    Args:
        folder: that ``malmend bench`` wrote.
    """
    return plot(_rows(folder), Path(folder))


def _rows(folder: str | Path) -> list[Row]:
    rows = latest(list(Results(Path(folder)).rows.values()))
    if not rows:
        raise MalmendError(
            f"There is no {NAME} with a finished cell in {folder}; run malmend bench PLAN --out "
            f"{folder} first."
        )
    return rows
