"""A ledger of the tiny model, and the direct edit that it must equal.

ledger = ledger_support.empty   (a fixture: a copy of a ledger without facts)
ledger = ledger_support.filled  (the same with 38 facts of HELD, which is enough for sums)
begun(tiny, folder)             a ledger of the editor without a network
direct(tiny, facts)             the patch of `edit` with one solve by the same editor
assert_same(patch, other)       shifts equal within 1e-4 of their own norm
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import malmend
from command_support import CALIBRATION, Tiny, make_facts
from malmend.editors.editor import Editor
from malmend.editors.refine import RefineSettings
from malmend.facts.fact import Fact
from malmend.ledgers.watch import StopRule
from malmend.patch import Patch

ONCE = RefineSettings(passes=1)
QUIET = StopRule(questions=0)
HELD = make_facts(60, seed=5)


def own(tiny: Tiny) -> dict[str, Any]:
    return {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}


def begun(tiny: Tiny, folder: Path, rule: StopRule = QUIET) -> Path:
    malmend.ledger.init(folder, tiny.loaded, rule=rule, **own(tiny))
    return folder


def added(tiny: Tiny, ledger: Path, facts: Sequence[Fact]) -> Any:
    return malmend.ledger.add(ledger, facts, model=tiny.loaded)


_MADE: dict[str, Path] = {}


@pytest.fixture
def empty(tiny: Tiny, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once in a run, and copied."""
    if "empty" not in _MADE:
        _MADE["empty"] = begun(tiny, tmp_path_factory.mktemp("empty") / "ledger")
    return shutil.copytree(_MADE["empty"], tmp_path_factory.mktemp("copy") / "ledger")


@pytest.fixture
def filled(tiny: Tiny, cache: Path, empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once in a run, and copied."""
    if "filled" not in _MADE:
        added(tiny, empty, HELD[:38])
        _MADE["filled"] = shutil.copytree(empty, tmp_path_factory.mktemp("filled") / "ledger")
    return shutil.copytree(_MADE["filled"], tmp_path_factory.mktemp("copy") / "ledger")


def direct(tiny: Tiny, facts: Sequence[Fact], editor: Editor | None = None) -> Patch:
    by = own(tiny) if editor is None else {"editor": editor}
    return malmend.edit(tiny.loaded, facts, refine=ONCE, **by).patch


def apart(one: Patch, other: Patch) -> float:
    """The greatest distance between two patches' shifts, as a share of the other's norm."""
    assert list(one.factors) == list(other.factors)
    shares = [
        ((one.shift(name) - other.shift(name)).norm() / other.shift(name).norm()).item()
        for name in one.factors
    ]
    return max(shares)


def assert_same(one: Patch, other: Patch) -> None:
    assert apart(one, other) < 1e-4
