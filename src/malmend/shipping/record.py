"""What an export says of itself: ``malmend.json`` beside the adapter or the merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malmend.errors import PatchError
from malmend.files import reason
from malmend.patch_file import plain_json

RECORD = "malmend.json"
FORMAT = 1


def write_record(folder: Path, about: Mapping[str, Any]) -> None:
    """Writes the record; the folder around it is written beside and renamed."""
    text = json.dumps({"format": FORMAT, **about}, indent=1, ensure_ascii=False, allow_nan=False)
    # A path may be no UTF-8; what Python puts in place of its bytes JSON escapes in these words.
    (folder / RECORD).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of an exported folder; None where there is none.

    Raises:
        PatchError: it is damaged, or of a newer version.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        about = plain_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatchError(f"{path} is damaged ({reason(error)}); export again.") from error
    if not isinstance(about, dict) or not isinstance(about.get("patch"), dict):
        raise PatchError(f"{path} names no patch; it is damaged, export again.")
    if about.get("format") != FORMAT:
        raise PatchError(
            f"{path} has format {about.get('format')!r}, this version reads {FORMAT}; use the "
            "malmend version that wrote it."
        )
    return about
