"""What is found of a model's questions, on disk: computed once, shared by every later run.

Trunk activations, final states of the unedited model, captured pairs.

A folder of *segments*.  Each process appends to a segment of its own (data first, then an index
record), so that any number of processes may read and write at once, and a killed one leaves
nothing worse than an unindexed tail.  Segments are memory-mapped for reading, and what is read is
held against its checksum: after a power cut a file may have its length and not yet its content.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy
import torch
from torch import Tensor

_RECORD = struct.Struct("<16sQQI")  # key, first byte, number of rows, CRC-32 of them
INDEX = ".index"
RECOUNTED = 64_000_000  # bytes that a store keeps before it looks again at what others have kept

Place = tuple[Path, int, int, int]  # of rows: the segment, and what the record says


class ActivationStore:
    """Rows of activations by question.

    Args:
        folder: where the segments lie; None keeps nothing.
        width: numbers per row.
        dtype: of the rows.
        budget: bytes that all segments may take together, those in the folders beside this one
            (the same model's other stores) included, of runs beside this one too, which are
            counted again every :data:`RECOUNTED` bytes.  Above nine tenths of it the oldest
            segments are removed when a store is opened; above it new rows are no longer kept.
    """

    def __init__(self, folder: Path | None, width: int, dtype: torch.dtype, budget: int):
        self.width, self.dtype, self.budget = width, dtype, budget
        self._row_bytes = width * dtype.itemsize
        self._places: dict[bytes, Place] = {}
        self._maps: dict[Path, numpy.ndarray] = {}
        self._own: Path | None = None
        self._own_bytes = 0
        self._bytes = self._counted = 0  # of all segments; of the own one when they were counted
        if folder is not None and budget > 0:
            self._open(folder)

    def get(self, ids: Sequence[int]) -> Tensor | None:
        """The rows of a question, or None."""
        place = self._places.get(key := _key(ids))
        if place is None:
            return None
        path, start, rows, checksum = place
        stop = start + rows * self._row_bytes
        known = self._maps.get(path)
        if known is None or len(known) < stop:  # our own segment grows
            try:
                known = self._maps[path] = numpy.memmap(path, dtype=numpy.uint8, mode="r")
            except OSError:  # another run has removed it
                return None
        copied = known[start:stop].copy()
        if zlib.crc32(copied.data) != checksum:  # to be found, and kept, again
            del self._places[key]
            return None
        raw = torch.from_numpy(copied)
        return raw.view(self.dtype).view(rows, self.width)

    def put_all(self, found: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """Keeps the rows of questions, if the budget and the disk allow.

        All of one call or, where the process is killed, none: who finds a part of what was computed
        together would compute the rest in other company, and round otherwise.
        """
        places, records, packed = dict[bytes, Place](), b"", bytearray()
        for ids, rows_TF in found:
            key = _key(ids)
            if self._own is None or key in self._places or key in places:
                continue
            wide = rows_TF.detach().to(device="cpu", dtype=self.dtype).contiguous()
            raw = wide.view(torch.uint8).numpy().tobytes()
            place = (self._own_bytes + len(packed), rows_TF.shape[0], zlib.crc32(raw))
            places[key] = (self._own, *place)
            records += _RECORD.pack(key, *place)
            packed += raw
        if self._own is None or not packed:
            return
        try:
            if self._own_bytes - self._counted >= RECOUNTED:
                self._bytes = sum(stat.st_size for _, stat in _segments(self._own.parent))
                self._counted = self._own_bytes
            if self._bytes + len(packed) > self.budget:
                return
            # Never made anew: another run may have removed it, and then nothing more is kept.
            with self._own.open("r+b" if self._own_bytes else "xb") as data:
                data.seek(self._own_bytes)
                data.write(packed)
            with self._own.with_suffix(INDEX).open("ab") as index:
                index.write(records)
        except OSError:  # a full disk costs speed, not the run
            self._own = None
            return
        self._places |= places
        self._own_bytes += len(packed)
        self._bytes += len(packed)

    def _open(self, folder: Path) -> None:
        found: list[tuple[float, Path, int]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            found = [(stat.st_mtime, path, stat.st_size) for path, stat in _segments(folder)]
            found.sort()
            sizes = {path: size for _, path, size in found}
            for _, path, _ in found:
                if sum(sizes.values()) <= self.budget * 0.9:
                    break
                path.with_suffix(INDEX).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                del sizes[path]
        except OSError:
            return
        for path, size in sizes.items():
            if path.parent == folder:
                self._read_index(path, size)
        self._bytes = sum(sizes.values())
        self._own = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.bin"

    def _read_index(self, path: Path, size: int) -> None:
        try:
            raw = path.with_suffix(INDEX).read_bytes()
        except OSError:
            return
        whole = len(raw) - len(raw) % _RECORD.size
        for key, start, rows, checksum in _RECORD.iter_unpack(raw[:whole]):
            if start + rows * self._row_bytes <= size:
                self._places[key] = (path, start, rows, checksum)


def _sweep(folder: Path) -> None:
    """Removes every index whose segment is gone, of a store's folder and of those beside it.

    Rows are written before their record, so the segment will not come.
    """
    with suppress(OSError):  # a folder that can only be read
        for index in folder.parent.glob(f"*/*{INDEX}"):
            if not index.with_suffix(".bin").exists():
                index.unlink(missing_ok=True)


def _segments(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Those of a store's folder and of the folders beside it."""
    for path in folder.parent.glob("*/*.bin"):
        with suppress(FileNotFoundError):  # another run removes old ones
            yield path, path.stat()


def _key(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(numpy.asarray(ids, dtype="<i8").tobytes(), digest_size=16).digest()
