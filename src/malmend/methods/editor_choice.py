"""Which editor an edit uses: a trained one, one in hand, the shipped one, or none at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import SavedEditor, check_trained_for, load_editor
from malmend.editors.editor import Editor
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError, MalmendError, counted, nearest
from malmend.material import calibrated
from malmend.methods.trained import check_trained
from malmend.models.device import wide_device
from malmend.models.load import LoadedModel
from malmend.progress import Progress, silent
from malmend.workbench import SHIPPED, Workbench, shipped_editor, shipped_editors


@dataclass(frozen=True, eq=False)
class Choice:
    """An editor by what is known of it before a model is loaded.

    Attributes:
        name: as patches call it: a folder, "shipped:NAME", "none" or "in memory".
        settings: that facts are encoded and sites found by.
        saved: what an editor's folder holds.
        in_hand: an editor that was given as it is.
        may_ship: whether the package's own editor for the model is to be looked for.
        ruled_out: what was given that keeps it from being taken, in words, where anything was.
        left: its name, once the model is known and there is one that is not taken.
    """

    name: str
    settings: EditorSettings
    saved: SavedEditor | None = None
    in_hand: Editor | None = None
    may_ship: bool = False
    ruled_out: str = ""
    left: str = ""

    def on(self, loaded: LoadedModel) -> Choice:
        """The same, once the model is known: the shipped editor comes in, a foreign one is refused.

        Raises:
            EditorError: the editor was trained for another base.
        """
        wanted = self.may_ship or self.ruled_out
        folder = shipped_editor(loaded.fingerprint) if wanted else None
        if folder is not None and self.ruled_out:
            return replace(self, left=f"{SHIPPED}{folder.name}")
        if folder is not None:
            saved = load_editor(folder)
            return Choice(f"{SHIPPED}{folder.name}", saved.editor.settings, saved)
        if self.saved is not None:
            check_trained_for(loaded, self.name, self.saved.base)
        return self

    @property
    def is_calibrated_here(self) -> bool:
        """Whether it comes without statistics, which are then taken for the edit."""
        return self.saved is None and self.in_hand is None

    def said(self) -> str:
        """Which editor it is, in a line for a person."""
        if self.name == "none":
            why = f", for {self.ruled_out} rule out {self.left}, the editor for this model"
            return f"Editor: none; the model is edited without training{why * bool(self.left)}."
        facts = None if self.saved is None else self.saved.about.get("facts")
        learned = f", trained on {counted(facts, 'fact')}" if isinstance(facts, int) else ""
        return f"Editor: {self.name}{learned}."

    def provenance(self) -> dict[str, Any]:
        """What a patch says of the editor that made it: name and identity."""
        identity = {} if self.saved is None else {"editor_id": self.saved.identity}
        return {"editor": self.name, **identity}

    def editor(
        self,
        bench: Workbench,
        calibrate: str | Path | None = None,
        text: str | Path | None = None,
        calibration: CalibrationSettings = CalibrationSettings(),
        progress: Progress = silent,
    ) -> Editor:
        """The editor, ready for the model on the bench; without a network it is calibrated first.

        Raises:
            EditorError: the editor is for other layers.
        """
        ready = self.in_hand  # which stays where it is
        if self.saved is not None:
            ready = self.saved.editor.on(wide_device(bench.trunk.model))
        if ready is None:
            found = calibrated(bench, self.settings, calibrate, text, calibration, progress)
            return found.editor(self.settings, bench.trunk)
        ready.check_fits(bench.trunk.sites)
        return ready


def choose(
    editor: str | Path | Editor, settings: EditorSettings | None = None, own_data: bool = False
) -> Choice:
    """An editor from what a user says.

    Args:
        editor: "auto", "none", an editor's folder, one of the package as patches name it
            ("shipped:NAME"), or an editor.
        settings: of an editor without a network, whatever network they name; with them "auto" is
            "none".
        own_data: whether calibration facts, text or settings of calibration were given, which
            make "auto" "none" too.

    Raises:
        MalmendError: settings or data beside an editor that brings its own, no editor there, or a
            method that has to be trained.
    """
    if isinstance(editor, str) and editor in ("auto", "none"):
        given = EditorSettings() if settings is None else settings
        free = Choice("none", replace(given, network=NetworkSettings(blocks=0)))
        check_trained(free.settings.method)
        if editor == "none":
            return free
        ruled_out = "the settings given" if settings is not None else ""
        if own_data and not ruled_out:
            ruled_out = "the calibration data or settings given"
        return replace(free, may_ship=not ruled_out, ruled_out=ruled_out)
    if not isinstance(editor, str | Path | Editor):
        raise MalmendError(
            f'editor is {editor!r:.80}, expected a folder, an editor, "none" or "auto".'
        )
    if settings is not None:
        raise MalmendError(
            "An editor brings its own settings; give an editor or settings, not both."
        )
    if own_data:
        raise MalmendError(
            "A trained editor brings its own calibration; leave out --calibrate and --text (and "
            "calibration, in Python), which serve only the editor `none`."
        )
    if isinstance(editor, Editor):
        return Choice("in memory", editor.settings, in_hand=editor)
    saved = load_editor(_folder_of(editor))
    return Choice(str(editor), saved.editor.settings, saved)


def _folder_of(editor: str | Path) -> str | Path:
    """Where an editor lies that is named by its folder, or as patches name the package's own."""
    name = str(editor)
    carried = {f"{SHIPPED}{one.name}": one for one in shipped_editors()}
    if name in carried or Path(editor).exists():
        return carried.get(name, editor)
    if name.startswith(SHIPPED):
        raise MalmendError(
            f"The package carries no editor {name!r}{nearest(name, carried) or ';'} "
            "give --editor auto, which takes the one for the model."
        )
    if isinstance(editor, str) and (near := nearest(name, ("auto", "none"))):
        raise EditorError(f"There is no editor in {name}{near} Or give an editor's folder.")
    return editor
