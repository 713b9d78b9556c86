"""Editors as a method: Algorithm 1 (capture, transform, aggregate), then further passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from typing import Any

from torch import Tensor

from malmend.editors.editor import Aggregation, Editor
from malmend.editors.refine import RefineSettings, framed, further, missed
from malmend.errors import EditorError
from malmend.facts.encoded import Form, settled
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
        progress: called with stage and share done.
        processes: that the facts are spread over.

    Raises:
        EditorError: a shift holds NaN or infinity, or a frame does not suit the model.
    """
    settings, trunk, form = editor.settings, bench.trunk, bench.encoder.reading.form
    facts = processes.share(facts)
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    refinable = settings.method == "malmen" and settings.descent is not None
    again = refinable and refine.goes_on(bench.encoder, 1, 1.0)
    frames = refine.frames_for(bench.encoder) if again else ()
    others = framed(bench.encoder, [fact.question for fact in facts], frames)
    count = counted(progress, "keys and value gradients", len(questions))
    captured = capture(trunk, questions, settings.tokens, settings.descent, count)
    solved = _Solved.of(editor, captured, editor.aggregate(captured, processes=processes), progress)
    if solved.broken is not None:
        raise EditorError(
            f"The shift of {solved.broken} holds NaN or infinity, so nothing was written; check "
            f"--eta and that the weights of {bench.loaded.name} are whole."
        )
    kept, left = 1, missed(trunk, questions, solved.shifts, processes) if again else 0.0
    while again and refine.goes_on(bench.encoder, kept, left):
        stage = f", pass {kept + 1}"
        count = counted(progress, f"keys and value gradients{stage}", len(questions) + len(others))
        found = further(
            editor, trunk, solved.shifts, questions, others, refine.gain, count, processes
        )
        later = _Solved.of(editor, *found, progress, stage)
        if later.broken or (now_left := missed(trunk, questions, later.shifts, processes)) > left:
            break
        solved, kept, left = later, kept + 1, now_left
    tokens = int(max(processes.total(*[len(pair.keys_NK) for pair in solved.captured])))
    said = {
        **described(editor, form),
        "passes": kept,
        "frames": list(frames) if kept > 1 else [],
        "tokens": tokens,
    }
    said["mean_residual"] = solved.mean_residual(
        [pair.keys_NK for pair in solved.captured], processes
    )
    with shifted(list(trunk.sites), solved.shifts):
        moved = keys_of(trunk, questions, settings.tokens)
    said["residual_after"] = solved.mean_residual(moved, processes)
    return Found(solved.shifts, tokens, said)


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
    """One solve: what it read, what it asked for, and one shift per site."""

    captured: Sequence[Captured]
    aggregations: Sequence[Aggregation]
    shifts: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        editor: Editor,
        captured: Sequence[Captured],
        aggregations: Sequence[Aggregation],
        progress: Progress,
        which: str = "",
    ) -> _Solved:
        """Solves at every site; ``which`` is said after the stage's name."""
        stage = "least squares" if editor.settings.method == "malmen" else "sum of shifts"
        progress(stage + which, 0.0)
        shifts = {name: one.shift() for name, one in zip(editor.names, aggregations, strict=True)}
        progress(stage + which, 1.0)
        return cls(captured, aggregations, shifts)

    @property
    def broken(self) -> str | None:
        """A site whose shift holds NaN or infinity."""
        return next(
            (n for n, shift_VK in self.shifts.items() if not shift_VK.isfinite().all()), None
        )

    def mean_residual(self, keys: Sequence[Tensor], processes: Processes) -> float:
        """MALMEN, section 5.2, over the first tokens, of which these are the keys of each site."""
        sums = []
        for shift_VK, keys_NK, one in zip(
            self.shifts.values(), keys, self.aggregations, strict=True
        ):
            count = len(keys_NK)
            mean = mean_residual(shift_VK, keys_NK, one.diffs_NV[:count]) if count else 0.0
            sums += [mean * count, float(count)]
        totals = processes.total(*sums)
        return sum(map(truediv, totals[::2], totals[1::2])) / len(keys)
