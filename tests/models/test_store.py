"""Activations on disk: round trips, several runs at once, damage, budgets and full disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import tiny
from malmend.models import store as module
from malmend.models.store import ActivationStore

WIDTH = 5
BIG = 1 << 30


@pytest.fixture(name="tmp_path")
def folder_of_one_store(tmp_path):
    """Stores in folders beside one another share a budget, so each test has a parent of its own."""
    (tmp_path / "model" / "store").mkdir(parents=True)
    return tmp_path / "model" / "store"


def opened(folder, dtype=torch.float32, budget=BIG, width=WIDTH):
    return ActivationStore(folder, width, dtype, budget)


def rows_of(key, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(hash(key))
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def same(left, right):
    return (
        left is not None
        and left.dtype == right.dtype
        and torch.equal(tiny.bits(left), tiny.bits(right))
    )


def fill(store, keys, count=3):
    for key in keys:
        store.put_all([(key, rows_of(key, count))])


def holds(store, keys, count=3):
    return [same(store.get(key), rows_of(key, count)) for key in keys]


KEYS = [(1, 2, 3), (1, 2), (3, 2, 1), (12, 3), (2**40, 7), (5,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_round_trip(dtype, tmp_path):
    store = opened(tmp_path, dtype)
    kept = {key: rows_of(key, 1 + i, dtype) for i, key in enumerate(KEYS)}
    kept[(9,)] = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-30, 0.1]]).to(dtype)
    for key, rows in kept.items():
        assert store.get(key) is None
        store.put_all([(key, rows)])
        assert same(store.get(key), rows)  # from its own segment, which grows
    again = opened(tmp_path, dtype)
    for known in (store, again):
        assert all(same(known.get(key), rows) for key, rows in kept.items())
        assert known.get((1, 2, 3, 4)) is None
        assert known.get([1, 2]) is not None  # ids, whatever holds them


def test_rows_of_another_layout_and_type(tmp_path):
    store = opened(tmp_path, torch.float32)
    wide = torch.randn(WIDTH, 4, dtype=torch.float64).T
    wide.requires_grad_(True)
    store.put_all([((1,), wide)])
    assert same(store.get((1,)), wide.detach().float().contiguous())


def test_what_is_read_can_be_written_to(tmp_path):
    store = opened(tmp_path)
    fill(store, KEYS)
    store.get(KEYS[0]).zero_()
    assert all(holds(store, KEYS))


def test_first_rows_of_a_question_stay(tmp_path):
    store = opened(tmp_path)
    store.put_all([((1,), rows_of("a"))])
    store.put_all([((1,), rows_of("b"))])
    assert same(store.get((1,)), rows_of("a"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == 3 * WIDTH * 4


def test_no_folder_keeps_nothing():
    store = opened(None)
    fill(store, KEYS)
    assert [store.get(key) for key in KEYS] == [None] * len(KEYS)


def test_no_budget_keeps_nothing(tmp_path):
    store = opened(tmp_path / "new", budget=0)
    fill(store, KEYS)
    assert store.get(KEYS[0]) is None
    assert not (tmp_path / "new").exists()


# --- several runs


def test_two_runs_on_one_folder(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    for key in KEYS[:4]:
        first.put_all([(key, rows_of(key))])
    for key in KEYS[2:]:
        second.put_all([(key, rows_of(key))])
    assert holds(first, KEYS) == [True] * 4 + [False] * 2
    assert holds(second, KEYS) == [False] * 2 + [True] * 4
    third = opened(tmp_path)
    assert all(holds(third, KEYS))
    fill(third, [(77,)])
    assert all(holds(first, KEYS[:4]))
    assert all(holds(opened(tmp_path), [*KEYS, (77,)]))


def write_and_read(folder, number, barrier, faults):
    store = opened(folder)
    barrier.wait()
    for i in range(60):
        key = (i, i % 7) if i % 2 else (number, i)  # some in common, some its own
        store.put_all([(key, rows_of_process(key))])
        if not same(store.get(key), rows_of_process(key)):
            faults.put((number, key))
        if i % 20 == 0:
            other = opened(folder)
            faults_in(other, faults)
    faults.put(None)


def rows_of_process(key):
    return torch.arange(WIDTH * 2, dtype=torch.float32).view(2, WIDTH) + 1000 * key[0] + key[1]


def faults_in(store, faults):
    for i in range(60):
        for key in [(i, i % 7), *((n, i) for n in range(3))]:
            rows = store.get(key)
            if rows is not None and not same(rows, rows_of_process(key)):
                faults.put(("read", key))


def test_three_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, faults = context.Barrier(3), context.Queue()
    runs = [
        context.Process(target=write_and_read, args=(tmp_path, number, barrier, faults))
        for number in range(3)
    ]
    for run in runs:
        run.start()
    told = [faults.get(timeout=60) for _ in runs]
    for run in runs:
        run.join(60)
    assert told == [None] * 3
    assert [run.exitcode for run in runs] == [0] * 3
    store = opened(tmp_path)
    for i in range(60):
        for key in [(i, i % 7)] if i % 2 else [(number, i) for number in range(3)]:
            assert same(store.get(key), rows_of_process(key))


# --- damage


def segment(folder):
    (data,) = folder.glob("*.bin")
    return data, data.with_suffix(module.INDEX)


@pytest.mark.parametrize("cut", [1, 35, 36, 37, 107])
def test_truncated_index(cut, tmp_path):
    fill(opened(tmp_path), KEYS)
    _, index = segment(tmp_path)
    raw = index.read_bytes()
    assert len(raw) == 36 * len(KEYS)
    index.write_bytes(raw[:-cut])
    whole = (len(raw) - cut) // 36
    store = opened(tmp_path)
    assert holds(store, KEYS) == [True] * whole + [False] * (len(KEYS) - whole)
    assert [store.get(key) for key in KEYS[whole:]] == [None] * (len(KEYS) - whole)
    fill(store, KEYS)
    assert all(holds(opened(tmp_path), KEYS))


@pytest.mark.parametrize("cut", [1, 59, 60, 61, 10_000])
def test_truncated_data(cut, tmp_path):
    fill(opened(tmp_path), KEYS)
    data, _ = segment(tmp_path)
    raw = data.read_bytes()
    assert len(raw) == 60 * len(KEYS)
    data.write_bytes(raw[: max(0, len(raw) - cut)])
    whole = max(0, len(raw) - cut) // 60
    store = opened(tmp_path)
    assert holds(store, KEYS) == [True] * whole + [False] * (len(KEYS) - whole)
    assert [store.get(key) for key in KEYS[whole:]] == [None] * (len(KEYS) - whole)


def test_data_that_is_not_what_was_written(tmp_path):
    """As after a power cut: the length is there, and a block of it is zeros."""
    fill(opened(tmp_path), KEYS[:3])
    data, _ = segment(tmp_path)
    raw = bytearray(data.read_bytes())
    size = 3 * WIDTH * 4
    raw[size : 2 * size] = bytes(size)
    data.write_bytes(raw)
    store = opened(tmp_path)
    assert store.get(KEYS[1]) is None
    assert holds(store, [KEYS[0], KEYS[2]]) == [True, True]
    fill(store, KEYS[1:2])  # found again, and kept
    assert holds(opened(tmp_path), KEYS[:3]) == [True] * 3


def test_data_without_an_index_and_index_without_data(tmp_path):
    fill(opened(tmp_path), KEYS[:2])
    segment(tmp_path)[1].unlink()
    fill(opened(tmp_path), KEYS[2:])
    store = opened(tmp_path)
    assert holds(store, KEYS) == [False] * 2 + [True] * 4
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    assert not any(holds(opened(tmp_path), KEYS))


def test_unindexed_tail_does_not_shift_what_follows(tmp_path):
    # A killed run's half-written rows stay in its own segment; nobody appends to that.
    fill(opened(tmp_path), KEYS[:2])
    data, _ = segment(tmp_path)
    with data.open("ab") as file:
        file.write(b"half")
    second = opened(tmp_path)
    fill(second, KEYS[2:])
    assert all(holds(second, KEYS))
    assert all(holds(opened(tmp_path), KEYS))


# --- budget


def bytes_in(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.bin"))


def test_budget_ends_writing(tmp_path):
    store = opened(tmp_path, budget=150)  # 60 bytes each
    fill(store, KEYS)
    assert bytes_in(tmp_path) == 120
    assert holds(store, KEYS) == [True, True] + [False] * 4
    store.put_all([((8,), rows_of((8,), 1))])  # 20 bytes still fit
    assert same(store.get((8,)), rows_of((8,), 1))


def test_budget_counts_what_other_runs_have_kept(tmp_path):
    fill(opened(tmp_path), KEYS[:2])
    store = opened(tmp_path, budget=190)
    fill(store, KEYS[2:])
    assert bytes_in(tmp_path) == 180
    assert holds(store, KEYS) == [True] * 3 + [False] * 3


def test_oldest_segments_make_room_at_the_start(tmp_path):
    for age, key in zip((200, 300, 100), KEYS[:3], strict=True):
        known = set(tmp_path.iterdir())
        fill(opened(tmp_path), [key])
        for path in set(tmp_path.iterdir()) - known:
            os.utime(path, (1_000_000 - age, 1_000_000 - age))
    store = opened(tmp_path, budget=150)  # 135 may stay: the oldest, the second key's, goes
    assert holds(store, KEYS[:3]) == [True, False, True]
    assert bytes_in(tmp_path) == 120
    assert len(list(tmp_path.glob(f"*{module.INDEX}"))) == 2
    assert holds(opened(tmp_path, budget=10), KEYS[:3]) == [False] * 3
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_reads_any_more_is_removed_at_the_start(tmp_path):
    """Records of segments that went were kept for good."""
    fill(opened(tmp_path), KEYS)
    beside = tmp_path.with_name("beside")
    beside.mkdir()
    left = [tmp_path / "1-a.index", beside / "3-c.index"]
    for path in left:
        path.write_bytes(b"rows")
    new = beside / "4-d.bin"  # whose record another run is about to write
    new.write_bytes(b"rows")
    assert holds(opened(tmp_path), KEYS) == [True] * len(KEYS)
    assert not any(path.exists() for path in left)
    assert new.exists()


def test_budget_is_shared_with_the_stores_beside_it(tmp_path):
    other_model = tmp_path.parent.parent / "another model" / "store"
    fill(opened(other_model), KEYS)
    beside = tmp_path.with_name("beside")
    fill(opened(beside), KEYS[:2])
    store = opened(tmp_path, budget=190)
    assert not any(holds(store, KEYS))  # and their rows are not its own
    fill(store, KEYS)
    assert bytes_in(tmp_path) == 60
    for path in beside.iterdir():
        os.utime(path, (1_000_000, 1_000_000))
    assert holds(opened(tmp_path, budget=150), KEYS) == [True] + [False] * 5
    assert bytes_in(beside) == 0
    assert all(holds(opened(other_model), KEYS))


@pytest.mark.parametrize("recounted", [0, 120])
def test_stores_that_are_open_at_once_share_the_budget(tmp_path, recounted, monkeypatch):
    """Each counts what the others keep meanwhile, in steps of so many of its own bytes."""
    monkeypatch.setattr(module, "RECOUNTED", recounted)
    stores = [opened(tmp_path.with_name(name), budget=400) for name in ("a", "b", "c")]
    for key in KEYS:  # 60 bytes each
        for store in stores:
            fill(store, [key])
    kept = sum(bytes_in(tmp_path.with_name(name)) for name in ("a", "b", "c"))
    assert 300 < kept <= 400 + recounted * 2


def test_a_run_whose_segment_another_run_removes(tmp_path):
    # It may lose what it kept, but must never read other rows for a question.
    for read_before in (True, False):
        store = opened(tmp_path)
        fill(store, KEYS[:3])
        if read_before:
            assert all(holds(store, KEYS[:3]))
        opened(tmp_path, budget=10)
        assert list(tmp_path.glob("*.bin")) == []
        fill(store, KEYS[3:])
        fill(store, KEYS[:3])
        for key in KEYS:
            rows = store.get(key)
            assert rows is None or same(rows, rows_of(key))
        assert not any(
            rows is not None and not same(rows, rows_of(key))
            for key, rows in ((key, opened(tmp_path).get(key)) for key in KEYS)
        )


def test_a_segment_that_goes_while_the_folder_is_read(tmp_path, monkeypatch):
    fill(opened(tmp_path), KEYS[:2])
    gone = tmp_path / "1-gone.bin"
    found = [*tmp_path.glob("*.bin"), gone]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "glob", lambda _, kind: iter(found if ".bin" in kind else ()))
        store = opened(tmp_path)
    assert all(holds(store, KEYS[:2]))
    fill(store, KEYS)
    assert all(holds(store, KEYS))


# --- disks


@pytest.mark.parametrize("suffix", [".bin", module.INDEX])
def test_full_disk_ends_keeping_not_the_run(suffix, tmp_path, monkeypatch):
    store = opened(tmp_path)
    fill(store, KEYS[:2])
    original, tried = Path.open, []

    def full(path, mode="r", *args, **keywords):
        if path.suffix == suffix and mode != "rb":
            tried.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, mode, *args, **keywords)

    monkeypatch.setattr(Path, "open", full)
    fill(store, KEYS[2:])
    assert len(tried) == 1  # it does not try again
    monkeypatch.undo()
    fill(store, KEYS[2:])
    assert holds(store, KEYS) == [True] * 2 + [False] * 4
    again = opened(tmp_path)
    assert holds(again, KEYS) == [True] * 2 + [False] * 4
    fill(again, KEYS)
    assert all(holds(opened(tmp_path), KEYS))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    store = opened(tmp_path)
    fill(store, KEYS[:1])
    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *args, **keywords: original(
            Path("/dev/full") if path.suffix == module.INDEX else path, *args, **keywords
        ),
    )
    fill(store, KEYS)
    monkeypatch.undo()
    assert holds(store, KEYS) == [True] + [False] * 5


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "store")
    fill(store, KEYS)
    assert store.get(KEYS[0]) is None


def test_segments_that_cannot_be_removed(tmp_path, monkeypatch):
    fill(opened(tmp_path), KEYS)

    def refuse(*_args, **_keywords):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    store = opened(tmp_path, budget=10)
    fill(store, KEYS)
    assert all(rows is None or same(rows, rows_of(k)) for k in KEYS for rows in [store.get(k)])


def test_what_was_found_together_is_kept_together_or_not_at_all(tmp_path, monkeypatch):
    store = opened(tmp_path, torch.float32)
    fill(store, KEYS[:1])

    class Killed(BaseException):
        pass

    def rows():
        yield KEYS[1], rows_of(KEYS[1])
        yield KEYS[2], rows_of(KEYS[2])
        raise Killed

    with pytest.raises(Killed):
        store.put_all(rows())
    again = opened(tmp_path, torch.float32)
    assert holds(again, KEYS[:3]) == [True, False, False]
    store.put_all((key, rows_of(key)) for key in [*KEYS, KEYS[3]])
    assert all(holds(store, KEYS))
    assert all(holds(opened(tmp_path, torch.float32), KEYS))


def test_what_does_not_fit_the_budget_together_is_not_kept_at_all(tmp_path):
    size = 3 * WIDTH * 4
    store = opened(tmp_path, budget=int(2.5 * size))
    store.put_all((key, rows_of(key)) for key in KEYS[:3])
    assert [store.get(key) for key in KEYS[:3]] == [None] * 3
    assert not list(tmp_path.iterdir())
    store.put_all((key, rows_of(key)) for key in KEYS[:2])  # these do
    assert holds(opened(tmp_path), KEYS[:2]) == [True] * 2
