"""The folder of an editor or of a method that is trained: ``editor.json`` and the weights it names.

The weights' file has a new name each time, which the JSON gives, so that files of two writings
never mix.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from malmend.errors import EditorError, MalmendError, is_out_of_memory
from malmend.files import reason, written_beside

# That without a tag is an earlier version's, of a method that is trained.
OURS = re.compile(r"editor(-[0-9a-f]{8})?\.safetensors")


def write_folder(tensors: Mapping[str, Tensor], about: Mapping[str, Any], folder: Path) -> None:
    """Writes the two files, each beside and renamed, and takes earlier weights away."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"editor-{uuid.uuid4().hex[:8]}.safetensors"
    with written_beside(folder / name) as beside:
        save_file({key: one.cpu().contiguous() for key, one in tensors.items()}, beside)
    # ``about`` may come from another folder, and then names that one's weights.
    what = {**about, "weights": name, "identity": identity_of(folder / name)}
    with written_beside(folder / "editor.json") as beside:
        beside.write_text(json.dumps(what, indent=2, allow_nan=False), encoding="utf-8")
    for old in folder.glob("editor*.safetensors"):
        if OURS.fullmatch(old.name) and old.name != name:
            old.unlink(missing_ok=True)


def read_folder(
    folder: Path, check: Callable[[Mapping[str, Any]], None]
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """What the JSON says, the weights, and their identity; what a bad file raises is not caught.

    ``check`` sees what is said before the weights are read.

    Raises:
        EditorError: no such folder.
    """
    if not (folder / "editor.json").is_file():
        raise EditorError(
            f"There is no editor in {folder} (no editor.json); give a folder that `malmend train` "
            "wrote, or `none` for the editor without a network."
        )
    about = _said(folder)
    check(about)
    try:
        weights = weights_in(folder, about)
        tensors, identity = load_file(weights), identity_of(weights)
    except FileNotFoundError:
        if _said(folder) == about:
            raise
        return read_folder(folder, check)  # it was written anew between the two
    if about.get("identity", identity) != identity:  # older ones do not say theirs
        raise ValueError("its weights are not those that it names")
    return about, tensors, identity


@contextmanager
def whole(what: object, otherwise: str) -> Iterator[None]:
    """Turns what a damaged file raises into a sentence, which ``what`` begins and names the file.

    An EditorError says itself what is wrong.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EditorError) or is_out_of_memory(error):
            raise
        raise EditorError(f"{what} is damaged ({reason(error)}); {otherwise}.") from error


def settings_from(kind: Callable[..., Any], said: Mapping[str, Any]) -> Any:
    """Settings that a folder says; what is wrong with them makes it a damaged one."""
    try:
        return kind(**said)
    except MalmendError as error:  # whose sentence does not name the folder
        raise ValueError(str(error).removesuffix(".")) from error


def weights_in(folder: Path, about: Mapping[str, Any]) -> Path:
    """The weights' file, which must lie in the editor's own folder."""
    name = Path(about["weights"])
    if name.name != str(name):
        raise EditorError(f"{folder} names weights outside its folder; it is damaged.")
    return folder / name


def identity_of(weights: Path) -> str:
    """The first 24 hexadecimal digits of the SHA-256 of the weights' file."""
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def said_in(folder: str | Path) -> dict[str, Any]:
    """What a folder's ``editor.json`` says; nothing where it is missing or damaged."""
    try:
        about = json.loads((Path(folder) / "editor.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # whoever reads it next says what is wrong
    return about if isinstance(about, dict) else {}


def _said(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "editor.json").read_text(encoding="utf-8"))
    return about
