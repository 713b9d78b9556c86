"""Least squares without a prior (MALMEN, Table 1), for plans.

Use it by ``class: "benchmarks.unregularised:Unregularised"``, from the repository's root. With
fewer tokens than a key is wide, U U^T is singular. ``primal`` solves it nevertheless, by LU in
float32 as the published code does; ``dual`` is the minimum-norm solution, by singular values in
float64. Both ask each value for the same move, -eta g (12).

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.errors import EditorError
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.methods.method import Found
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.sites import Site, find_sites
from malmend.progress import Progress
from malmend.workbench import Workbench


@dataclass(frozen=True)
class Unregularised:
    """S = D U^T (U U^T)^-1, or the S of least norm with S U = D.

    Attributes:
        form: "primal" or "dual".
        eta: of the move.
        layers: edit the second feed-forward layers of this many last blocks.
        name: as tables call it.
        end_of_answer: what is trained after an answer.
    """

    form: Literal["primal", "dual"] = "dual"
    eta: float = 1.8
    layers: int = 6
    name: str = "unregularised"
    end_of_answer: EndOfAnswer = "eos"

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The layers that are edited."""
        return find_sites(model, self.layers)

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """One solve."""
        questions = bench.encoder.encode_all(fact.question for fact in facts)
        pairs = capture(bench.trunk, questions, "answer", Descent())
        shifts = {}
        for site, pair in zip(bench.trunk.sites, pairs, strict=True):
            diffs_NV = -self.eta * pair.value_grads_NV
            shift_VK = (primal if self.form == "primal" else dual)(pair.keys_NK, diffs_NV)
            if not shift_VK.isfinite().all():
                raise EditorError(f"The shift of {site.name} is not finite.")
            shifts[site.name] = shift_VK
        return Found(shifts, rank=len(pairs[0].keys_NK))


def primal(keys_NK: Tensor, diffs_NV: Tensor) -> Tensor:
    """As published, with lambda 0; where LU meets a zero pivot it is lifted by one rounding."""
    gram_KK = keys_NK.T @ keys_NK
    try:
        return torch.linalg.solve(gram_KK, keys_NK.T @ diffs_NV).T.double()
    except torch.linalg.LinAlgError:
        least = torch.finfo(gram_KK.dtype).eps * gram_KK.diagonal().max()
        gram_KK.diagonal().add_(least)
        return torch.linalg.solve(gram_KK, keys_NK.T @ diffs_NV).T.double()


def dual(keys_NK: Tensor, diffs_NV: Tensor) -> Tensor:
    """By the pseudo-inverse, so that keys may depend on one another."""
    solved = torch.linalg.lstsq(keys_NK.double(), diffs_NV.double(), driver="gelsd")
    return solved.solution.T
