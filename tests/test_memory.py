"""The memory of what is watched, seen by taking a known amount; sizes; tensors in files."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from malmend import memory
from malmend.errors import MalmendError
from malmend.memory import Room, peak_memory, size_of

MEGABYTE = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's accounting")


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until the watcher has looked anew, however long that takes on a busy machine."""
    looks, anonymous = threading.Semaphore(0), memory._anonymous

    def look() -> int | None:
        found = anonymous()
        looks.release()
        return found

    def wait() -> None:
        while looks.acquire(blocking=False):  # the looks of before
            pass
        for _ in range(2):  # the first of them may have begun before
            assert looks.acquire(timeout=60)

    monkeypatch.setattr(memory, "_anonymous", look)
    return wait


def take(megabytes: int, looked: Callable[[], None]) -> None:
    """Holds so much until the watcher has looked, then gives it back to the system.

    Mapped by hand: of what is freed into a gap of the heap an allocator keeps the pages, and CI saw
    500 MB once, where other tests had left such a gap.
    """
    with mmap.mmap(-1, megabytes * MEGABYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        looked()


@linux
def test_the_peak_is_what_was_held_at_once(looked):
    with peak_memory() as taken:
        take(200, looked)
        take(300, looked)
    assert taken.most is not None
    assert 290 * MEGABYTE < taken.most < 400 * MEGABYTE


@linux
def test_what_was_held_before_does_not_count(looked):
    held = torch.ones(300 * MEGABYTE, dtype=torch.uint8)
    with peak_memory() as taken:
        take(50, looked)
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
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="broken"), peak_memory():
        raise ValueError("broken")
    assert set(threading.enumerate()) <= before  # another's thread may end meanwhile


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("4 gb", 4 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("2G", 2 * 10**9),
        ("123456", 123456),
        ("7KiB", 7 * 2**10),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "lots", "4GG", "-1GB", "4 XB", "GB", "1e9", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(MalmendError, match="expected a size such as 4GB"):
        size_of(text)


@linux
def test_beyond_the_budget_tensors_stand_in_files_without_a_name(tmp_path, looked):
    room = Room(100 * MEGABYTE, tmp_path)
    with peak_memory() as taken:
        here = room.empty(80, MEGABYTE, dtype=torch.uint8).fill_(1)
        there = room.empty(200, MEGABYTE, dtype=torch.uint8).fill_(2)
        looked()
    assert (room.in_memory, room.on_disk) == (80 * MEGABYTE, 200 * MEGABYTE)
    assert list(tmp_path.iterdir()) == []
    assert taken.most is not None
    assert 75 * MEGABYTE < taken.most < 160 * MEGABYTE
    assert (here.sum(1) == MEGABYTE).all()
    assert (there[[0, -1]] == 2).all()
    there[3, :5] = torch.tensor([1, 2, 3, 4, 5], dtype=torch.uint8)
    assert there[3, :6].tolist() == [1, 2, 3, 4, 5, 2]


def test_room_comes_back_with_its_tensor(tmp_path):
    room = Room(1000, tmp_path)
    first = room.empty(200, dtype=torch.float32)
    assert room.in_memory == 800
    del first
    assert room.in_memory == 0
    assert room.empty(3, 5, dtype=torch.float64).shape == (3, 5)
    assert room.on_disk == 0


def test_nothing_at_all_may_stand_on_disk(tmp_path):
    assert Room(0, tmp_path).empty(0, 7, dtype=torch.float32).shape == (0, 7)


def test_room_comes_back_with_the_last_tensor_of_the_same_numbers():
    """It once came back with the first one, while another still held the memory."""
    room = Room(1000)
    first = room.empty(10, 10, dtype=torch.float32)
    for share in (torch.Tensor.detach, torch.Tensor.numpy, torch.Tensor.t):
        other = share(first)
        del first
        assert room.in_memory == 400
        first = torch.as_tensor(other)
        del other
    del first
    assert room.in_memory == 0
