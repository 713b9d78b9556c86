"""The memory of what is watched, seen by taking a known amount."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from malmend.bench import memory
from malmend.bench.memory import peak_memory

MEGABYTE = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's accounting")


def take(megabytes: int) -> None:
    """Holds so much until the watcher has surely looked."""
    held = torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
    time.sleep(30 * memory.EVERY)
    assert held[-1] == 1


@linux
def test_the_peak_is_what_was_held_at_once():
    with peak_memory() as taken:
        take(200)
        take(300)
    assert taken.most is not None
    assert 290 * MEGABYTE < taken.most < 400 * MEGABYTE


@linux
def test_what_was_held_before_does_not_count():
    held = torch.ones(300 * MEGABYTE, dtype=torch.uint8)
    with peak_memory() as taken:
        take(50)
    assert len(held) == 300 * MEGABYTE
    assert taken.most is not None
    assert 45 * MEGABYTE < taken.most < 150 * MEGABYTE


def test_elsewhere_it_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    with peak_memory() as taken:
        pass
    assert taken.most is None


@linux
def test_an_error_passes_and_the_watcher_ends():
    import threading

    before = threading.active_count()
    with pytest.raises(ValueError, match="broken"), peak_memory():
        raise ValueError("broken")
    assert threading.active_count() == before
