"""`kill -9` in training, editing and exporting, at any of their steps, over and over.

After each kill every file that has its own name is whole; what was begun anew ends with the very
bytes of a run that nobody stopped.  Of the ledger see ledgers/test_ledger_killed.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import command_support
from command_support import Tiny, files_in

tiny = command_support.tiny
cache = command_support.cache

Arguments = Callable[[Tiny, Path, Path], list[object]]
WORKER = Path(__file__).parent / "killed_worker.py"
# Of a training, when its steps begin, and after which it goes on.
STARTED = r"steps? of 4 facts(?:\s+\(resumed\s+after\s+step\s+(\d+)\))?"


class Worker:
    """Runs command lines in children and kills them; what they keep of a model has its folder."""

    def __init__(self, place: Path):
        self.place, self.out, self.log = place, place / "out", place.with_suffix(".log")
        paths = os.pathsep.join([str(WORKER.parent), *sys.path])
        changed = {"OMP_NUM_THREADS": "1", "MALMEND_CACHE": str(place / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(place), str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": paths, **changed},
        )

    def fresh(self) -> Path:
        """A folder to write into, with nothing in it nor in the cache."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.out.mkdir(parents=True)
        return self.out

    def run(self, arguments: list[object], at: int | str | None = None) -> str:
        """The exit code, or "killed" where the child came to the step ``at``, or to "writing"."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([[str(one) for one in arguments], at]) + "\n")
        return self.process.stdout.readline().strip()

    def said(self) -> str:
        """What the last child said, and how many steps it took where it was not killed."""
        return self.log.read_text()


@pytest.fixture
def workers(tmp_path: Path, cache: Path) -> Iterator[tuple[Worker, Worker]]:
    """One to be left alone and one to be killed, neither with anything in its cache."""
    made = Worker(tmp_path / "whole"), Worker(tmp_path / "parts")
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


def begun_at(out: Path) -> int:
    """The step at which a training goes on from this folder; 0 where it starts."""
    for path in named(out, "training.safetensors"):
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["training"])["step"]
    return 0


def killed(
    work: Arguments, workers: tuple[Worker, Worker], tiny: Tiny, patch: Path, kills: int, seed: int
) -> list[int]:
    """Kills the command so many times, then lets it end; from which steps a training went on.

    A run that ends before its kill was not killed: another begins, with nothing in its folders.
    """
    generator, (alone, worker) = random.Random(seed), workers
    assert alone.run(work(tiny, alone.fresh(), patch)) == "0"
    wanted, steps = tensors_of(alone.out), int(alone.said().split()[-1])
    out, stopped, resumed = worker.fresh(), 0, []
    while True:
        begun, at = begun_at(out), generator.randint(1, steps) if stopped < kills else None
        code = worker.run(work(tiny, out, patch), at)
        found = tensors_of(out)
        for path in named(out, ".json"):
            json.loads(path.read_text())
        if started := re.search(STARTED, worker.said()):
            assert int(started[1] or 0) == begun
            resumed += [begun] if begun else []
        if code == "killed":
            stopped += 1
            continue
        # An export that was killed behind its last step is there already.
        assert code == "0" or (code == "2" and "holds files already" in worker.said())
        assert not list(out.rglob("*.part"))
        for one, other in zip(found, wanted, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in other)
        if stopped == kills:
            return resumed
        worker.fresh()


@pytest.fixture
def patch(tiny: Tiny, cache: Path, tmp_path: Path) -> Path:
    path = tmp_path / "made.safetensors"
    assert command_support.malmend("edit", tiny.model, tiny.facts, "--out", path, *tiny.fast) == 0
    return path


def test_the_patch_of_before_stays_whole_where_the_next_is_killed_half_written(
    tiny, workers, patch
):
    _, worker = workers
    path = worker.fresh() / "p.safetensors"
    before = Path(shutil.copy(patch, path)).read_bytes()
    quick = [*edit(tiny, worker.out, patch), "--layers", 1, "--refine.passes", 1]
    assert worker.run(quick, "writing") == "killed"
    assert named(worker.out, "") == [path]
    assert path.read_bytes() == before
    (half,) = worker.out.glob("*.part")
    assert 0 < half.stat().st_size < len(before)
    assert worker.run(quick) == "0"
    assert files_in(worker.out) == {path.name}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_loses_nothing(name, tiny, workers, patch):
    resumed = killed(WORKS[name], workers, tiny, patch, 3, seed=0)
    assert bool(resumed) is (name == "train")


@pytest.mark.proof
@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_thirty_times(name, tiny, workers, patch):
    resumed = killed(WORKS[name], workers, tiny, patch, 30, seed=1)
    assert bool(resumed) is (name == "train")
