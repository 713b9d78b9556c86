"""Scaling curves (MALMEN, Figures 4 to 8): a panel a metric, a line a method, bands over seeds."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from malmend.bench.table import Row, figure, groups, megabytes
from malmend.errors import MalmendError
from malmend.files import written_beside

PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("ES (token ratio)", lambda row: figure(row, "edited", "ES", "token_ratio")),
    ("GS (token ratio)", lambda row: figure(row, "edited", "GS", "token_ratio")),
    ("LS (token ratio; dotted: unedited)", lambda row: figure(row, "edited", "LS", "token_ratio")),
    ("retention", lambda row: figure(row, "edited", "LS", "retention")),
    ("ES generated", lambda row: figure(row, "edited", "ES", "generated")),
    ("mean residual", lambda row: row["patch"].get("mean_residual")),
    ("the same with the edited keys", lambda row: row["patch"].get("residual_after")),
    ("seconds to edit", lambda row: row["edit_seconds"]),
    ("memory to edit (MB)", megabytes),
)
LONGEST = 50  # characters of a model in a file's name, of four bytes at most
UNEDITED = {"LS (token ratio; dotted: unedited)": ("LS", "token_ratio")}
LOGARITHMIC = (
    "mean residual",
    "the same with the edited keys",
    "seconds to edit",
    "memory to edit (MB)",
)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One figure for every model and protocol, as PNG and SVG.

    Raises:
        MalmendError: matplotlib is not installed.
    """
    found, written = groups(rows), []
    for model, protocol in dict.fromkeys(key[:2] for key in found):
        mine = {key[2:]: some for key, some in found.items() if key[:2] == (model, protocol)}
        drawn = _drawn(mine, f"{model}, {protocol}")
        stem = f"curves-{_file_name(model)}-{protocol}"
        for kind in ("png", "svg"):
            path = folder / f"{stem}.{kind}"
            with written_beside(path) as beside:
                drawn.savefig(beside, format=kind, dpi=120)
            written.append(path)
    return written


def _file_name(model: str) -> str:
    """What a file may be called for a model; of one that no file may be, with a digest of it."""
    name = "".join(c if c.isalnum() else "-" for c in model)[:LONGEST]
    if name == model:
        return name
    return f"{name}-{hashlib.sha256(model.encode(errors='replace')).hexdigest()[:8]}"


def _drawn(mine: dict[Any, list[Row]], title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MalmendError(
            "Figures need matplotlib, which is not installed; run pip install matplotlib."
        ) from error
    rows = [row for some in mine.values() for row in some]
    panels = [(name, of) for name, of in PANELS if any(of(row) is not None for row in rows)]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    drawn = Figure(figsize=(4.2 * columns, 3.2 * lines + 0.8), layout="constrained")
    axes = drawn.subplots(lines, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for _, name in mine))
    for axis, (heading, of) in zip(axes, panels, strict=False):
        _panel(axis, heading, of, mine, names)
    for axis in axes[len(panels) :]:
        axis.remove()
    # By names of its own: matplotlib leaves out what is labelled "_mine".
    legend = drawn.legend(
        axes[0].get_lines()[: len(names)],
        names,
        loc="outside lower center",
        ncols=min(5, len(names)),
    )
    said = [*legend.get_texts(), drawn.suptitle(title)]
    for text in said:
        text.set_parse_math(False)  # two $ are no formula
    return drawn


def _panel(axis: Any, heading: str, of: Any, mine: dict[Any, list[Row]], names: list[str]) -> None:
    for index, name in enumerate(names):
        points = {
            size: [value for row in some if (value := of(row)) is not None]
            for (size, other), some in mine.items()
            if other == name
        }
        sizes = [size for size in sorted(points) if points[size]]
        means = [statistics.fmean(points[size]) for size in sizes]
        spread = [statistics.stdev(points[s]) if len(points[s]) > 1 else 0.0 for s in sizes]
        colour, marker = f"C{index % 10}", "osv^Dxp*h+"[index // 10 % 10]
        line = ("-", "--", "-.")[index // 10 % 3]
        axis.plot(sizes, means, line, marker=marker, markersize=4, color=colour, label=name)
        low = [mean - one for mean, one in zip(means, spread, strict=True)]
        high = [mean + one for mean, one in zip(means, spread, strict=True)]
        axis.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
    if heading in UNEDITED:
        by_size: dict[int, list[float]] = {}
        for (size, _), some in mine.items():
            for row in some:
                value = figure(row, "unedited", *UNEDITED[heading])
                by_size.setdefault(size, []).extend([] if value is None else [value])
        sizes = [size for size in sorted(by_size) if by_size[size]]
        levels = [statistics.fmean(by_size[size]) for size in sizes]
        shown = "_" if len(sizes) == 1 else "None"  # of a single size there is no line to see
        axis.plot(sizes, levels, ":", marker=shown, markersize=20, color="0.4", label="_unedited")
    axis.set_xscale("log", base=2)
    sizes = sorted({size for size, _ in mine})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_title(heading, fontsize=10)
    axis.set_xlabel("facts")
    axis.grid(alpha=0.3)
    if heading in LOGARITHMIC:
        axis.set_yscale("log")
