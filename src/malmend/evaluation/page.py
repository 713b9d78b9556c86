"""A report as one self-contained HTML page: no network, no library, the same bytes every time.

The page is made by a template with autoescape.  The facts stand in it as JSON, which its script
writes as text, never as markup; the page's own policy lets no other script run and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from malmend.errors import MalmendError, counted
from malmend.evaluation import figures, view
from malmend.evaluation.report import Report
from malmend.files import synced, writable, writable_folder, written_beside
from malmend.given import checked

PAGE, FIGURES = "index.html", "report.json"
LONGEST_SHOWN = 600  # characters of a text in the table of what moved
MOVED_SHOWN = 100  # of what moved, the farthest; every one stands beside its fact


def write_page(report: Report, folder: str | Path) -> Path:
    """Writes the page, and the report's JSON beside it, whole or not at all; returns its path."""
    # The last is renamed first.
    texts = {PAGE: page(report), FIGURES: report.text(Path(folder) / FIGURES)}
    folder = writable_folder(folder)
    with ExitStack() as both:
        for name, text in texts.items():
            beside = both.enter_context(written_beside(folder / name))
            # It may name a path that is no UTF-8.
            beside.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            synced(beside)  # so that neither takes its name before the disk has both
    return folder / PAGE


@checked()
def page_folder(report: str | Path, *inputs: object) -> Path:
    """Checks before long work that a page can be written; ``inputs`` must not be written over.

    A folder that is not there is made with the page.

    Raises:
        MalmendError: the folder has no name, cannot be made or written into, or an input would be
            lost.
    """
    is_new = not Path(report).exists()
    folder = writable_folder(report)
    for name in (PAGE, FIGURES):
        writable(folder / name, *inputs)
    if is_new:
        folder.rmdir()
    return folder


def check_apart(path: str | Path, folder: str | Path) -> None:
    """Raises MalmendError where a file to be written and a report would lie at one place."""
    folder = Path(folder)
    if Path(path).resolve() in [one.resolve() for one in (folder, folder / PAGE, folder / FIGURES)]:
        raise MalmendError(
            f"{path} is where the report in {folder} would be written too; write elsewhere."
        )


def page(report: Report) -> str:
    """The page's HTML."""
    script = _part("page.js")
    moved = view.moved(report)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            about=report.about,
            patch=report.about.get("patch") or {},
            kinds=view.QUESTIONS,
            tiles=figures.tiles(report),
            panels=figures.panels(report),
            lines=figures.lines(report),
            protocols=figures.protocols(report),
            axis=figures.AXIS,
            groups=figures.tables(report),
            relations=view.relations(report),
            spreads=figures.spreads(report),
            moved=moved[:MOVED_SHOWN],
            moved_count=len(moved),
            filters=view.filters(report),
            cut=view.any_cut(report),
            facts=_json(view.entries(report)),
            style=_part("page.css"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("malmend.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "percent": figures.percent,
        "kl": figures.kl,
        "perplexity": figures.perplexity,
        "count": "{:,}".format,
        "counted": counted,
        "plain": _plain,
        "shortened": _shortened,
    }
    environment.filters |= filters
    return environment


@cache
def _part(name: str) -> str:
    return (resources.files("malmend.evaluation") / "templates" / name).read_text("utf-8")


def _shortened(text: str) -> str:
    """A text of a table, which report.json and the fact's own answers have whole."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} […]"


def _plain(value: Any) -> str:
    """A value of a header as a person would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')}: {_plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
