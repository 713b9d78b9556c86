"""Whether a GGUF header can be believed, before a library that believes it makes room for it.

A header states how many entries, letters and tensors follow; each takes bytes, so none can be more
than the file has.  Layout: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from malmend.errors import ModelError
from malmend.models.config_check import MOST_LAYERS

MAGIC = b"GGUF"
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value's kind
INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
STRING, ARRAY = 8, 9
DEEPEST = 4  # arrays in arrays
LARGEST = 1 << 20  # of a width, a count of blocks or heads, a number of a token
LONGEST = 50_000_000  # of a context, in tokens: some models state ten million


def check_gguf(path: Path) -> None:
    """Raises ModelError where a header states what the file cannot hold, or absurd sizes.

    What else may be wrong with it the library says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError("it does not begin with GGUF")
            version, tensors, entries = struct.unpack("<IQQ", _take(file, 20, size))
            if version not in (2, 3):
                raise ValueError(f"version {version}, expected 2 or 3")
            if max(tensors, entries) > size:
                raise ValueError(f"{max(tensors, entries):,} entries in {size:,} bytes")
            for _ in range(entries):
                _entry(file, size)
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"The model {str(path)!r} is no whole GGUF file ({error}); fetch it again."
        ) from error


def _entry(file: BinaryIO, size: int) -> None:
    name = _string(file, size)
    (kind,) = struct.unpack("<I", _take(file, 4, size))
    if kind in INTEGERS:
        (value,) = struct.unpack(INTEGERS[kind], _take(file, SIZES[kind], size))
        # Token numbers are small too; what is larger anywhere is made room for.
        if name.endswith(b".block_count") and value > MOST_LAYERS:
            raise ValueError(f"{name.decode('utf-8', 'replace')[:60]!r} is {value:,}")
        most = LONGEST if name.endswith(b"context_length") else LARGEST
        if not name.startswith(b"general.") and abs(value) > most and not _is_unset(value):
            raise ValueError(f"{name.decode('utf-8', 'replace')[:60]!r} is {value:,}")
    else:
        _skip(file, kind, size, DEEPEST)


def _is_unset(value: int) -> bool:
    """Some writers put -1 into unsigned numbers for none."""
    return value in (2**32 - 1, 2**64 - 1)


def _skip(file: BinaryIO, kind: int, size: int, deep: int) -> None:
    if kind in SIZES:
        _take(file, SIZES[kind], size)
    elif kind == STRING:
        _string(file, size)
    elif kind == ARRAY and deep:
        inner, count = struct.unpack("<IQ", _take(file, 12, size))
        if inner in SIZES:
            _past(file, count * SIZES[inner], size)
            return
        if count > size:
            raise ValueError(f"a list of {count:,} in {size:,} bytes")
        for _ in range(count):
            _skip(file, inner, size, deep - 1)
    else:
        raise ValueError(f"a value of kind {kind}")


def _string(file: BinaryIO, size: int) -> bytes:
    (length,) = struct.unpack("<Q", _take(file, 8, size))
    return _take(file, length, size)


def _take(file: BinaryIO, count: int, size: int) -> bytes:
    if count > size - file.tell():
        raise ValueError(f"{count:,} bytes are stated where {size - file.tell():,} are left")
    return file.read(count)


def _past(file: BinaryIO, count: int, size: int) -> None:
    if count > size - file.tell():
        raise ValueError(f"{count:,} bytes are stated where {size - file.tell():,} are left")
    file.seek(count, 1)
