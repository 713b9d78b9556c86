"""An edit by an editor: Algorithm 1 (capture, transform, aggregate), then solves or settling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from malmend.editors.around import Around
from malmend.editors.editor import Editor
from malmend.editors.refine import (
    CHAT,
    ENOUGH,
    RefineSettings,
    framed,
    further,
    missed,
)
from malmend.editors.restore import Held
from malmend.editors.settings import EditorSettings
from malmend.editors.wordings import in_other_words
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded, Form, resolved
from malmend.facts.fact import Fact
from malmend.methods.method import Found
from malmend.methods.settling import Holding, Settling
from malmend.methods.solves import Solved, Solves
from malmend.models.capture import capture, keys_of, token_counts
from malmend.numerics.prior import Prior
from malmend.patch import shifted
from malmend.processes import ALONE, Processes
from malmend.progress import Progress, counting, silent
from malmend.workbench import Workbench


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
    reads_frames = again or settles or refine.frames_at_once
    frames = _in_frames(bench, facts, refine, processes) if reads_frames else {}
    worded = processes.share(in_other_words(everything, refine.wordings)) if settles else ()
    work = _Work(bench, editor, refine, questions, frames, progress, processes)
    settling = Settling(
        bench, editor, whole, refine, questions, frames, worded, progress, processes
    )
    held = work.held(holding) if holding and again else None
    keeping = settling.keeping(holding) if holding and settles else []
    first = work.first
    count = counting(progress, "keys and value gradients", len(first))
    captured = capture(trunk, first, settings.tokens, settings.descent, count)
    solves = Solves(editor, work.plain_rows, progress, processes)
    solved = solves.solve(captured, editor.aggregate(captured, processes=processes))
    del captured
    if solved.broken is not None:
        raise EditorError(
            f"The shift of {solved.broken} holds NaN or infinity, so nothing was written; check "
            f"--eta and that the weights of {bench.loaded.name} are whole."
        )
    solved, kept = work.solved_again(solves, solved, held) if again else (solved, 1)
    settled_one = left = None
    if settles:
        settled_one, left = settling.settled(solved, work.priors(around), keeping, held)
    final = settled_one or solved
    with shifted(whole.at(final.shifts).sites, final.shifts):
        moved = keys_of(trunk, questions, settings.tokens)
    said = {
        **described(editor, form),
        **work.said(kept, bool(held), settled_one is not None, bool(keeping)),
        "around": settled_one is not None and around is not None,
        "steps": settling.steps if settles else 0,
        "readings": settling.count if settles else 0,
        "tokens": solved.tokens,
        "mean_residual": solved.mean_residual,
        "residual_after": solves.mean_residual(
            {name: final.shifts[name] for name in editor.names}, moved, solved.diffs
        ),
    }
    return Found(final.shifts, final.rank, said, leftover=left)


@dataclass(frozen=True, eq=False)
class _Work:
    """The solves that follow an edit's first, of the facts in every frame.

    ``frames`` has by frame one question for each of ``questions``, None where it is too long.
    """

    bench: Workbench
    editor: Editor
    refine: RefineSettings
    questions: Sequence[Encoded]
    frames: Mapping[str, Sequence[Encoded | None]]
    progress: Progress
    processes: Processes

    def said(self, kept: int, restores: bool, settled: bool, holds: bool) -> dict[str, Any]:
        """Of the settings what became of the patch, of which solve ``kept`` stayed."""
        refine = self.refine
        return {
            "passes": kept,
            "frames": list(self.frames) if kept > 1 or settled or refine.frames_at_once else [],
            "gain": refine.gain,
            "chat_gain": refine.chat_gain,
            "restore": refine.restore if restores and kept > 1 else 0.0,
            "rounds": refine.rounds if settled else 0.0,
            "wordings": refine.wordings if settled else 0,
            "hold": refine.hold if holds and settled else 0.0,
        }

    @property
    def first(self) -> list[Encoded]:
        """What the first solve is of: the plain prompts, and all frames if no other solve is."""
        framed = map(self.inside, self.frames if self.refine.frames_at_once else ())
        return [*self.questions, *chain.from_iterable(framed)]

    @property
    def plain_rows(self) -> list[int]:
        """How many tokens of the plain prompts each site has; of this process."""
        tokens, sites = self.editor.settings.tokens, self.bench.trunk.sites
        return [sum(token_counts(self.questions, tokens, site.in_encoder)) for site in sites]

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
            count = counting(self.progress, f"keys and value gradients{stage}", count_all)
            again = further(
                self.editor,
                self.bench.trunk,
                latest.shifts,
                self.questions,
                others,
                self.refine,
                held=held,
                progress=count,
                processes=self.processes,
            )
            latest = solves.solve(*again, stage)
            del again  # what it captured
            if latest.broken:
                break
            plain, worst = self.missed_by(latest)
            if plain <= max(least, ENOUGH):
                solved, kept = latest, done
            least = min(least, plain)
        return solved, kept

    def priors(self, around: Around | None) -> dict[str, Prior]:
        """Of every site that settles, those ``around`` the editor's own too."""
        counts = token_counts(self.questions, self.editor.settings.tokens, False)
        tokens = int(self.processes.total(sum(counts))[0])
        names, device = self.editor.names, self.editor.device
        found = {name: self.editor.prior(site, tokens) for site, name in enumerate(names)}
        if around is not None:
            for name in around.moments:
                found[name] = around.prior(name, tokens, device)
        return found


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
        "powers": {
            term: editor.powers_SP[:, index].tolist() for index, term in enumerate(editor.terms)
        },
        "lambda": editor.log_ridge_S.exp().tolist(),
        "end_weight": editor.log_end_weight_S.exp().tolist(),
    }
