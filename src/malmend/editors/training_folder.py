"""The folder of a training, of an editor or of another method: what may be begun or gone on with.

Training writes ``training.safetensors``, which resuming needs, before ``editor.json``, which makes
an editor of the folder: a run that is killed between the two goes on.
"""

from __future__ import annotations

from pathlib import Path

from malmend.editors.folder import said_in
from malmend.editors.resuming import FILE
from malmend.errors import EditorError, MalmendError
from malmend.files import kind_of, writable_folder


def check_unlike(folder: Path, own: str | None = None) -> None:
    """Raises MalmendError where a folder is a model, a ledger or the like, and not ``own``.

    What is written among their files may be taken for one of them.
    """
    if (kind := kind_of(folder)) not in (None, own):
        raise MalmendError(f"{folder} holds {kind} already; give another --out.")


def check_folder(folder: Path) -> None:
    """Makes the folder if need be.

    Raises:
        MalmendError: it is a model, a ledger or the like, or cannot be written into.
    """
    check_unlike(folder, "an editor")
    writable_folder(folder)


def is_begun(folder: Path, method: str | None = None) -> bool:
    """Whether the folder holds a run to go on with: of an editor, or of another method.

    Raises:
        EditorError: what it holds is of another kind, or an editor that nothing can go on with and
            that a new run would write over.
    """
    if not (folder / FILE).is_file():
        if (folder / "editor.json").is_file():
            raise EditorError(
                f"{folder} holds an editor without what resuming needs; give another --out."
            )
        return False
    said = said_in(folder)  # nothing, where a run was killed before it wrote this
    if said and said.get("method") != method:
        kind = f"a trained {said['method']}" if "method" in said else "an editor"
        raise EditorError(
            f"{folder} holds {kind}, not {method or 'an editor'}; give another --out."
        )
    return True


def check_steps(folder: Path, taken: int, asked: int) -> None:
    """Raises EditorError where a run is further already than is asked for."""
    if taken > asked:
        raise EditorError(
            f"{folder} was trained for {taken} steps, {asked} are asked for; ask for as many or "
            "more, or give another --out."
        )


def is_due(step: int, every: int, last: int) -> bool:
    """Whether the folder is written after a step."""
    return step % every == 0 or step == last


def is_whole(folder: Path, step: int) -> bool:
    """Whether the folder's editor is that of this step."""
    return said_in(folder).get("step") == step
