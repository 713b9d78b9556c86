"""What a cell's figures depend on: by it a cell that is done is known, and what may be averaged.

Two rows are averaged over their seeds only where all else that they were made of is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from malmend.bench.cell import drawn
from malmend.bench.plan import Cell, Plan
from malmend.bench.planned_method import planned_method, source_of
from malmend.editors.refine import SETTLING, UNSAID
from malmend.facts.fact import Fact
from malmend.models.identity import tokenizer_digest
from malmend.models.load import LoadedModel
from malmend.workbench import shipped_editors

SMALL = ("*.json", "*.jinja", "*.model", "*.txt")  # of a model's files, what is not its weights


def key_of(cell: Cell, facts: Sequence[Fact], plan: Plan) -> str:
    """By the cell, what is asked of which facts, and the files of the editor and the model."""
    model = [*_weights(cell.model), *_small_files(cell.model)]
    inputs = [*_editor(cell), _source(cell), model]
    return cell.key(_texts(drawn(facts, cell.size, cell.seed)), inputs, *_asked_by(cell, plan))


def making(cell: Cell, facts: Iterable[Fact], plan: Plan, loaded: LoadedModel) -> str:
    """As :func:`key_of`, but for the seed: of all facts that are drawn from, and the model."""
    model = [loaded.digest, tokenizer_digest(loaded.tokenizer, in_chat=True)]
    inputs = [*_editor(cell), _source(cell), *model]
    return replace(cell, seed=0).key(_texts(facts), inputs, *_asked_by(cell, plan))


def asked(plan: Plan) -> list[Any]:
    """What is asked of a cell's facts."""
    return [plan.alternative, plan.away, plan.decode, plan.text, _digest(Path(plan.text))]


def unsaid(cell: Cell) -> list[object]:
    """What the cell depends on beside what its plan says."""
    how, count = (
        planned_method(cell.name, cell.given),
        cell.size if cell.protocol == "together" else 1,
    )
    of_editor = how.method is None and how.context is None
    settles = of_editor and how.refine.of("causal", count).rounds
    return [*UNSAID, *SETTLING] if settles else UNSAID


def _asked_by(cell: Cell, plan: Plan) -> tuple[list[Any], str, list[object]]:
    return asked(plan), version("malmend"), unsaid(cell)


def _texts(facts: Iterable[Fact]) -> str:
    """A hash of facts, wherever they stand and whatever a file calls them."""
    return hashlib.sha256(repr([fact.unplaced for fact in facts]).encode()).hexdigest()


def _source(cell: Cell) -> str:
    """A hash of the file of a class of one's own."""
    source = source_of(cell.given["class"]) if "class" in cell.given else None
    return "" if source is None else _digest(source)


def _editor(cell: Cell) -> list[str]:
    """Hashes of a cell's editor: of a folder's files, or of the package's.

    Which of the package's editors is meant is known only with the model's weights.
    """
    how = planned_method(cell.name, cell.given)
    if how.editor == "none" or how.method is not None or how.context is not None:
        return ["", ""]
    if how.editor == "auto":
        return [_digest(one / "editor.json") for one in shipped_editors()]
    return [_digest(Path(how.editor) / name) for name in ("editor.json", "editor.safetensors")]


def _weights(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's or a file's weights; of a model by name nothing."""
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]


def _small_files(model: str) -> list[tuple[str, str]]:
    """Names and digests of what a model's folder holds beside its weights."""
    found = {path for kind in SMALL for path in Path(model).glob(kind)}
    return [(one.name, _digest(one)) for one in sorted(found)]


def _digest(path: Path) -> str:
    """SHA-256 of a file; nothing where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
