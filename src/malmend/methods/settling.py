"""How an edit settles: what of its facts is read, what is held, and where the work is kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from malmend.editors import draws
from malmend.editors.editor import Editor
from malmend.editors.halfway import Halfway, resumable
from malmend.editors.refine import (
    CHAT,
    ENOUGH,
    IN_CHAT,
    PROMPT,
    SETTLING,
    UNSAID,
    RefineSettings,
    framed,
    missed,
)
from malmend.editors.restore import Held
from malmend.editors.settle import Keeping, settle
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Question
from malmend.methods.solves import Solved
from malmend.models.device import places_of
from malmend.models.source import cached
from malmend.models.trunk import Trunk
from malmend.numerics.prior import Prior
from malmend.patch import versions
from malmend.processes import Processes
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

FULL = sys.maxsize  # no bound of a shift's rank


@dataclass(frozen=True)
class Holding:
    """Questions and text at which a model should say what it says unedited.

    Attributes:
        solves: of the later solves.
        settling: of the descent after them.
        known: what the model surely says of other subjects, of that descent too.
    """

    solves: Sequence[Encoded] = ()
    settling: Sequence[Encoded] = ()
    known: Sequence[Encoded] = ()


@dataclass(frozen=True, eq=False)
class Settling:
    """The descent that follows an edit's solves.

    ``bench`` is cut at the editor's sites, ``whole`` at those that settle beside them too.
    ``frames`` has by frame one question for each of ``questions``, None where it is too long;
    ``worded`` has for each those in other words.
    """

    bench: Workbench
    editor: Editor
    whole: Trunk
    refine: RefineSettings
    questions: Sequence[Encoded]
    frames: Mapping[str, Sequence[Encoded | None]]
    worded: Sequence[Sequence[Question]]
    progress: Progress
    processes: Processes

    def keeping(self, holding: Holding) -> list[Keeping]:
        """What is held while the edit settles: as much as is read a few times."""
        trunk, processes, hold = self.whole, self.processes, self.refine.hold
        lines, found = holding.settling[: draws.lines_for(self.steps)], list[Keeping]()
        parts = ((lines, draws.HELD_EACH), (holding.known, draws.KNOWN_EACH))
        for number, (questions, each) in enumerate(parts):
            self.progress("what should stay as it is", number / len(parts))
            if questions:
                found.append(Keeping(Held.of_all(trunk, questions, processes), each, hold))
        self.progress("what should stay as it is", 1.0)
        return found

    @cached_property
    def readings(self) -> list[list[Encoded]]:
        """Of each fact every way in which it is read while the edit settles, the prompt first.

        That in chat is there :data:`IN_CHAT` times.
        """
        in_chat = [self.frames[CHAT]] * (IN_CHAT - 1) if CHAT in self.frames else []
        asked = zip(self.questions, *self.frames.values(), *in_chat, strict=True)
        otherwise = [framed(self.bench.encoder, ones, PROMPT) for ones in self.worded]
        return [
            [one for one in (*ones, *others) if one]
            for ones, others in zip(asked, otherwise, strict=True)
        ]

    @cached_property
    def count(self) -> int:
        """Of the readings of all processes."""
        return int(self.processes.total(sum(map(len, self.readings)))[0])

    @cached_property
    def steps(self) -> int:
        """Of settling."""
        return draws.steps_for(self.count, self.refine.rounds or 0, self.refine.steps)

    def halfway(
        self, priors: Mapping[str, Prior], keeping: Sequence[Keeping], held: Held | None = None
    ) -> Halfway:
        """Where settling is kept: by all that the solves and it depend on.

        Not by what the solves found, which an accelerator rounds otherwise each time.
        """
        loaded, editor = self.bench.loaded, self.editor
        of_model = (loaded.digest, loaded.dtype, places_of(loaded.model), versions())
        refine = replace(self.refine, steps=self.steps)  # a bound that does not bind is none
        solves = (editor.checksum(), editor.settings, refine, UNSAID, SETTLING)
        kept = [(one.held.questions, one.each, one.weight) for one in keeping]
        read = (self.readings, () if held is None else held.questions, kept)
        metric = [(site.name, priors[site.name]) for site in self.whole.sites]
        numbers = [(name, prior.ridge, prior.weights) for name, prior in metric]
        # Those of its own sites the editor's checksum has.
        moments = (one for n, prior in metric if n not in editor.names for one in prior.matrices_KK)
        parts = (of_model, solves, read, numbers, *moments)
        return Halfway.of(cached("settling"), parts, self.processes)

    def settled(
        self,
        solved: Solved,
        priors: Mapping[str, Prior],
        keeping: Sequence[Keeping],
        held: Held | None = None,
    ) -> tuple[Solved | None, Path]:
        """Equation (29) from a solve on, in the metric of these priors; it ``held`` these, if any.

        What was found, None where the plain prompts would miss more by it, and the file that has it
        until it is written.
        """
        halfway = self.halfway(priors, keeping, held)
        with resumable(halfway.path):
            shifts = settle(
                self.whole,
                priors,
                solved.shifts,
                self.readings,
                self.steps,
                keeping,
                progress=counting(self.progress, "settling", self.steps),
                processes=self.processes,
                halfway=halfway,
            )
            found = replace(solved, shifts=shifts, rank=FULL)
            if found.broken:
                return None, halfway.path
            before, after = (
                missed(self.whole.at(one.shifts), self.questions, one.shifts, self.processes)
                for one in (solved, found)
            )
        return (found if after <= max(before, ENOUGH) else None), halfway.path
