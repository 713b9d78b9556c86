"""The gradients at a micro-batch's chosen tokens, or the moves that make its answers likely.

The plain gradient g_j = dL/dv_j says in which direction to move a layer's output, not how far, and
only near the unedited model.  With a :class:`Descent`, the outputs of all sites at the fact's own
tokens are moved by free vectors delta_j along the negative gradient, a few steps, until
each answer token is likely enough; g_j = -delta_j is captured instead.  Each step of fact f is

    delta_jl -= s_f g_jl / |g_jl|,   s_f = rate * L_f / (sum of |g_jl| over its open j, all l)   (6)

for token j and site l, L_f the loss of its open answer tokens: a Polyak step, which aims to take
off the share ``rate`` of the loss and needs no unit of length, so that it serves any model.  No
step is longer than ten times the fact's first: where a norm bounds what a layer can do, the loss
stays, the gradient vanishes, and steps would grow without end.  The weights stay as they are and
every fact is descended alone.

Shape letters: Q chosen tokens of a site, A its answer tokens, B its questions, F losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded, Tokens, collate, resolved
from malmend.given import check_fields, check_range
from malmend.models.suffix import Suffix
from malmend.models.tracing import tracing
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import answer_nll

LONGER = 10  # times its first is no step of a fact's descent
SHORT = 1e-30  # what a gradient's norm is divided by at least


@dataclass(frozen=True)
class Descent:
    """How the value gradients are descended (equation 6).

    Attributes:
        steps: at most so many steps.
        rate: share of a fact's loss that one step aims to take off.
        answer_nll: an answer token is done below this many nats.
        end_nll: the end-of-answer token is done below this many; looser, because what teaches a
            model to stop is shared by all facts and disturbs every other answer.
    """

    steps: int = 10
    rate: float = 0.7
    answer_nll: float = 0.02
    end_nll: float = 0.4

    def __post_init__(self) -> None:
        check_fields(self)
        none = "give --descent null for plain gradients"
        check_range(self, ("steps",), 1, prefix="descent.", advice=none)
        check_range(self, ("rate",), prefix="descent.", advice=none)
        usual = "leave it out for the usual one"
        check_range(self, ("answer_nll", "end_nll"), 0.0, prefix="descent.", advice=usual)


def step_length(aim_F: Tensor, pull_F: Tensor, longest_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """The steps of (6), which aim to take so much off losses, and the longest: None at first.

    ``pull_F`` has for each loss the sum of the gradient's norms; where it is 0 nothing moves.
    """
    step_F = aim_F / pull_F.clamp(min=SHORT) * (pull_F > 0)
    longest_F = LONGER * step_F if longest_F is None else longest_F
    return step_F.minimum(longest_F), longest_F


class _Chosen:
    """The chosen tokens of a micro-batch, as the sites of one side see them."""

    def __init__(
        self,
        batch: Batch,
        suffix: Suffix | None,
        tokens: Tokens,
        in_encoder: bool,
        device: torch.device,
    ):
        counts = torch.tensor(
            [len(one.columns(tokens, in_encoder)) for one in batch.tokens.questions]
        )
        self.owner_Q = torch.repeat_interleave(counts).to(device)
        flat_Q = batch.tokens.flat(tokens, in_encoder) if suffix is None else suffix.flat_A
        self.flat_Q = flat_Q.to(device)
        width = batch.tokens.width(in_encoder) if suffix is None else suffix.width
        self.places = len(batch.tokens.questions) * width
        form = batch.tokens.questions[0].form
        self.are_answers = resolved(tokens, form) == "answer" and not in_encoder


class Group:
    """The questions of one micro-batch while their gradients are taken."""

    def __init__(
        self,
        trunk: Trunk,
        questions: list[Encoded],
        batch: Batch,
        tokens: Tokens,
        suffix: Suffix | None,
    ):
        self.trunk, self.questions, self.batch, self.tokens = trunk, questions, batch, tokens
        self.suffix = suffix
        device = trunk.model.device
        sides = {
            side: _Chosen(batch, suffix, tokens, side, device)
            for side in {site.in_encoder for site in trunk.sites}
        }
        self.chosen = [sides[site.in_encoder] for site in trunk.sites]
        ends = [at >= q.counted for q in questions for at in range(len(q.labels))]
        self.ends_A = torch.tensor(ends, device=device)

    def plain(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and gradients of the unedited model."""
        keys, grads, _ = self._backward([None] * len(self.trunk.sites))
        return keys, grads

    def descended(self, descent: Descent) -> tuple[list[Tensor], list[Tensor]]:
        """Keys of the unedited model, and minus the moves that make the answers likely."""
        moves = [
            chosen.flat_Q.new_zeros(len(chosen.flat_Q), site.shape_VK[0], dtype=self.trunk.wide)
            for chosen, site in zip(self.chosen, self.trunk.sites, strict=True)
        ]
        keys: list[Tensor] = []
        longest_B: Tensor | None = None
        # at: the group's rows in the whole, which loses the questions that are done
        group, at = self, [torch.arange(len(move), device=move.device) for move in moves]
        for step in range(descent.steps):
            here = [-move[rows] for move, rows in zip(moves, at, strict=True)]
            seen, grads, nll_A = group._backward(here)
            keys = keys if step else seen
            open_A, loss_B = group._open(nll_A, descent)
            if not open_A.any():
                break
            opens = [
                open_A if one.are_answers else (loss_B > 0)[one.owner_Q] for one in group.chosen
            ]
            norms = [g.norm(dim=1) * is_open for g, is_open in zip(grads, opens, strict=True)]
            pull_B = torch.zeros_like(loss_B)
            for one, norms_Q in zip(group.chosen, norms, strict=True):
                pull_B.index_add_(0, one.owner_Q, norms_Q)
            step_B, longest_B = step_length(descent.rate * loss_B, pull_B, longest_B)
            for site, one in enumerate(group.chosen):
                step_Q = step_B[one.owner_Q] * opens[site] / norms[site].clamp(min=SHORT)
                moves[site][at[site]] += step_Q.unsqueeze(1) * grads[site]
            if not (loss_B > 0).all():  # a question with nothing open will not move again
                at = [
                    rows[(loss_B > 0)[one.owner_Q]]
                    for rows, one in zip(at, group.chosen, strict=True)
                ]
                longest_B = longest_B[loss_B > 0]
                group = group._subset((loss_B > 0).nonzero().squeeze(1).tolist())
        return keys, moves

    def _subset(self, rows: list[int]) -> Group:
        questions = [self.questions[row] for row in rows]
        tokens = collate(questions)
        stored_BTF = self.batch.stored_BTF[rows, : tokens.ids_BT.shape[1]]
        suffix = None if self.suffix is None else self.suffix.subset(rows, tokens)
        return Group(self.trunk, questions, Batch(tokens, stored_BTF), self.tokens, suffix)

    def _open(self, nll_A: Tensor, descent: Descent) -> tuple[Tensor, Tensor]:
        """Which answer tokens are not likely enough yet, and each question's loss over them."""
        bound_A = torch.where(self.ends_A, descent.end_nll, descent.answer_nll)
        open_A = nll_A > bound_A
        rows_A = self.batch.tokens.source_rows_A.to(nll_A.device)
        loss_B = nll_A.new_zeros(len(self.questions)).index_add(0, rows_A, nll_A * open_A)
        return open_A, loss_B

    def _backward(
        self, deltas: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        batch, model = self.batch, self.trunk.model
        with tracing(self.trunk.sites) as traces, torch.enable_grad():
            for trace, delta, one in zip(traces, deltas, self.chosen, strict=True):
                if delta is not None:
                    full = delta.new_zeros(one.places, delta.shape[1])
                    trace.added = full.index_copy(0, one.flat_Q, delta).to(model.dtype)
            logits_AW = self.trunk.logits(batch) if self.suffix is None else self.suffix.logits()
            nll_A = answer_nll(logits_AW, batch.tokens.labels_A.to(model.device))
            nll_A.sum().backward()
        both = list(zip(traces, self.chosen, strict=True))
        keys = [trace.keys_at(one.flat_Q) for trace, one in both]
        grads = [trace.grads_at(one.flat_Q).to(self.trunk.wide) for trace, one in both]
        return keys, grads, nll_A.detach()
