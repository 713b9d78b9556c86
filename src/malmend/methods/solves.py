"""The solves of an edit by an editor: shifts by site, and how far they miss what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from malmend.editors.aggregation import Aggregation
from malmend.editors.editor import Editor
from malmend.models.capture import Captured
from malmend.numerics.ridge import residuals
from malmend.processes import Processes
from malmend.progress import Progress


@dataclass(frozen=True, eq=False)
class Solved:
    """What stays of a solve: a shift per site, and what it asked of the plain prompts' tokens.

    ``tokens`` counts all that it was solved for, in every frame; no shift has a higher ``rank``.
    """

    shifts: dict[str, Tensor]
    diffs: list[Tensor]
    tokens: int
    mean_residual: float
    rank: int

    @property
    def broken(self) -> str | None:
        """A site whose shift holds NaN or infinity."""
        return next(
            (n for n, shift_VK in self.shifts.items() if not shift_VK.isfinite().all()), None
        )


class Solves:
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
        self._device = editor.device
        self._stage = "least squares" if editor.settings.method == "malmen" else "sum of shifts"
        self._processes = processes

    def solve(
        self, captured: Sequence[Captured], aggregations: Sequence[Aggregation], which: str = ""
    ) -> Solved:
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
        return Solved(shifts, diffs, tokens, residual, tokens)

    def mean_residual(
        self, shifts: dict[str, Tensor], keys: Sequence[Tensor], diffs: Sequence[Tensor]
    ) -> float:
        """MALMEN, section 5.2, over the plain prompts' tokens of all processes."""
        sums = list[float]()
        for shift_VK, keys_NK, diffs_NV, count in zip(
            shifts.values(), keys, diffs, self._rows, strict=True
        ):
            sums += residuals(shift_VK.to(self._device), keys_NK[:count], diffs_NV)
        totals = self._processes.total(*sums)
        means = (total / max(count, 1.0) for total, count in zip(*[iter(totals)] * 2, strict=True))
        return sum(means) / len(keys)
