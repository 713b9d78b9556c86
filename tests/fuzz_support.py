"""Good files with something broken in them: what a reader may meet, made from a seed.

    hurt(path, generator)   breaks one file in place, in a way that fits its kind
    read(run)               runs a reader; whatever it raises must be one sentence of ours

Bytes are cut off, turned, put in and taken out; in JSON, YAML and the headers of safetensors a
value becomes one of another kind, goes, or moves; tensors get other types, shapes, places and
names, or numbers that are none; rows of SQLite get wrong values.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import yaml

from malmend.errors import FactsError, MalmendError

# What stands where something else was expected.
WRONG: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.5,
    float("nan"),
    float("inf"),
    1e308,
    "",
    " ",
    "x",
    "null",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "\u202e",
    "x" * 5000,
    "eos",
    "F64",
    "BOOL",
    [],
    [0],
    [-1, 5],
    [[]],
    ["x", None],
    [2**62, 2**62],
    {},
    {"": {}},
    {"x": 1},
    {"__class__": "os.system"},
)


def bytes_hurt(content: bytes, generator: random.Random) -> bytes:
    """One to four small wounds."""
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(content) + 1)
        length = min(generator.choice((1, 1, 2, 8, 64, 1000)), len(content) - at)
        kind = generator.randrange(6)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + content[at + length :]
        elif kind == 2:
            content = content[:at] + generator.randbytes(max(1, length)) + content[at + length :]
        elif kind == 3:
            content = content[:at] + content[at : at + length] * 2 + content[at + length :]
        elif kind == 4 and at < len(content):
            turned = content[at] ^ (1 << generator.randrange(8))
            content = content[:at] + bytes([turned]) + content[at + 1 :]
        else:
            some = generator.choice(
                (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"]", b'"', b"\r")
            )
            content = content[:at] + some + content[at:]
    return content


def value_hurt(value: Any, generator: random.Random) -> Any:
    """A copy of plain data in which one to three places hold something else."""
    value = json.loads(json.dumps(value))
    for _ in range(generator.randint(1, 3)):
        places = [(None, None), *_places(value)]
        holder, key = generator.choice(
            places if generator.random() < 0.02 else places[1:] or places
        )
        kind = generator.randrange(6)
        wrong = generator.choice(WRONG)
        if holder is None:
            value = wrong
            break
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[generator.choice(("x", "", "__proto__", f"{key} ", str(wrong)[:20]))] = wrong
        elif kind == 2 and isinstance(holder, dict):
            holder[str(wrong)[:40]] = holder.pop(key)
        elif kind == 3:
            other, there = generator.choice(places[1:])
            with suppress(KeyError, IndexError):
                holder[key] = json.loads(json.dumps(other[there]))
        else:
            holder[key] = wrong
    if generator.random() < 0.01:
        for _ in range(3000):
            value = [value]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def _said(value: Any, generator: random.Random) -> bytes:
    """As JSON, at times with what JSON does not know; never failing to say it."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    text = json.dumps(
        value, ensure_ascii=generator.random() < 0.5, indent=generator.choice((None, 1))
    )
    return ("[" * depth + text + "]" * depth).encode("utf-8", "surrogatepass")


def json_hurt(content: bytes, generator: random.Random) -> bytes:
    return _said(value_hurt(json.loads(content), generator), generator)


def lines_hurt(content: bytes, generator: random.Random) -> bytes:
    """One line of JSON lines."""
    lines = content.splitlines()
    at = generator.randrange(len(lines))
    hurt_line = _said(value_hurt(json.loads(lines[at]), generator), generator).replace(b"\n", b" ")
    return b"\n".join([*lines[:at], hurt_line, *lines[at + 1 :]]) + b"\n"


def yaml_hurt(content: bytes, generator: random.Random) -> bytes:
    value = value_hurt(yaml.safe_load(content), generator)
    return _said(value, generator)  # JSON is YAML, or nearly


def tensors_hurt(content: bytes, generator: random.Random) -> bytes:
    """A safetensors file: its header's length, a header's value, a note in it, or numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = generator.randrange(5)
    if kind == 0:
        length = generator.choice((0, 1, size - 1, size + 1, 2**20, 10**8, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + content[8:]
    if kind == 1:
        at = generator.randrange(max(1, len(data) // 4)) * 4
        number = generator.choice((float("nan"), float("inf"), 1e38, -1e38, 0.0))
        data = data[:at] + struct.pack("<f", number) + data[at + 4 :]
    elif kind == 2:
        header = value_hurt(header, generator)
    elif kind == 3 and header.get("__metadata__"):
        notes = header["__metadata__"]
        name = generator.choice(sorted(notes))
        with suppress(ValueError):
            notes[name] = _said(value_hurt(json.loads(notes[name]), generator), generator).decode(
                "utf-8", "replace"
            )
    else:
        names = [name for name in header if name != "__metadata__"]
        one = header[generator.choice(names)]
        if generator.random() < 0.5:
            one["shape"] = one["shape"][::-1] if generator.random() < 0.5 else [*one["shape"], 1]
        else:
            other = header[generator.choice(names)]
            one.update(json.loads(json.dumps(other)))
    text = _said(header, generator)
    return struct.pack("<Q", len(text)) + text + data


def rows_hurt(path: Path, generator: random.Random) -> None:
    """One value of one row of an SQLite file, or a table."""
    with closing(sqlite3.connect(path)) as db, suppress(sqlite3.Error, OverflowError, ValueError):
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        table = generator.choice(tables)
        if generator.random() < 0.1:
            db.execute(generator.choice((f"DROP TABLE {table}", f"DELETE FROM {table}")))
        else:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            ids = [row[0] for row in db.execute(f"SELECT rowid FROM {table}")]
            column, row = generator.choice(columns), generator.choice(ids)
            [(old,)] = db.execute(f"SELECT {column} FROM {table} WHERE rowid=?", (row,))
            wrong: Any = generator.choice(WRONG)
            if isinstance(old, str) and generator.random() < 0.5:
                with suppress(ValueError):
                    wrong = _said(value_hurt(json.loads(old), generator), generator).decode()
            if isinstance(wrong, list | dict):
                wrong = json.dumps(wrong)
            db.execute(f"UPDATE {table} SET {column}=? WHERE rowid=?", (wrong, row))
        db.commit()


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": json_hurt,
    ".jsonl": lines_hurt,
    ".yaml": yaml_hurt,
    ".safetensors": tensors_hurt,
}


def hurt(path: Path, generator: random.Random) -> None:
    """Breaks a file in place: half of the time in a way that fits its kind."""
    content = path.read_bytes()
    if path.suffix == ".sqlite" and generator.random() < 0.5:
        rows_hurt(path, generator)
        return
    if path.suffix in KINDS and generator.random() < 0.6:
        path.write_bytes(KINDS[path.suffix](content, generator))
        return
    path.write_bytes(bytes_hurt(content, generator))


def read(run: Callable[[], object]) -> bool:
    """Whether a reader took what it was given; it may only refuse, in one sentence of ours.

    Or in a list, of facts or of a plan's faults, of which the first line says how many.

    A file that is still good, or that says something else which makes sense, may well be read.
    """
    try:
        run()
    except MalmendError as error:
        refused = error
    else:
        return True
    lines = str(refused).splitlines()
    assert lines, "an empty message"
    counted = re.search(r" cannot be used: ([\d,]+) faults?$", lines[0])
    few = 1 if counted is None else 1 + int(counted[1].replace(",", ""))
    twice = all("is there twice" in line for line in lines)  # names of a YAML file
    assert isinstance(refused, FactsError) or twice or len(lines) == few, lines
    assert len(lines[0]) < 2000, lines[0][:3000]
    return False
