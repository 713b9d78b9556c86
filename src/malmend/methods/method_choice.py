"""Which method an edit uses: an editor as one, or another; both are asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.editor import Editor
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import MalmendError
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder
from malmend.methods.editor_choice import choose
from malmend.methods.editor_method import ByEditor
from malmend.methods.method import Method
from malmend.methods.trained import trained_method
from malmend.models.budget import MemoryPlan
from malmend.models.load import LoadedModel
from malmend.processes import Processes
from malmend.workbench import Workbench


@dataclass(frozen=True, eq=False)
class AsGiven:
    """A method that needs nothing before it edits; asked what :class:`ByEditor` is asked."""

    method: Method

    def ready(self, encoder: Encoder, count: int) -> AsGiven:
        """Itself."""
        return self

    def on(self, loaded: LoadedModel) -> AsGiven:
        """Itself."""
        return self

    def said(self) -> Sequence[str]:
        """By which method."""
        return [f"Method: {self.method.name}."]

    def within(
        self, bench: Workbench, facts: Sequence[Fact], memory: str | None
    ) -> tuple[Workbench, MemoryPlan | None]:
        """The bench as it is, for :func:`method_for` takes no memory budget beside a method."""
        return bench, None


def method_for(
    editor: str | Path | Editor,
    settings: EditorSettings | None,
    method: Method | None,
    calibrate: str | Path | None,
    text: str | Path | None,
    calibration: CalibrationSettings,
    refine: RefineSettings,
    memory: str | None,
    processes: Processes,
) -> ByEditor | AsGiven:
    """The method that an edit is to use; the arguments as of :func:`malmend.commands.edit.edit`.

    Raises:
        MalmendError: what was given does not go together, or is no method or editor.
    """
    if method is None and settings is None and (found := trained_method(editor)) is not None:
        method, editor = found, "auto"
    own_data = (calibrate, text, calibration) != (None, None, CalibrationSettings())
    if method is None:
        choice = choose(editor, settings, own_data)
        return ByEditor(choice, calibrate, text, calibration, refine, processes)
    if isinstance(method, type) or not hasattr(method, "sites_in"):
        raise MalmendError(
            f"method is {method!r:.80}, expected a method with its settings, such as Memit() of "
            "malmend.methods.memit; the editor's own is settings=EditorSettings(method=...)."
        )
    of_editors = (editor, settings, memory, refine) != ("auto", None, None, RefineSettings())
    if of_editors or own_data:
        raise MalmendError(
            f"The method {method.name} takes neither an editor, nor settings of one, nor "
            "calibration data, nor a memory budget; leave out --editor, --calibrate, --text, "
            "--memory, --refine.*, and --layers and the other settings of editors."
        )
    if processes.count > 1:
        raise MalmendError(
            f"The method {method.name} runs in one process and there are {processes.count}; start "
            "it without torchrun. Only editors are spread over processes."
        )
    return AsGiven(method)
