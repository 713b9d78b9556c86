"""What a ledger is for: whatever its history, its shift is the direct edit of what it holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import command_support
import malmend
from command_support import make_facts
from ledger_support import added, apart, assert_same, begun, direct

tiny = command_support.tiny
cache = command_support.cache

FACTS = make_facts(60, seed=5)


@pytest.fixture
def ledger(tiny, tmp_path):
    return begun(tiny, tmp_path / "ledger")


def test_two_batches_are_one(tiny, ledger):
    added(tiny, ledger, FACTS[:4])
    added(tiny, ledger, FACTS[4:9])
    assert_same(malmend.ledger.patch(ledger), direct(tiny, FACTS[:9]))
    assert apart(malmend.ledger.patch(ledger), direct(tiny, FACTS[:8])) > 1e-3
