"""What cells gave, as JSON lines: added to one by one, never written anew."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malmend.errors import MalmendError

NAME = "cells.jsonl"
# What tables, figures and estimates read of a row.
FIELDS = {"model", "name", "protocol", "m", "seed", "unedited", "edited", "edit_seconds", "seconds"}
FIELDS |= {"failures", "patch"}


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
            if not isinstance(key, str) or not set(row) >= FIELDS:
                raise TypeError(key)
        except (ValueError, KeyError, TypeError) as error:
            raise MalmendError(
                f"{self.path}: line {number} is no row of a bench; remove it, or give another "
                "folder."
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
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
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


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
