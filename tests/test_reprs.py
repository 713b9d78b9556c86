"""What Python shows of results: a short line, and neither tensors nor a row per fact."""

from __future__ import annotations

import re
from pathlib import Path

import command_support
import malmend
from command_support import CALIBRATION, make_facts
from malmend.commands.continuations import ContinuationsResult
from malmend.commands.ledger_facts import LedgerChange, Verification, Verified
from malmend.evaluation.replies import Reply
from malmend.facts.fact import Question
from malmend.ledgers.entries import Entry, Generation

tiny = command_support.tiny
cache = command_support.cache

LONG = 400  # signs, of a name of some length too


def is_short(thing: object) -> bool:
    shown = repr(thing)
    return len(shown) <= LONG and "\n" not in shown and "tensor(" not in shown


def test_of_an_edit_its_patch_and_its_evaluation(tiny, tmp_path):
    """print(malmend.edit(...)) once poured the patch's tensors on the terminal."""
    own = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    done = malmend.edit(tiny.loaded, make_facts(12), **own)
    report = malmend.eval(tiny.loaded, make_facts(12), done.patch, decode_facts=0, text="none")
    malmend.save_patch(done.patch, tmp_path / "patch.safetensors")
    assert all(map(is_short, (tiny.loaded, done, done.patch, done.facts, report)))
    base = tiny.loaded.fingerprint[:12]
    assert repr(done.patch).startswith("Patch(6 layers, method='malmen', facts=12, model=")
    assert repr(done.patch).endswith(f", base={base!r})")
    assert repr(done.facts) == "FactSet('facts', 12 facts, 0 skipped)"
    # The figures of so small a model go with the rounding, and so with what is in the cache.
    assert re.search(r"edited: ES [01]\.\d{3}, GS 0\.\d{3}, LS ", repr(report))
    assert "RS" not in repr(report)
    assert repr(malmend.Patch({})) == "Patch(0 layers, base='')"
    assert "\n" not in repr(malmend.inspect(tmp_path / "patch.safetensors"))


def test_a_patch_of_a_strangers_gives_the_terminal_no_orders():
    said = {"method": "\x1b[2J", "model": "x" * 10_000, "facts": 3}
    assert is_short(malmend.Patch({}, said))
    assert "\x1b" not in repr(malmend.Patch({}, said))


def test_of_what_has_a_row_per_fact():
    held = Entry(1, "f", "P", "A", None, "s", "t", "me", "active", 1, True, "rows", 0, (3,))
    made = Generation(1, "add", "me", "t", 1_000, None, 0.2, None)
    right = Verified(held, Reply("ES", 0, Question("P", "A"), 1.0, 1.0))
    facts = tuple(make_facts(12))
    change = LedgerChange(made, [held] * 1_000, duplicates=facts)
    assert repr(change).endswith("1,000 entered, 0 left, warning=None)")
    assert repr(Verification([right] * 1_000)).startswith(
        "Verification(1,000 of 1,000 facts hold, "
    )
    assert is_short(change)
    assert is_short(ContinuationsResult(facts, Path("facts.jsonl")))
    inspected = malmend.Inspection("editor", "e", {"subjects": "0" * 10_000, "facts": 1_000})
    assert is_short(inspected)
    assert "facts: 1000" in repr(inspected)
