"""Which editor an edit uses: a trained one, one in hand, the shipped one, or none at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from malmend.editors import restore, settle
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import SavedEditor, load_editor
from malmend.editors.draws import lines_for
from malmend.editors.editor import Editor
from malmend.editors.refine import RefineSettings, framed, framing
from malmend.editors.settings import EditorSettings, training_free
from malmend.errors import EditorError, MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.known import known_facts
from malmend.material import calibrated, to_hold
from malmend.methods.by_editor import Holding, find_by_editor, refinable
from malmend.methods.method import Found
from malmend.methods.trained import check_trained
from malmend.models.budget import MemoryPlan, Work, rows_of
from malmend.models.device import wide_device
from malmend.models.load import LoadedModel
from malmend.models.sites import Site
from malmend.processes import ALONE, Processes
from malmend.progress import Progress, silent
from malmend.workbench import SHIPPED, Workbench, shipped_editor, within_memory

# Fields of RefineSettings that settling alone reads, and that later solves alone do.
OF_SETTLING, OF_SOLVES = ("steps", "wordings", "hold"), ("gain", "chat_gain", "restore")


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
        if self.saved is not None and self.saved.base != loaded.fingerprint:
            raise EditorError(
                f"The editor {self.name} was trained for a base with fingerprint "
                f"{self.saved.base[:12]}, the model {loaded.name} has {loaded.fingerprint[:12]}; "
                "train one for this model."
            )
        return self

    def said(self) -> str:
        """Which editor it is, in a line for a person."""
        if self.name == "none":
            why = f", for {self.ruled_out} rule out {self.left}, the editor for this model"
            return f"Editor: none; the model is edited without training{why * bool(self.left)}."
        facts = None if self.saved is None else self.saved.about.get("facts")
        learned = f", trained on {facts:,} facts" if isinstance(facts, int) else ""
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


@dataclass(frozen=True, eq=False)
class ByEditor:
    """An editor as a method; the fields as in :func:`malmend.commands.edit.edit`."""

    choice: Choice
    calibrate: str | Path | None = None
    text: str | Path | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    refine: RefineSettings = RefineSettings()
    processes: Processes = ALONE

    @property
    def name(self) -> str:
        """The editor's aggregation."""
        return self.choice.settings.method

    @property
    def end_of_answer(self) -> EndOfAnswer:
        """As the editor was trained."""
        return self.choice.settings.end_of_answer

    def ready(self, encoder: Encoder, count: int) -> ByEditor:
        """The same for an edit of so many facts, once it is known that the model can be asked so.

        Raises:
            EditorError: it cannot.
        """
        found = replace(self, refine=self.refine.of(encoder.reading.form, count))
        found.check(encoder)
        return found

    def on(self, loaded: LoadedModel) -> ByEditor:
        """The same with the editor that is meant for this model."""
        return replace(self, choice=self.choice.on(loaded))

    def said(self) -> Iterator[str]:
        """By which editor, and what was given that this edit does not read."""
        yield self.choice.said()
        refine, unread = self.refine, dict[str, Sequence[str]]()
        if not self.settles:
            unread["is not settled"] = OF_SETTLING
        if not self.solves_again:
            unread["is solved once"] = OF_SOLVES
        for why, names in unread.items():
            given = [one for one in names if getattr(refine, one) != getattr(RefineSettings, one)]
            if given:
                options = ", ".join(f"--refine.{one.replace('_', '-')}" for one in given)
                yield f"No use is made of {options}: this edit {why}."

    def check(self, encoder: Encoder) -> None:
        """Whether the model can be asked in every frame, and its edit be settled.

        Raises:
            EditorError: it cannot.
        """
        if self.settles and encoder.reading.form != "causal":
            raise EditorError(
                f"rounds is {self.refine.rounds:g}, expected 0 for this model: only a decoder's "
                "edit is settled, for of no other is anything held; leave out --refine.rounds."
            )
        for frame in self.refine.frames_for(encoder):
            framing(encoder, frame)

    @property
    def solves_again(self) -> bool:
        """Whether there may be a later solve."""
        return self.refine.passes != 1 and refinable(self.choice.settings)

    def restores(self, encoder: Encoder) -> bool:
        """Whether a later solve may ask back what the edit moved."""
        wanted = self.solves_again and self.refine.restore > 0
        return wanted and encoder.reading.form == "causal"

    @property
    def settles(self) -> bool:
        """Whether the shift is descended after the solves."""
        return bool(self.refine.rounds) and refinable(self.choice.settings)

    def beside(self, bench: Workbench, facts: Sequence[Fact]) -> int:
        """Bytes that a memory's plan has to leave beside micro-batches and captured tensors."""
        if not self.settles:
            return 0
        lines = self.lines(bench.encoder, facts)[: lines_for(self.refine.steps)]
        return settle.beside(bench.trunk, self.processes.share(lines))

    def within(
        self, bench: Workbench, facts: Sequence[Fact], memory: str | None
    ) -> tuple[Workbench, MemoryPlan | None]:
        """The bench within a memory budget, where there is one, and how that is spent."""
        if memory is None:
            return bench, None
        mine = self.processes.share(facts)
        questions = bench.encoder.encode_all(fact.question for fact in mine)
        work = Work(
            questions,
            self.choice.settings.tokens,
            extra=self.beside(bench, facts),
            also=partial(self.rehearse, bench),
            rows=self.rows(bench, mine, questions),
        )
        return within_memory(bench, memory, work)

    def rows(self, bench: Workbench, facts: Sequence[Fact], questions: Sequence[Encoded]) -> int:
        """How many rows a solve of these facts has at most, whose questions these are."""
        every, again = [*questions], self.solves_again
        for frame in self.refine.frames_for(bench.encoder) if again else ():
            inside = framed(bench.encoder, [fact.question for fact in facts], frame)
            every += [one for one in inside if one]
        rows = rows_of(bench.trunk, every, self.choice.settings.tokens)
        return rows * (1 + self.restores(bench.encoder))  # of which no more ask back than edit

    def rehearse(self, bench: Workbench, questions: Sequence[Encoded]) -> None:
        """What is done with micro-batches of a memory's plan, beside capturing."""
        if self.restores(bench.encoder):
            restore.rehearse(bench.trunk, questions)
        if self.settles:
            settle.rehearse(bench.trunk, questions)

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The layers that the editor edits."""
        return self.choice.settings.sites_in(model)

    def lines(self, encoder: Encoder, facts: Sequence[Fact]) -> Sequence[Encoded]:
        """What is held while the edit settles: questions and text."""
        holds = self.settles and self.refine.hold > 0
        return to_hold(encoder, facts, self.text, more=True) if holds else ()

    def known(
        self, bench: Workbench, facts: Sequence[Fact], progress: Progress
    ) -> Sequence[Encoded]:
        """What the model surely says of others."""
        progress("what the model knows", 0.0)
        with self.processes.first_then_others():  # who find it in the cache
            found = known_facts(bench, facts)
        progress("what the model knows", 1.0)
        return found

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """Calibrates where no editor is trained, then Algorithm 1."""
        start = time.perf_counter()
        with self.processes.first_then_others():  # who find the calibration in the cache
            editor = self.choice.editor(
                bench, self.calibrate, self.text, self.calibration, progress
            )
        if self.processes.count > 1:
            self.processes.check_alike("The editor", editor.checksum())
        encoder, holds = bench.encoder, self.settles and self.refine.hold > 0
        known = self.known(bench, facts, progress) if holds else ()
        once = time.perf_counter() - start
        held = Holding(
            to_hold(encoder, facts, self.text) if self.restores(encoder) else (),
            self.lines(encoder, facts),
            known,
        )
        found = find_by_editor(bench, editor, facts, self.refine, held, progress, self.processes)
        said = {**self.choice.provenance(), **found.said}
        return replace(found, said=said, once=once)


def choose(
    editor: str | Path | Editor, settings: EditorSettings | None = None, own_data: bool = False
) -> Choice:
    """An editor from what a user says.

    Args:
        editor: "auto", "none", an editor's folder, or an editor.
        settings: of an editor without a network; with them "auto" is "none".
        own_data: whether calibration facts, text or settings of calibration were given, which
            make "auto" "none" too.

    Raises:
        MalmendError: settings or data beside an editor that brings its own, no editor there, or a
            method that has to be trained.
    """
    if isinstance(editor, str) and editor in ("auto", "none"):
        free = Choice("none", settings or training_free())
        check_trained(free.settings.method)
        if editor == "none":
            return free
        ruled_out = "the settings given" if settings is not None else ""
        if own_data and not ruled_out:
            ruled_out = "the calibration data or settings given"
        return replace(free, may_ship=not ruled_out, ruled_out=ruled_out)
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
    saved = load_editor(editor)
    return Choice(str(editor), saved.editor.settings, saved)
