"""Editors as a method: Algorithm 1 (capture, transform, aggregate), then further passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from typing import Any

from torch import Tensor

from malmend.editors.editor import Aggregation, Editor
from malmend.editors.refine import CHAT, ENOUGH, RefineSettings, framed, further, missed
from malmend.editors.restore import Held
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded, Form, settled
from malmend.facts.fact import Fact
from malmend.methods.method import Found
from malmend.models.capture import Captured, capture, keys_of
from malmend.numerics.ridge import mean_residual
from malmend.patch import shifted
from malmend.processes import ALONE, Processes
from malmend.progress import Progress, counted, silent
from malmend.workbench import Workbench


def find_by_editor(
    bench: Workbench,
    editor: Editor,
    facts: Sequence[Fact],
    refine: RefineSettings = RefineSettings(),
    to_hold: Sequence[Encoded] = (),
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Found:
    """Algorithm 1: capture, transform, aggregate; then the further passes of equation (18).

    Of ``processes`` each captures its share of the facts; all find the same shifts.

    Args:
        bench: the model.
        editor: with everything it needs.
        facts: to be edited.
        refine: further passes.
        to_hold: questions and text at which the model should say what it says unedited.
        progress: called with stage and share done.
        processes: that the facts are spread over.

    Raises:
        EditorError: a shift holds NaN or infinity, or a frame does not suit the model.
    """
    settings, trunk, form = editor.settings, bench.trunk, bench.encoder.reading.form
    facts = processes.share(facts)
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    again = refinable(settings) and refine.goes_on(bench.encoder, 1, 1.0)
    others = _in_frames(bench, facts, refine, processes) if again else {}
    held = None
    if again and to_hold:
        progress("what should stay as it is", 0.0)
        edited = processes.total(sum(len(one.sources) for one in questions))[0]
        held = Held.of(trunk, to_hold, int(edited), processes)
        progress("what should stay as it is", 1.0)
    count = counted(progress, "keys and value gradients", len(questions))
    captured = capture(trunk, questions, settings.tokens, settings.descent, count)
    solves = _Solves(editor, [len(pair.keys_NK) for pair in captured], progress, processes)
    solved = solves.solve(captured, editor.aggregate(captured, processes=processes))
    del captured
    if solved.broken is not None:
        raise EditorError(
            f"The shift of {solved.broken} holds NaN or infinity, so nothing was written; check "
            f"--eta and that the weights of {bench.loaded.name} are whole."
        )

    def missed_by(one: _Solved) -> tuple[float, float]:
        """Of the plain prompts' tokens, and of theirs or of those in chat if these are worse."""
        plain = missed(trunk, questions, one.shifts, processes)
        spoken = others.get(CHAT)
        in_chat = 0.0 if spoken is None else missed(trunk, spoken, one.shifts, processes)
        return plain, max(plain, in_chat)

    latest, done, kept = solved, 1, 1
    least, worst = missed_by(solved) if again else (0.0, 0.0)
    count_all = len(questions) + sum(map(len, others.values()))
    count_all += len(held.questions) if held else 0
    while again and refine.goes_on(bench.encoder, done, worst):
        stage, done = f", pass {done + 1}", done + 1
        count = counted(progress, f"keys and value gradients{stage}", count_all)
        latest = solves.solve(
            *further(
                editor, trunk, latest.shifts, questions, others, refine, held, count, processes
            ),
            stage,
        )
        if latest.broken:
            break
        plain, worst = missed_by(latest)
        if plain <= max(least, ENOUGH):
            solved, kept = latest, done
        least = min(least, plain)
    with shifted(list(trunk.sites), solved.shifts):
        moved = keys_of(trunk, questions, settings.tokens)
    said = {
        **described(editor, form),
        "passes": kept,
        "frames": list(others) if kept > 1 else [],
        "gain": refine.gain,
        "chat_gain": refine.chat_gain,
        "restore": refine.restore if held and kept > 1 else 0.0,
        "tokens": solved.tokens,
        "mean_residual": solved.mean_residual,
        "residual_after": solves.mean_residual(solved.shifts, moved, solved.diffs),
    }
    return Found(solved.shifts, solved.tokens, said)


def _in_frames(
    bench: Workbench, facts: Sequence[Fact], refine: RefineSettings, processes: Processes
) -> dict[str, list[Encoded]]:
    """The edits in each frame of the later solves; not a frame that every fact is too long for."""
    asked, found = [fact.question for fact in facts], {}
    for frame in refine.frames_for(bench.encoder):
        inside = framed(bench.encoder, asked, frame)
        if processes.total(len(inside))[0]:
            found[frame] = inside
    return found


def refinable(settings: EditorSettings) -> bool:
    """Whether an editor solves more than once: no sum does, nor who asks for plain gradients."""
    return settings.method == "malmen" and settings.descent is not None


def described(editor: Editor, form: Form) -> dict[str, Any]:
    """What a patch's header says of the editor itself: settings and learned numbers."""
    settings = editor.settings
    return {
        "settings": {**asdict(settings), "tokens": settled(settings.tokens, form)},
        "eta": editor.log_eta_S.exp().tolist(),
        "prior": {
            term: editor.log_weights_SP[:, index].exp().tolist()
            for index, term in enumerate(editor.terms)
        },
        "lambda": editor.log_ridge_S.exp().tolist(),
        "end_weight": editor.log_end_weight_S.exp().tolist(),
    }


@dataclass(frozen=True, eq=False)
class _Solved:
    """What stays of a solve: a shift per site, and what it asked of the plain prompts' tokens.

    ``tokens`` counts all that it was solved for, in every frame: no shift has a higher rank.
    """

    shifts: dict[str, Tensor]
    diffs: list[Tensor]
    tokens: int
    mean_residual: float

    @property
    def broken(self) -> str | None:
        """A site whose shift holds NaN or infinity."""
        return next(
            (n for n, shift_VK in self.shifts.items() if not shift_VK.isfinite().all()), None
        )


class _Solves:
    """Solves one after another; what one captured is let go with it.

    Args:
        editor: whose sites these are.
        rows: of this process, the tokens of the plain prompts at each site, which come first.
        progress: called with stage and share done.
        processes: that the facts are spread over.
    """

    def __init__(
        self, editor: Editor, rows: Sequence[int], progress: Progress, processes: Processes
    ):
        self._rows, self._names, self._progress = rows, editor.names, progress
        self._stage = "least squares" if editor.settings.method == "malmen" else "sum of shifts"
        self._processes = processes
        self.tokens = int(max(processes.total(*rows)))  # of the plain prompts

    def solve(
        self, captured: Sequence[Captured], aggregations: Sequence[Aggregation], which: str = ""
    ) -> _Solved:
        """Solves at every site; ``which`` is said after the stage's name."""
        self._progress(self._stage + which, 0.0)
        shifts = {name: one.shift() for name, one in zip(self._names, aggregations, strict=True)}
        diffs = []
        for count, pair, one in zip(self._rows, captured, aggregations, strict=True):
            kept_NV = pair.room.empty(count, one.diffs_NV.shape[1], dtype=one.diffs_NV.dtype)
            diffs.append(kept_NV.copy_(one.diffs_NV[:count]))
        residual = self.mean_residual(shifts, [pair.keys_NK for pair in captured], diffs)
        self._progress(self._stage + which, 1.0)
        tokens = int(max(self._processes.total(*[len(pair.keys_NK) for pair in captured])))
        return _Solved(shifts, diffs, tokens, residual)

    def mean_residual(
        self, shifts: dict[str, Tensor], keys: Sequence[Tensor], diffs: Sequence[Tensor]
    ) -> float:
        """MALMEN, section 5.2, over the plain prompts' tokens of all processes."""
        sums = []
        for shift_VK, keys_NK, diffs_NV, count in zip(
            shifts.values(), keys, diffs, self._rows, strict=True
        ):
            sums += [mean_residual(shift_VK, keys_NK[:count], diffs_NV) * count, float(count)]
        totals = self._processes.total(*sums)
        return sum(map(truediv, totals[::2], totals[1::2])) / len(keys)
