"""What cells gave, as JSON lines: added to one by one, never written anew."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from malmend.bench.plan import Protocol
from malmend.errors import MalmendError
from malmend.files import reason

NAME = "cells.jsonl"
# What tables, figures and estimates read of a row.
FIELDS = {"model", "name", "protocol", "m", "seed", "unedited", "edited", "edit_seconds", "seconds"}
FIELDS |= {"failures", "patch", "made", "facts_sha256", "asked", "base"}
SAID = ("kind", "prompt", "wanted", "unedited", "edited")  # of a failure
MOST = 1e305  # of a number; the mean of larger ones is none


class Results:
    """The rows of a folder, by the keys of their cells.

    A row is on the disk when :meth:`add` returns.  A last line that a killed run left half written
    is cut off when the next row is added; a whole line that is no row is refused.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.rows: dict[str, dict[str, Any]] = {}
        self._whole = 0  # bytes of whole lines
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._size = len(content)
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            self._whole += len(line)
            self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            key = row["key"]
            if not isinstance(key, str) or not set(row) >= FIELDS or not _makes_sense(row):
                raise TypeError(key)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MalmendError(
                f"{self.path}:{number}: is no row of a bench of this version; remove it, or "
                "give another folder."
            ) from error
        self.rows[key] = row

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Puts a row behind the others."""
        kept = {"key": key, **row}
        line = json.dumps(_plain(kept), ensure_ascii=False, allow_nan=False) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            raise MalmendError(
                f"{self.path} has changed since this run began: another bench writes to it. Wait "
                "for it and run the same command again, or give another --out."
            )
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MalmendError(
                f"{self.path} cannot be written ({reason(error)}); make room, and run the same "
                "command again."
            ) from error
        self._whole += len(line.encode())
        self._size = self._whole
        self.rows[key] = kept

    def seconds_per_fact(self, model: str, name: str, protocol: str) -> float | None:
        """By the largest cell of a method that is done; None where none is."""
        mine = [
            row
            for row in self.rows.values()
            if (row["model"], row["name"], row["protocol"]) == (model, name, protocol)
        ]
        if not mine:
            return None
        largest = max(mine, key=lambda row: row["m"])
        return float(largest["seconds"]) / float(largest["m"])


def _makes_sense(row: Mapping[str, Any]) -> bool:
    """Whether what tables and figures read of a row is of the kind that they read."""
    scores = [row[one].values() for one in ("unedited", "edited")]
    numbers = [value for kinds in scores for kind in kinds for value in kind.values()]
    numbers += [row["patch"].get(one) for one in ("mean_residual", "residual_after")]
    numbers += [row.get("perplexity", {}).get(one) for one in ("unedited", "edited")]
    known = [row["edit_seconds"], row["seconds"], row["seed"], row["m"]]
    said = [one[part] for one in row["failures"] for part in SAID]
    words = [row["model"], row["name"], *said]
    return (
        all(value is None or _is_number(value) for value in [*numbers, row.get("edit_bytes")])
        and all(_is_number(value) and value >= 0 for value in known)
        and row["m"] >= 1
        and all(isinstance(one, str) for one in words)
        and row["protocol"] in get_args(Protocol)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
