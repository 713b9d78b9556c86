"""The methods that are trained before they edit, by name: their settings, training, and use.

They are trained by ``malmend train --method NAME`` and used by the folder that it writes, as any
editor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from malmend.editors.folder import said_in
from malmend.errors import EditorError
from malmend.methods.enn import Enn, EnnSettings
from malmend.methods.enn_training import EnnTrainer
from malmend.methods.ke import Ke, KeSettings
from malmend.methods.ke_training import KeTrainer
from malmend.methods.method import Method


class Learner(Protocol):
    """What is trained, step by step; see the trainers' own files."""

    step: int

    def run(self) -> Iterator[Any]:
        """Trains to the last step, yielding a record after each."""

    def save(self, folder: str | Path) -> None:
        """Writes the folder, and in it what resuming needs."""

    def resume(self, folder: str | Path) -> dict[str, Any]:
        """Goes on from what :meth:`save` wrote; returns what it said about the run."""


@dataclass(frozen=True)
class Trained:
    """A method by its three parts."""

    settings: type
    trainer: Callable[..., Learner]
    method: Callable[[str], Method]


TRAINED = {
    "enn": Trained(EnnSettings, EnnTrainer, Enn),
    "ke": Trained(KeSettings, KeTrainer, Ke),
}


TRAINED_FIRST = (*TRAINED, "mend-single")  # which of itself edits nothing, or is another method


def check_trained(name: str) -> None:
    """Raises EditorError for a method that only an editor's folder holds."""
    if name in TRAINED_FIRST:
        raise EditorError(
            f"{name} is trained before it edits; run `malmend train --method {name}` and give the "
            "folder that it writes as the editor."
        )


def trained_method(folder: object) -> Method | None:
    """The method that a folder holds, where it is one of these; None for any other."""
    if not isinstance(folder, str | Path) or folder in ("auto", "none"):
        return None
    kind = TRAINED.get(method_in(folder) or "")
    return None if kind is None else kind.method(str(folder))


def method_in(folder: str | Path) -> str | None:
    """The name that a folder's ``editor.json`` says; None of an editor, or where there is none."""
    name = said_in(folder).get("method")
    return name if isinstance(name, str) else None
