"""An editor as a method: what it edits, holds and settles, and what it needs for that."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from malmend.editors import restore, settle
from malmend.editors.around import Around
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.draws import lines_for
from malmend.editors.refine import RefineSettings, framed, framing
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.known import known_facts
from malmend.material import around_sites, to_hold
from malmend.methods.by_editor import find_by_editor, refinable
from malmend.methods.editor_choice import Choice
from malmend.methods.method import Found
from malmend.methods.settling import Holding
from malmend.models.budget import MemoryPlan, Work, plan_memory, rows_of
from malmend.models.load import LoadedModel
from malmend.models.sites import Site, around
from malmend.processes import ALONE, Processes
from malmend.progress import Progress
from malmend.workbench import Workbench

# Fields of RefineSettings that settling alone reads, and that later solves alone do.
OF_SETTLING = ("steps", "wordings", "hold", "around")
OF_SOLVES = ("gain", "chat_gain", "restore")
NOTHING = {"passes": (1,), "rounds": (0,), "frames": ((),)}  # asked for of any edit


@dataclass(frozen=True, eq=False)
class ByEditor:
    """An editor as a method; the fields as in :func:`malmend.commands.edit.edit`.

    ``asked`` is ``refine`` as it was given, once nulls of it have become numbers.
    """

    choice: Choice
    calibrate: str | Path | None = None
    text: str | Path | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    refine: RefineSettings = RefineSettings()
    processes: Processes = ALONE
    asked: RefineSettings | None = None

    @property
    def method(self) -> ByEditor:
        """Itself."""
        return self

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
        refine = self.refine.of(encoder.reading.form, count)
        found = replace(self, refine=refine, asked=self.refine)
        found.check(encoder)
        return found

    def on(self, loaded: LoadedModel) -> ByEditor:
        """The same with the editor that is meant for this model."""
        return replace(self, choice=self.choice.on(loaded))

    def said(self) -> Iterator[str]:
        """By which editor, and what was given that this edit does not read."""
        yield self.choice.said()
        unread = dict[str, Sequence[str]]()
        if not refinable(self.choice.settings):
            sums = "sums shifts or takes plain gradients, which is done once"
            unread[sums] = ("passes", "rounds")
        if not self.settles:
            unread["is not settled"] = OF_SETTLING
        if not self.solves_again:
            unread["is solved once"] = OF_SOLVES
        if not self.reads_frames:
            unread["is solved once and not settled"] = ("frames",)
        for why, names in unread.items():
            if given := [one for one in names if self._is_asked(one)]:
                options = ", ".join(f"--refine.{one.replace('_', '-')}" for one in given)
                yield f"No use is made of {options}: this edit {why}."

    def _is_asked(self, name: str) -> bool:
        """Whether a field was given, and asks for what is not done anyway."""
        given = getattr(self.asked or self.refine, name)
        return given not in (getattr(RefineSettings, name), *NOTHING.get(name, ()))

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

    @property
    def reads_frames(self) -> bool:
        """Whether a fact is read in frames."""
        return self.settles or self.solves_again or self.refine.frames_at_once

    def restores(self, encoder: Encoder) -> bool:
        """Whether a later solve may ask back what the edit moved."""
        wanted = self.solves_again and self.refine.restore > 0
        return wanted and encoder.reading.form == "causal"

    @property
    def settles(self) -> bool:
        """Whether the shift is descended after the solves."""
        return bool(self.refine.rounds) and refinable(self.choice.settings)

    @property
    def settles_around(self) -> bool:
        """Whether layers beside the editor's own are descended too."""
        return self.settles and self.refine.around and self.choice.settings.sites is None

    def settling_bytes(self, bench: Workbench, facts: Sequence[Fact]) -> int:
        """Bytes that a memory's plan has to leave beside micro-batches and captured tensors."""
        if not self.settles:
            return 0
        lines = self.lines(bench.encoder, facts)[: lines_for(self.refine.steps)]
        return settle.settling_bytes(bench.trunk, self.processes.share(lines))

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
            extra=self.settling_bytes(bench, facts),
            also=partial(self.rehearse, bench),
            rows=self.rows(bench, mine, questions),
        )
        plan = plan_memory(self.own(bench).trunk, memory, work)
        return bench.within(plan), plan

    def rows(self, bench: Workbench, facts: Sequence[Fact], questions: Sequence[Encoded]) -> int:
        """How many rows a solve of these facts has at most, whose questions these are."""
        every, solved = [*questions], self.solves_again or self.refine.frames_at_once
        for frame in self.refine.frames_for(bench.encoder) if solved else ():
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
        """The layers that the editor edits, and those that settle beside them."""
        sites = self.choice.settings.sites_in(model)
        return around(model, sites) if self.settles_around else sites

    def own(self, bench: Workbench) -> Workbench:
        """The bench with the editor's own layers alone."""
        if not self.settles_around:
            return bench
        own = {site.name for site in self.choice.settings.sites_in(bench.trunk.model)}
        return replace(bench, trunk=bench.trunk.at(own))

    def beside_own(self, bench: Workbench, progress: Progress) -> Around | None:
        """What is known of the layers that settle beside the editor's own."""
        own = {site.name for site in self.own(bench).trunk.sites}
        others = {site.name for site in bench.trunk.sites} - own
        if not others:
            return None
        beside = replace(bench, trunk=bench.trunk.at(others))
        given = (self.choice.settings, self.calibrate, self.text, self.calibration, progress)
        return around_sites(beside, *given)

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
                self.own(bench), self.calibrate, self.text, self.calibration, progress
            )
            beside = self.beside_own(bench, progress)
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
        given = (self.refine, held, beside, progress, self.processes)
        found = find_by_editor(bench, editor, facts, *given)
        said = {**self.choice.provenance(), **found.said}
        if self.choice.is_calibrated_here and self.text is None:
            said["text_tokens"] = self.calibration.text_tokens
        return replace(found, said=said, once=once)
