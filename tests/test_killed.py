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
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

import command_support
from command_support import Tiny

tiny = command_support.tiny
cache = command_support.cache

WORKER = Path(__file__).parent / "killed_worker.py"


class Worker:
    """Runs command lines in children, and kills them."""

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

    def run(self, arguments: list[str], seconds: float | None = None) -> str:
        """The exit code, or "killed" where the child had not ended after so many seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # of one that has ended nobody else has the number yet
        return self.process.stdout.readline().strip()


@pytest.fixture
def worker(cache: Path) -> Iterator[Worker]:
    made = Worker(cache)
    yield made
    made.process.communicate(timeout=60)


@dataclass(frozen=True)
class Work:
    """A command, and what it leaves under its own names."""

    arguments: Callable[[Tiny, Path, Path], list[object]]
    same: tuple[str, ...]  # files that are the same bytes in every whole run


def train(tiny: Tiny, out: Path, _patch: Path) -> list[object]:
    few = ["--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 12]
    return ["train", tiny.model, tiny.facts, "--out", out, *tiny.fast, *few, "--save-every", 1]


def edit(tiny: Tiny, out: Path, _patch: Path) -> list[object]:
    return ["edit", tiny.model, tiny.facts, "--out", out / "p.safetensors", *tiny.fast]


def export(to: str) -> Callable[[Tiny, Path, Path], list[object]]:
    def arguments(tiny: Tiny, out: Path, patch: Path) -> list[object]:
        model = ["--model", tiny.model, "--facts", "none"]
        return ["export", patch, "--to", to, out / to, *model]

    return arguments


WORKS = {
    "train": Work(train, ("editor.safetensors",)),
    "edit": Work(edit, ("p.safetensors",)),
    "export lora": Work(export("lora"), ("lora/adapter_model.safetensors",)),
    "export merged": Work(export("merged"), ("merged/model.safetensors",)),
}


def check_whole(folder: Path) -> None:
    """Every file with a name of its own can be read to its end."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue  # half-written ones are hidden
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def killed(
    work: Work, worker: Worker, tiny: Tiny, patch: Path, place: Path, kills: int, seed: int
) -> int:
    """Kills the command so many times, then lets it end; how many runs had not ended by then."""
    generator, out = random.Random(seed), place / "out"
    whole = place / "whole"
    for folder in (out, whole):
        folder.mkdir()
    arguments = [str(one) for one in work.arguments(tiny, whole, patch)]
    start = time.monotonic()
    assert worker.run(arguments) == "0"
    lasts = time.monotonic() - start
    arguments = [str(one) for one in work.arguments(tiny, out, patch)]
    stopped = 0
    for _ in range(kills):
        done = [out / name for name in work.same]
        said = worker.run(arguments, generator.uniform(0, 0.6 * lasts))
        assert said in ("killed", "0", "2")  # 2: an export that is there already
        stopped += said == "killed"
        check_whole(out)
        assert said == "2" or said == "killed" or all(path.is_file() for path in done)
    if not all((out / name).is_file() for name in work.same) or work.arguments is train:
        assert worker.run(arguments) == "0"
    for name in work.same:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    return stopped


@pytest.fixture
def patch(tiny: Tiny, cache: Path, tmp_path: Path) -> Path:
    path = tmp_path / "made.safetensors"
    assert command_support.malmend("edit", tiny.model, tiny.facts, "--out", path, *tiny.fast) == 0
    return path


@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_loses_nothing(name, tiny, worker, patch, tmp_path):
    assert killed(WORKS[name], worker, tiny, patch, tmp_path, 3, seed=0) > 0


@pytest.mark.proof
@pytest.mark.parametrize("name", WORKS)
def test_a_run_that_is_killed_thirty_times(name, tiny, worker, patch, tmp_path):
    stopped = killed(WORKS[name], worker, tiny, patch, tmp_path, 30, seed=1)
    print(f"\n{name}: {stopped} of 30 were killed before they had ended")
    assert stopped > 10
