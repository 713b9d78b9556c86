"""`kill -9` in training, editing and exporting, at random moments, over and over.

After each kill every file that has its own name is whole; what was begun anew ends with the very
bytes of a run that nobody stopped.  Of the ledger see shipping/test_ledger_killed.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import command_support
from command_support import Tiny

tiny = command_support.tiny
cache = command_support.cache

Arguments = Callable[[Tiny, Path, Path], list[object]]
WORKER = Path(__file__).parent / "killed_worker.py"


class Worker:
    """Runs command lines in children and kills them; what they keep of a model has its folder."""

    def __init__(self, cache: Path):
        paths = os.pathsep.join([str(WORKER.parent), *sys.path])
        changed = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MALMEND_CACHE": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **changed},
        )

    def run(self, arguments: list[object], seconds: float | None = None) -> str:
        """The exit code, or "killed" where the child had not ended after so many seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(one) for one in arguments]) + "\n")
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(child, signal.SIGKILL)
        return self.process.stdout.readline().strip()


@pytest.fixture
def workers(tmp_path: Path, cache: Path) -> Iterator[tuple[Worker, Worker]]:
    """One to be left alone and one to be killed, neither with anything in its cache."""
    made = Worker(tmp_path / "cache"), Worker(tmp_path / "other cache")
    yield made
    for one in made:
        one.process.communicate(timeout=60)


def train(tiny: Tiny, out: Path, _patch: Path) -> list[object]:
    few = ["--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 12]
    return ["train", tiny.model, tiny.facts, "--out", out, *tiny.fast, *few, "--save-every", 1]


def edit(tiny: Tiny, out: Path, _patch: Path) -> list[object]:
    return ["edit", tiny.model, tiny.facts, "--out", out / "p.safetensors", *tiny.fast]


def export(to: str) -> Arguments:
    def arguments(tiny: Tiny, out: Path, patch: Path) -> list[object]:
        return ["export", patch, out / to, "--to", to, "--model", tiny.model]

    return arguments


WORKS = {
    "train": train,
    "edit": edit,
    "export lora": export("lora"),
    "export merged": export("merged"),
}


def named(folder: Path, suffix: str) -> list[Path]:
    """The files that are there under their own names; half-written ones are hidden."""
    found = sorted(folder.rglob(f"*{suffix}"))
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def tensors_of(folder: Path) -> list[dict[str, Tensor]]:
    """Of every file; this reads all of each."""
    return [load_file(path) for path in named(folder, ".safetensors")]


def killed(
    work: Arguments,
    workers: tuple[Worker, Worker],
    tiny: Tiny,
    patch: Path,
    place: Path,
    kills: int,
    seed: int,
) -> int:
    """Kills the command so many times, then lets it end; how many runs had not ended by then."""
    generator, out, whole = random.Random(seed), place / "out", place / "whole"
    out.mkdir()
    whole.mkdir()
    alone, worker = workers
    start = time.monotonic()
    assert alone.run(work(tiny, whole, patch)) == "0"
    lasts = time.monotonic() - start
    wanted, stopped = tensors_of(whole), 0
    for _ in range(kills):
        said = worker.run(work(tiny, out, patch), generator.uniform(0, 0.6 * lasts))
        assert said in ("killed", "0", "2")  # 2: an export that is there already
        stopped += said == "killed"
        found = tensors_of(out)
        for path in named(out, ".json"):
            json.loads(path.read_text())
        assert said == "killed" or len(found) == len(wanted)
    last = worker.run(work(tiny, out, patch))
    assert last == "0" or "export" in map(str, work(tiny, out, patch))
    assert not list(out.rglob("*.part"))
    for one, other in zip(tensors_of(out), wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    return stopped


@pytest.fixture
def patch(tiny: Tiny, cache: Path, tmp_path: Path) -> Path:
    path = tmp_path / "made.safetensors"
    assert command_support.malmend("edit", tiny.model, tiny.facts, "--out", path, *tiny.fast) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_loses_nothing(name, tiny, workers, patch, tmp_path):
    assert killed(WORKS[name], workers, tiny, patch, tmp_path, 3, seed=0) > 0


@pytest.mark.proof
@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_thirty_times(name, tiny, workers, patch, tmp_path):
    stopped = killed(WORKS[name], workers, tiny, patch, tmp_path, 30, seed=1)
    print(f"\n{name}: {stopped} of 30 were killed before they had ended")
    assert stopped > 10
