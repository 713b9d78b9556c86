"""Keys and value gradients of the edit loss at every site, for chosen tokens only.

Sites of one half of an encoder-decoder see other tokens than those of the other half: the encoder's
all of the prompt's, the decoder's those that output the answer.

Shape letters: N captured tokens, K key width, V value width, A answer tokens of a micro-batch.

The edit loss is *summed* over facts and their answer tokens (Algorithm 1 of MALMEN), so what is
captured for a fact does not depend on which other facts stand in its micro-batch.

**Descent.**  The plain gradient g_j = dL/dv_j says in which direction to move a layer's output, not
how far, and only near the unedited model.  With a :class:`Descent`, the outputs of all sites at the
fact's own tokens are moved by free vectors delta_j along the negative gradient, a few steps, until
each answer token is likely enough; g_j = -delta_j is captured instead.  Each step of fact f is

    delta_jl -= s_f g_jl / |g_jl|,   s_f = rate * L_f / (sum of |g_jl| over its open j, all l)   (6)

for token j and site l, L_f the loss of its open answer tokens: a Polyak step, which aims to take
off the share ``rate`` of the loss and needs no unit of length, so that it serves any model.  No
step is longer than ten times the fact's first: where a norm bounds what a layer can do, the loss
stays, the gradient vanishes, and steps would grow without end.  The weights stay as they are and
every fact is descended alone.

Captured tensors are float32 (float64 for a float64 model), on the CPU, in the questions' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, Tokens, collate, settled
from malmend.memory import Room
from malmend.models.sites import Site
from malmend.models.suffix import Suffix
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import answer_nll

LONGER = 10  # times its first is no step of a fact's descent


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
        if self.steps < 1 or not self.rate > 0:
            raise MalmendError(
                f"descent.steps is {self.steps} and descent.rate {self.rate}, expected 1 or more "
                "and a number above 0; give --descent null for plain gradients."
            )


@dataclass(frozen=True)
class Captured:
    """What one site saw: key u_j and value gradient g_j of each chosen token.

    ``ends_N`` marks the tokens that output an end-of-answer token; None where there are none.
    ``room`` is where more tensors of as many rows go.
    """

    keys_NK: Tensor
    value_grads_NV: Tensor
    ends_N: Tensor | None = None
    room: Room = field(default_factory=Room)

    def rows(self, chosen: slice) -> Captured:
        """Some tokens of the pair."""
        ends_N = None if self.ends_N is None else self.ends_N[chosen]
        return Captured(self.keys_NK[chosen], self.value_grads_NV[chosen], ends_N, self.room)


class Trace:
    """One site's last input and output gradient, positions flattened: filled by :func:`tracing`."""

    def __init__(self, site: Site):
        self.site = site
        self.keys: Tensor
        self.value_grads: Tensor
        self.added: Tensor | None = None


@contextmanager
def tracing(sites: Sequence[Site], grads: bool = True) -> Iterator[list[Trace]]:
    """Records each site's input and, with ``grads``, the gradient at its output.

    The weights need no gradient: the first site's output is made the start of the graph.  What a
    trace holds in ``added`` is added to the site's output (same flattened shape).
    """
    traces = [Trace(site) for site in sites]

    def hook(trace: Trace) -> Callable[..., Tensor | None]:
        def record(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            trace.keys = args[0].detach().reshape(-1, args[0].shape[-1])
            if not grads:
                return None
            if trace.added is not None:
                output = output + trace.added.view_as(output)
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)

            def keep(grad: Tensor) -> None:
                trace.value_grads = grad.reshape(-1, grad.shape[-1])

            output.register_hook(keep)
            return output

        return record

    handles = [trace.site.module.register_forward_hook(hook(trace)) for trace in traces]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()


def capture(
    trunk: Trunk,
    questions: Sequence[Encoded],
    tokens: Tokens = "auto",
    descent: Descent | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Captured]:
    """Keys and value gradients per site, in the order of ``trunk.sites``.

    Args:
        trunk: the cut model; its weights are not changed.
        questions: the edits, each with an answer.
        tokens: ``"answer"`` for the positions that output the answer, ``"all"`` for every position
            (of a decoder but the first), ``"auto"`` for the answer's, and of a classifier for all.
        descent: None for the plain gradient, as published.
        progress: called with the number of questions just finished.
    """
    dtype = trunk.wide
    starts = _starts(trunk, questions, tokens)
    ends = {side: ends_of(questions, tokens, side) for side in starts}
    out = [
        Captured(
            trunk.room.empty(starts[site.in_encoder][-1], site.shape_VK[1], dtype=dtype),
            trunk.room.empty(starts[site.in_encoder][-1], site.shape_VK[0], dtype=dtype),
            ends[site.in_encoder],
            trunk.room,
        )
        for site in trunk.sites
    ]
    for indices, batch in trunk.batches(questions):
        rows = _rows_of(starts, indices)
        whole = settled(tokens, questions[0].form) == "all"
        suffix = None if whole else trunk.suffix(batch)
        group = _Group(trunk, [questions[i] for i in indices], batch, tokens, suffix)
        keys, value_grads = group.descended(descent) if descent else group.plain()
        for site, site_out, key, grad in zip(trunk.sites, out, keys, value_grads, strict=True):
            site_out.keys_NK[rows[site.in_encoder]] = key.to("cpu", dtype)
            site_out.value_grads_NV[rows[site.in_encoder]] = grad.to("cpu", dtype)
        progress(len(indices))
    return out


@torch.no_grad()
def keys_in(trunk: Trunk, batch: Batch, tokens: Tokens) -> list[Tensor]:
    """Keys of every site at a micro-batch's chosen tokens, float64, on the CPU."""
    with tracing(trunk.sites, grads=False) as traces:
        trunk.final_states(batch)
    return [
        trace.keys[batch.tokens.flat(tokens, trace.site.in_encoder).to(trace.keys.device)].to(
            "cpu", torch.float64
        )
        for trace in traces
    ]


def keys_of(trunk: Trunk, questions: Sequence[Encoded], tokens: Tokens = "auto") -> list[Tensor]:
    """The keys of :func:`capture` without its gradients, as the model is now."""
    starts = _starts(trunk, questions, tokens)
    out = [
        trunk.room.empty(starts[site.in_encoder][-1], site.shape_VK[1], dtype=trunk.wide)
        for site in trunk.sites
    ]
    for indices, batch in trunk.batches(questions):
        rows = _rows_of(starts, indices)
        for site, keys, keys_NK in zip(
            trunk.sites, keys_in(trunk, batch, tokens), out, strict=True
        ):
            keys_NK[rows[site.in_encoder]] = keys.to(keys_NK.dtype)
    return out


def _starts(trunk: Trunk, questions: Sequence[Encoded], tokens: Tokens) -> dict[bool, list[int]]:
    """Of each side the first row of every question, and behind the last one the count of rows."""
    return {side: [0, *accumulate(token_counts(questions, tokens, side))] for side in _sides(trunk)}


def _rows_of(starts: dict[bool, list[int]], indices: Sequence[int]) -> dict[bool, Tensor]:
    """The rows of some questions, by side."""
    return {
        side: torch.cat([torch.arange(start[i], start[i + 1]) for i in indices])
        for side, start in starts.items()
    }


def _sides(trunk: Trunk) -> list[bool]:
    """The values of ``in_encoder`` among the sites."""
    return sorted({site.in_encoder for site in trunk.sites})


def token_counts(
    questions: Sequence[Encoded], tokens: Tokens, in_encoder: bool = False
) -> list[int]:
    """How many tokens of each question are captured."""
    return [len(question.columns(tokens, in_encoder)) for question in questions]


def ends_of(questions: Sequence[Encoded], tokens: Tokens, in_encoder: bool = False) -> Tensor:
    """Which of all chosen tokens output an end-of-answer token, as booleans."""
    marks = [mark for question in questions for mark in question.ends(tokens, in_encoder)]
    return torch.tensor(marks, dtype=torch.bool)


class _Chosen:
    """The chosen tokens of a micro-batch, as the sites of one side see them.

    Letters: Q chosen tokens.
    """

    def __init__(
        self,
        batch: Batch,
        suffix: Suffix | None,
        tokens: Tokens,
        in_encoder: bool,
        device: torch.device,
    ):
        counts = torch.tensor(token_counts(batch.tokens.questions, tokens, in_encoder))
        self.owner_Q = torch.repeat_interleave(counts).to(device)
        flat_Q = batch.tokens.flat(tokens, in_encoder) if suffix is None else suffix.flat_A
        self.flat_Q = flat_Q.to(device)
        width = batch.tokens.width(in_encoder) if suffix is None else suffix.width
        self.places = len(batch.tokens.questions) * width
        form = batch.tokens.questions[0].form
        self.are_answers = settled(tokens, form) == "answer" and not in_encoder


class _Group:
    """The questions of one micro-batch while their gradients are taken.

    Letters: Q chosen tokens of a site, A its answer tokens, B its questions.
    """

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
        sides = {side: _Chosen(batch, suffix, tokens, side, device) for side in _sides(trunk)}
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
        longest_B = torch.empty(0)
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
            step_B = descent.rate * loss_B / pull_B.clamp(min=1e-30) * (pull_B > 0)
            longest_B = LONGER * step_B if step == 0 else longest_B
            step_B = step_B.minimum(longest_B)
            for site, one in enumerate(group.chosen):
                step_Q = step_B[one.owner_Q] * opens[site] / norms[site].clamp(min=1e-30)
                moves[site][at[site]] += step_Q.unsqueeze(1) * grads[site]
            if not (loss_B > 0).all():  # a question with nothing open will not move again
                at = [
                    rows[(loss_B > 0)[one.owner_Q]]
                    for rows, one in zip(at, group.chosen, strict=True)
                ]
                longest_B = longest_B[loss_B > 0]
                group = group._subset((loss_B > 0).nonzero().squeeze(1).tolist())
        return keys, moves

    def _subset(self, rows: list[int]) -> _Group:
        questions = [self.questions[row] for row in rows]
        tokens = collate(questions)
        stored_BTF = self.batch.stored_BTF[rows, : tokens.ids_BT.shape[1]]
        suffix = None if self.suffix is None else self.suffix.subset(rows, tokens)
        return _Group(self.trunk, questions, Batch(tokens, stored_BTF), self.tokens, suffix)

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
        keys = [trace.keys[one.flat_Q] for trace, one in both]
        grads = [trace.value_grads[one.flat_Q].to(self.trunk.wide) for trace, one in both]
        return keys, grads, nll_A.detach()
