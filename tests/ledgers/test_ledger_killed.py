"""Ledgers whose writer is killed, fails half way, or is not alone."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import ledger_support
import pytest
import torch
from ledger_support import added

import command_support
import malmend
from command_support import files_in
from malmend.errors import LedgerError
from malmend.ledgers.access import reading
from malmend.ledgers.rows import rows_of
from malmend.ledgers.sums import Sums

tiny = command_support.tiny
cache = command_support.cache
empty = ledger_support.empty
ledger = ledger_support.filled

FACTS = ledger_support.HELD
TESTS = Path(__file__).parents[1]
STEPS = 200  # of two or three changes


def whole(ledger: Path) -> None:
    """The ledger opens, and its sums are those of its facts' own tokens."""
    with reading(ledger) as held:
        known = held.sums() if held.current.sums else {}
        for site, (name, sums) in enumerate(known.items()):
            shape_VK = held.editor.shapes[name]
            fresh = Sums.of(rows_of(ledger, name, shape_VK, site, held.active), shape_VK)
            torch.testing.assert_close(sums.gram_KK, fresh.gram_KK, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(sums.cross_VK, fresh.cross_VK, rtol=1e-9, atol=1e-9)
    malmend.ledger.patch(ledger)


def named(ledger: Path) -> set[str]:
    """The files that a ledger of this state consists of."""
    with reading(ledger) as held:
        files = held.files()
    editor = {name for name in files_in(ledger) if name.startswith("editor/")}
    return files | editor | {"ledger.sqlite"}


def killed(ledger: Path, cache: Path, kills: int, seed: int) -> int:
    """Kills a writer so many times; returns how many generations were committed."""
    generator = random.Random(seed)
    command = [sys.executable, str(TESTS / "ledgers" / "ledger_writer.py")]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    process = subprocess.Popen(
        [*command, str(ledger), str(cache), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    latest = malmend.ledger.history(ledger)[-1].generation.number
    for _ in range(kills):
        process.stdin.write(f"{generator.randint(1, STEPS)}\n")
        lines: list[str] = []
        while (line := process.stdout.readline()) != "gone\n":
            assert line, "the writer's process ended"
            lines.append(line)
        steps = malmend.ledger.history(ledger)
        facts = {step.generation.number: step.generation.facts for step in steps}
        for line in lines:  # whatever was reported as done is there
            word, number, count = line.split()
            assert word == "generation", "".join(lines)
            assert facts[int(number)] == int(count)
        assert max(facts) >= latest
        latest = max(facts)
        whole(ledger)
    process.communicate(timeout=60)
    return latest


@pytest.mark.slow
def test_a_writer_killed_at_any_of_its_steps(tiny, ledger, cache):
    assert killed(ledger, cache, 10, seed=0) > 1
    malmend.ledger.rollback(ledger, 0)
    assert files_in(ledger) == named(ledger)


@pytest.mark.proof
def test_a_writer_killed_a_hundred_times(tiny, ledger, cache):
    made = killed(ledger, cache, 100, seed=1)
    print(f"\n100 kills, {made} generations")
    malmend.ledger.rollback(ledger, 0)
    assert files_in(ledger) == named(ledger)


STAGES = {
    "tokens are captured": "malmend.commands.ledger_facts.taken",
    "tokens are written": "malmend.ledgers.ledger.save_rows",
    "sums are solved": "malmend.ledgers.sums.solved",
    "sums are written": "malmend.ledgers.ledger.save_sums",
    "rows are written": "malmend.ledgers.ledger.change_facts",
}


@pytest.mark.slow
@pytest.mark.parametrize("place", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_half_way_never_was(tiny, ledger, monkeypatch, place, error):
    before, files = malmend.ledger.patch(ledger), files_in(ledger)

    def fails(*_args, **_named):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(place, fails)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            added(tiny, ledger, FACTS[38:])
    assert files_in(ledger) == files
    after = malmend.ledger.patch(ledger)
    assert all(torch.equal(before.shift(name), after.shift(name)) for name in before.factors)
    added(tiny, ledger, FACTS[38:])
    whole(ledger)


def test_a_commit_that_is_interrupted_keeps_its_files(tiny, ledger, monkeypatch):
    """Whether SQLite had committed is not known then, so no file may go."""
    from malmend.ledgers import tables

    connected = tables._connected

    class Interrupted:
        def __init__(self, db):
            self.db = db

        def execute(self, statement, *rest):
            done = self.db.execute(statement, *rest)
            if statement == "COMMIT":
                raise KeyboardInterrupt
            return done

        def __getattr__(self, name):
            return getattr(self.db, name)

    with monkeypatch.context() as patched:
        patched.setattr(tables, "_connected", lambda *args: Interrupted(connected(*args)))
        with pytest.raises(KeyboardInterrupt):
            added(tiny, ledger, FACTS[38:])
    assert len(malmend.ledger.list_facts(ledger)) == 60
    whole(ledger)


def test_leftover_files_go_with_the_next_writer(ledger):
    left = ["rows-0123456789ab.safetensors", ".sums-0123456789ab.safetensors.1234abcd.part"]
    for name in left:
        (ledger / name).write_text("half")
    (ledger / "notes.txt").write_text("mine")
    malmend.ledger.patch(ledger)
    assert set(left) <= files_in(ledger)  # a reader cannot tell them from a writer's
    malmend.ledger.revoke(ledger, ["f1"])
    assert files_in(ledger) == named(ledger) | {"notes.txt"}


def test_a_second_writer_waits_or_is_refused(ledger):
    other = sqlite3.connect(ledger / "ledger.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="is being written by another process"):
        malmend.ledger.revoke(ledger, ["f1"], wait=0.05)
    malmend.ledger.patch(ledger)  # a reader need not wait
    later = threading.Timer(0.5, lambda: other.execute("ROLLBACK"))
    later.start()
    done = malmend.ledger.revoke(ledger, ["f1"], wait=60)
    later.join()
    other.close()
    assert done.generation.number == 2
    with pytest.raises(LedgerError, match="revoked in generation 2"):
        malmend.ledger.revoke(ledger, ["f1"])


def test_two_writers_at_once_lose_nothing(tiny, ledger):
    """Each builds on what the other committed."""
    threads = [
        threading.Thread(target=malmend.ledger.revoke, args=(ledger, [f"f{number}"]))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(malmend.ledger.list_facts(ledger)) == 34
    assert len(malmend.ledger.history(ledger)) == 6
    whole(ledger)
    assert files_in(shutil.copytree(ledger, ledger.with_name("copy"))) == named(ledger)
