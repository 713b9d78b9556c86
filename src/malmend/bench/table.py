"""Rows of results as a Markdown table: means over seeds, with their deviation."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from malmend.bench.results import NAME
from malmend.evaluation.figures import perplexity
from malmend.evaluation.perplexity import HIGHEST

# Heading, kind of question, metric.
COLUMNS = (
    ("ES", "ES", "token_ratio"),
    ("ES exact", "ES", "exact"),
    ("ES generated", "ES", "generated"),
    ("GS", "GS", "token_ratio"),
    ("LS", "LS", "token_ratio"),
    ("retention", "LS", "retention"),
    ("KL", "LS", "kl"),
    ("near", "NS", "retention"),
)
Row = Mapping[str, Any]
SHOWN = 3  # failures of a kind, of each method
LONGEST = 120  # characters of a text in the table of failures


def megabytes(row: Row) -> float | None:
    """The edit's memory at its peak beyond what was held before."""
    taken = row.get("edit_bytes")
    return None if taken is None else float(taken) / 1e6


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    """Rows that differ in their seed alone, by model, protocol, m and name, in order."""
    found: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["protocol"], row["m"], row["name"]), []).append(row)
    names = list(dict.fromkeys(key[3] for key in found))
    return dict(sorted(found.items(), key=lambda item: (*item[0][:3], names.index(item[0][3]))))


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows of one name and m those that are made as the last of them is, one of each seed.

    A plan may be run again with other settings, facts or weights under the same names; its seeds
    are never mixed.  Nor does a method that was asked about other facts, or otherwise, than the
    last row of the same m and seed stand beside that.
    """

    def cell(row: Row) -> tuple[object, ...]:
        return row["model"], row["protocol"], row["m"], row["name"]

    def about(row: Row) -> tuple[object, ...]:
        return tuple(json.dumps(row[name]) for name in ("facts_sha256", "asked", "base"))

    def draw(row: Row) -> tuple[object, ...]:
        return row["model"], row["protocol"], row["m"], row["seed"]

    asked = {draw(row): about(row) for row in rows}
    rows = [row for row in rows if about(row) == asked[draw(row)]]
    last = {cell(row): row["made"] for row in rows}
    kept = [row for row in rows if row["made"] == last[cell(row)]]
    return list({(*cell(row), row["seed"]): row for row in kept}.values())


def figure(row: Row, model: str, kind: str, metric: str) -> float | None:
    """One figure of a row; None where nothing of the kind was asked."""
    value = row[model].get(kind, {}).get(metric)
    return None if value is None else float(value)


def markdown(rows: Sequence[Row]) -> str:
    """A table for every model and protocol: methods below one another, for each m.

    The line *unedited* is the mean of the unedited model over the same draws.
    """
    found = groups(rows)
    parts = []
    for model, protocol in dict.fromkeys(key[:2] for key in found):
        mine = {key[2:]: some for key, some in found.items() if key[:2] == (model, protocol)}
        shown = list(chain(*mine.values()))
        used = [one for one in COLUMNS if any(_has(some, one) for some in mine.values())]
        others = [one for one in OTHERS if any(one[1](row, "edited") is not None for row in shown)]
        head = ["m", "method", *(said for said, _, _ in used), *(said for said, *_ in others)]
        head += ["edit s", "seeds"]
        lines = [
            f"**{' '.join(model.split())}**, {_SAID[protocol]}",
            "",
            _line(head),
            _line(["---:"] * len(head)),
        ]
        for size in dict.fromkeys(key[0] for key in mine):
            of_size = [some for key, some in mine.items() if key[0] == size]
            rows_of_size = sorted(chain(*of_size), key=lambda row: bool(row.get("perplexity")))
            every = list({row["seed"]: row for row in rows_of_size}.values())
            cells = _cells(every, "unedited", used)
            cells += [said([of(row, "unedited") for row in every]) for _, of, said in others]
            lines.append(_line([f"{size:,}", "*unedited*", *cells, "", str(len(every))]))
            for key, some in mine.items():
                if key[0] == size:
                    seconds = statistics.fmean(row["edit_seconds"] for row in some)
                    cells = _cells(some, "edited", used)
                    cells += [said([of(row, "edited") for row in some]) for _, of, said in others]
                    lines.append(
                        _line(
                            [
                                f"{size:,}",
                                _escaped(key[1]),
                                *cells,
                                f"{seconds:.0f}",
                                str(len(some)),
                            ]
                        )
                    )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_SAID = {
    "together": "all facts at once",
    "alone": "each fact alone from the unedited model",
}


def failures(rows: Sequence[Row]) -> str:
    """What edited models said instead, as a Markdown table: the largest cell of each method.

    Of each kind of question the first :data:`SHOWN`, and a line that says so.
    """
    largest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row["model"], row["protocol"], row["name"])
        if key not in largest or row["m"] > largest[key]["m"]:
            largest[key] = row
    head = ["method", "m", "asked", "prompt", "wanted", "unedited", "edited"]
    lines = [_line(head), _line(["---"] * len(head))]
    for (_, _, name), row in largest.items():
        shown = Counter[str]()
        for one in row["failures"]:
            kind = one["kind"]
            shown[kind] += 1
            if shown[kind] <= SHOWN:
                said = [one[part] for part in ("prompt", "wanted", "unedited", "edited")]
                lines.append(_line([_escaped(name), f"{row['m']:,}", kind, *map(_short, said)]))
    lines += [
        "",
        f"Of each method one cell, of its largest m, and of each kind the first {SHOWN} at most. "
        f"{NAME} holds the first ten of every cell, in full; malmend eval --json has all.",
    ]
    return "\n".join(lines) + "\n"


def _has(rows: Sequence[Row], column: tuple[str, str, str]) -> bool:
    return any(figure(row, "edited", *column[1:]) is not None for row in rows)


def _cells(rows: Sequence[Row], model: str, used: Sequence[tuple[str, str, str]]) -> list[str]:
    return [_shown([figure(row, model, kind, metric) for row in rows]) for _, kind, metric in used]


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.3f}"
    if len(known) > 1:
        mean += f" ± {statistics.stdev(known):.3f}"
    return mean + _of_fewer(known, values)


def _perplexities(values: Sequence[float | None]) -> str:
    known = [min(value, HIGHEST) for value in values if value is not None]
    if not known:
        return ""
    mean, most = perplexity(statistics.fmean(known)), max(known)
    if most == HIGHEST:  # of which it is known only that it is no less, so of the mean
        mean = mean if mean.startswith("over") else f"over {mean}"
    elif len(known) > 1:
        mean += f" ± {perplexity(statistics.stdev(known))}"
    return mean + _of_fewer(known, values)


def _residuals(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2g}{_of_fewer(known, values)}" if known else ""


def _whole(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):,.0f}{_of_fewer(known, values)}" if known else ""


def _of_fewer(known: Sequence[float], values: Sequence[float | None]) -> str:
    """Of how many seeds a figure is, where the column of seeds says more."""
    return f" (of {len(known)})" if len(known) < len(values) else ""


def _of_edit(figure: Callable[[Row], float | None]) -> Callable[[Row, str], float | None]:
    return lambda row, model: figure(row) if model == "edited" else None


# Heading, figure of a row's model, unedited or edited, and how the mean of some is said.
OTHERS: tuple[
    tuple[str, Callable[[Row, str], float | None], Callable[[Sequence[float | None]], str]], ...
] = (
    (
        "perplexity",
        lambda row, model: row.get("perplexity", {}).get(model),
        _perplexities,
    ),
    ("residual", _of_edit(lambda row: row["patch"].get("mean_residual")), _residuals),
    ("on edited keys", _of_edit(lambda row: row["patch"].get("residual_after")), _residuals),
    ("edit MB", _of_edit(megabytes), _whole),
)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _short(text: str) -> str:
    """A text with its middle left out if it is long: what is asked may stand at either end."""
    text, end = " ".join(text.split()), LONGEST // 3
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - end]} … {text[-end:]}"
    return _escaped(text)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
