"""Editors as a method: Algorithm 1 (capture, transform, aggregate), then further passes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from malmend.editors import draws
from malmend.editors.around import Around
from malmend.editors.borrowing import Borrowing
from malmend.editors.editor import Editor
from malmend.editors.halfway import KIND, Halfway, resumable
from malmend.editors.refine import (
    CHAT,
    ENOUGH,
    IN_CHAT,
    PROMPT,
    RefineSettings,
    framed,
    further,
    missed,
)
from malmend.editors.restore import Held
from malmend.editors.settings import EditorSettings
from malmend.editors.settle import KNOWN, NUMBERS, Keeping, settle
from malmend.editors.wordings import in_other_words
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded, Form, resolved
from malmend.facts.fact import Fact, Question
from malmend.methods.method import Found
from malmend.methods.solves import Solved, Solves
from malmend.models.capture import capture, keys_of, token_counts
from malmend.models.source import cache_folder
from malmend.models.trunk import Trunk
from malmend.numerics.prior import Prior
from malmend.patch import shifted
from malmend.processes import ALONE, Processes
from malmend.progress import Progress, counted, silent
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


def find_by_editor(
    bench: Workbench,
    editor: Editor,
    facts: Sequence[Fact],
    refine: RefineSettings = RefineSettings(),
    holding: Holding | None = None,
    around: Around | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Found:
    """Algorithm 1: capture, transform, aggregate; then the further passes of equation (18).

    Of ``processes`` each captures its share of the facts; all find the same shifts.

    Args:
        bench: the model, cut at the editor's sites and those that settle beside them.
        editor: with everything it needs.
        facts: to be edited.
        refine: further passes; as :meth:`RefineSettings.of` gives it, or nothing settles.
        holding: where the model should say what it says unedited; None for nowhere.
        around: what is known of the sites that are not the editor's; None where there are none.
        progress: called with stage and share done.
        processes: that the facts are spread over.

    Raises:
        EditorError: a shift holds NaN or infinity, or a frame does not suit the model.
    """
    settings, form, whole = editor.settings, bench.encoder.reading.form, bench.trunk
    bench = replace(bench, trunk=whole.at(editor.names))
    trunk = bench.trunk
    everything, facts = facts, processes.share(facts)
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    again = refinable(settings) and refine.goes_on(bench.encoder, 1, 1.0)
    settles = refinable(settings) and bool(refine.rounds)
    frames = _in_frames(bench, facts, refine, processes) if again or settles else {}
    worded = in_other_words(facts, refine.wordings, Borrowing(everything)) if settles else ()
    work = _Work(
        bench, whole, around, editor, refine, questions, frames, worded, progress, processes
    )
    held = work.held(holding) if holding and again else None
    keeping = work.keeping(holding) if holding and settles else []
    count = counted(progress, "keys and value gradients", len(questions))
    captured = capture(trunk, questions, settings.tokens, settings.descent, count)
    solves = Solves(editor, [len(pair.keys_NK) for pair in captured], progress, processes)
    solved = solves.solve(captured, editor.aggregate(captured, processes=processes))
    del captured
    if solved.broken is not None:
        raise EditorError(
            f"The shift of {solved.broken} holds NaN or infinity, so nothing was written; check "
            f"--eta and that the weights of {bench.loaded.name} are whole."
        )
    solved, kept = work.solved_again(solves, solved, held) if again else (solved, 1)
    settled_one, left = work.settled(solved, keeping) if settles else (None, None)
    final = settled_one or solved
    with shifted(whole.at(final.shifts).sites, final.shifts):
        moved = keys_of(trunk, questions, settings.tokens)
    said = {
        **described(editor, form),
        **work.said(kept, bool(held), settled_one is not None, bool(keeping)),
        "steps": work.steps if settles else 0,
        "readings": work.count if settles else 0,
        "tokens": solved.tokens,
        "mean_residual": solved.mean_residual,
        "residual_after": solves.mean_residual(
            {name: final.shifts[name] for name in editor.names}, moved, solved.diffs
        ),
    }
    return Found(final.shifts, final.rank, said, leftover=left)


@dataclass(frozen=True, eq=False)
class _Work:
    """An edit in the making: the facts in every frame, and what follows the first solve.

    ``bench`` is cut at the editor's sites, ``whole`` at those that settle beside them too.
    ``frames`` has by frame one question for each of ``questions``, None where it is too long;
    ``worded`` has for each those in other words.
    """

    bench: Workbench
    whole: Trunk
    around: Around | None
    editor: Editor
    refine: RefineSettings
    questions: Sequence[Encoded]
    frames: Mapping[str, Sequence[Encoded | None]]
    worded: Sequence[Sequence[Question]]
    progress: Progress
    processes: Processes

    def said(self, kept: int, restores: bool, settled: bool, holds: bool) -> dict[str, Any]:
        """Of the settings what became of the patch, of which solve ``kept`` stayed."""
        refine = self.refine
        return {
            "passes": kept,
            "frames": list(self.frames) if kept > 1 or settled else [],
            "gain": refine.gain,
            "chat_gain": refine.chat_gain,
            "restore": refine.restore if restores and kept > 1 else 0.0,
            "rounds": refine.rounds if settled else 0.0,
            "wordings": refine.wordings if settled else 0,
            "hold": refine.hold if holds and settled else 0.0,
            "around": settled and self.around is not None,
        }

    def inside(self, frame: str) -> list[Encoded]:
        """The questions in a frame that fit."""
        return [one for one in self.frames.get(frame, ()) if one]

    def held(self, holding: Holding) -> Held | None:
        """What later solves hold."""
        if not holding.solves:
            return None
        self.progress("what should stay as it is", 0.0)
        edited = self.processes.total(sum(len(one.sources) for one in self.questions))[0]
        found = Held.of(self.bench.trunk, holding.solves, int(edited), self.processes)
        self.progress("what should stay as it is", 1.0)
        return found

    def keeping(self, holding: Holding) -> list[Keeping]:
        """What is held while the edit settles: as much as is read a few times."""
        trunk, processes, hold = self.whole, self.processes, self.refine.hold
        lines, found = holding.settling[: draws.lines_for(self.steps)], list[Keeping]()
        parts = ((lines, draws.HELD, hold), (holding.known, draws.FEW_KNOWN, KNOWN * hold))
        for number, (questions, each, weight) in enumerate(parts):
            self.progress("what should stay as it is", number / len(parts))
            if questions:
                found.append(Keeping(Held.of_all(trunk, questions, processes), each, weight))
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

    def missed_by(self, one: Solved) -> tuple[float, float]:
        """Of the plain prompts' tokens, and of theirs or of those in chat if these are worse."""
        trunk, processes = self.bench.trunk, self.processes
        plain = missed(trunk, self.questions, one.shifts, processes)
        if CHAT not in self.frames:
            return plain, plain
        return plain, max(plain, missed(trunk, self.inside(CHAT), one.shifts, processes))

    def solved_again(self, solves: Solves, first: Solved, held: Held | None) -> tuple[Solved, int]:
        """The last solve that misses no more than the best before it, and which it is."""
        encoder, others = self.bench.encoder, {frame: self.inside(frame) for frame in self.frames}
        solved = latest = first
        done = kept = 1
        least, worst = self.missed_by(first)
        count_all = len(self.questions) + sum(map(len, others.values()))
        count_all += len(held.questions) if held else 0
        while self.refine.goes_on(encoder, done, worst):
            stage, done = f", pass {done + 1}", done + 1
            count = counted(self.progress, f"keys and value gradients{stage}", count_all)
            asked = (self.questions, others, self.refine, held, count, self.processes)
            latest = solves.solve(
                *further(self.editor, self.bench.trunk, latest.shifts, *asked), stage
            )
            if latest.broken:
                break
            plain, worst = self.missed_by(latest)
            if plain <= max(least, ENOUGH):
                solved, kept = latest, done
            least = min(least, plain)
        return solved, kept

    def priors(self) -> dict[str, Prior]:
        """Of every site that settles."""
        counts = token_counts(self.questions, self.editor.settings.tokens, False)
        tokens = int(self.processes.total(sum(counts))[0])
        names, device = self.editor.names, self.editor.device
        found = {name: self.editor.prior(site, tokens) for site, name in enumerate(names)}
        if self.around is not None:
            for name in self.around.moments:
                found[name] = self.around.prior(name, tokens, device)
        return found

    def halfway(
        self,
        shifts: Mapping[str, Tensor],
        keeping: Sequence[Keeping],
    ) -> Halfway:
        """Where settling is kept: of the model, where it starts, what it reads, and its numbers."""
        kept = [(one.held.questions, one.each, one.weight) for one in keeping]
        sites = [site.name for site in self.whole.sites]
        said = (self.bench.loaded.digest, self.readings, kept, self.steps, NUMBERS, *sites)
        return Halfway.of(cache_folder() / KIND, (*said, *shifts.values()), self.processes)

    def settled(self, solved: Solved, keeping: Sequence[Keeping]) -> tuple[Solved | None, Path]:
        """Equation (29) from a solve on, of the facts and their other wordings.

        What was found, None where the plain prompts would miss more by it, and the file that has it
        until it is written.
        """
        count = counted(self.progress, "settling", self.steps)
        halfway = self.halfway(solved.shifts, keeping)
        asked = (self.readings, self.steps, keeping, count, self.processes, halfway)
        with resumable(halfway.path):
            shifts = settle(self.whole, self.priors(), solved.shifts, *asked)
            found = replace(solved, shifts=shifts, rank=FULL)
            if found.broken:
                return None, halfway.path
            before, after = (
                missed(self.whole.at(one.shifts), self.questions, one.shifts, self.processes)
                for one in (solved, found)
            )
        return (found if after <= max(before, ENOUGH) else None), halfway.path


def _in_frames(
    bench: Workbench, facts: Sequence[Fact], refine: RefineSettings, processes: Processes
) -> dict[str, list[Encoded | None]]:
    """The edits in each frame of the later solves; not a frame that every fact is too long for."""
    asked, found = [fact.question for fact in facts], dict[str, list[Encoded | None]]()
    for frame in refine.frames_for(bench.encoder):
        inside = framed(bench.encoder, asked, frame)
        if processes.total(sum(one is not None for one in inside))[0]:
            found[frame] = inside
    return found


def refinable(settings: EditorSettings) -> bool:
    """Whether an editor solves more than once: no sum does, nor who asks for plain gradients."""
    return settings.method == "malmen" and settings.descent is not None


def described(editor: Editor, form: Form) -> dict[str, Any]:
    """What a patch's header says of the editor itself: settings and learned numbers."""
    settings = editor.settings
    return {
        "settings": {**asdict(settings), "tokens": resolved(settings.tokens, form)},
        "eta": editor.log_eta_S.exp().tolist(),
        "prior": {
            term: editor.log_weights_SP[:, index].exp().tolist()
            for index, term in enumerate(editor.terms)
        },
        "lambda": editor.log_ridge_S.exp().tolist(),
        "end_weight": editor.log_end_weight_S.exp().tolist(),
    }
