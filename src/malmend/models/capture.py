"""Keys and value gradients of the edit loss at every site, for chosen tokens only.

Shape letters: N captured tokens, K key width, V value width, A answer tokens of a micro-batch.

The edit loss is *summed* over facts and their answer tokens (Algorithm 1 of MALMEN), so what is
captured for a fact does not depend on which other facts stand in its micro-batch.

**Descent.**  The plain gradient g_j = dL/dv_j says in which direction to move a layer's output, not
how far, and only near the unedited model.  With a :class:`Descent`, the outputs of all sites at the
fact's own tokens are moved by free vectors delta_j along the negative gradient, a few steps, until
each answer token is likely enough; g_j = -delta_j is captured instead.  Each step of fact f is

    delta_jl -= s_f g_jl / |g_jl|,   s_f = rate * L_f / (sum of |g_jl| over its open j, all l)   (6)

for token j and site l, L_f the loss of its open answer tokens: a Polyak step, which aims to take
off the share ``rate`` of the loss and needs no unit of length, so that it serves any model.  The
weights stay as they are and every fact is descended alone.

Captured tensors are float32 (float64 for a float64 model), on the CPU, in the questions' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from malmend.errors import MalmendError
from malmend.facts.tokens import Encoded, collate
from malmend.models.sites import Site
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import answer_nll

Tokens = Literal["answer", "all"]


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
    """

    keys_NK: Tensor
    value_grads_NV: Tensor
    ends_N: Tensor | None = None

    def rows(self, chosen: slice) -> Captured:
        """Some tokens of the pair."""
        ends_N = None if self.ends_N is None else self.ends_N[chosen]
        return Captured(self.keys_NK[chosen], self.value_grads_NV[chosen], ends_N)


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
    tokens: Tokens = "answer",
    descent: Descent | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Captured]:
    """Keys and value gradients per site, in the order of ``trunk.sites``.

    Args:
        trunk: the cut model; its weights are not changed.
        questions: the edits, each with an answer.
        tokens: ``"answer"`` for the positions that output the answer, ``"all"`` for every position
            but the first.
        descent: None for the plain gradient, as published.
        progress: called with the number of questions just finished.
    """
    counts = [len(_positions(question, tokens)) for question in questions]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    dtype, ends_N = trunk.wide, ends_of(questions, tokens)
    out = [
        Captured(
            torch.empty(starts[-1], site.shape_VK[1], dtype=dtype),
            torch.empty(starts[-1], site.shape_VK[0], dtype=dtype),
            ends_N,
        )
        for site in trunk.sites
    ]
    for indices, batch in trunk.batches(questions):
        rows = torch.cat([torch.arange(starts[i], starts[i] + counts[i]) for i in indices])
        group = _Group(trunk, [questions[i] for i in indices], batch, tokens)
        keys, value_grads = group.descended(descent) if descent else group.plain()
        for site_out, key, grad in zip(out, keys, value_grads, strict=True):
            site_out.keys_NK[rows] = key.to("cpu", dtype)
            site_out.value_grads_NV[rows] = grad.to("cpu", dtype)
        progress(len(indices))
    return out


def _positions(question: Encoded, tokens: Tokens) -> range:
    """Columns of the chosen tokens of one question."""
    if tokens == "answer":
        return range(question.sources[0], question.sources[-1] + 1)
    return range(1, len(question.ids))


def ends_of(questions: Sequence[Encoded], tokens: Tokens) -> Tensor:
    """Which of all chosen tokens output an end-of-answer token, as booleans."""
    return torch.tensor(
        [
            question.counted > 0 and at == question.answer_end - 1 and at + 1 < len(question.ids)
            for question in questions
            for at in _positions(question, tokens)
        ],
        dtype=torch.bool,
    )


class _Group:
    """The questions of one micro-batch while their gradients are taken.

    Letters: Q its chosen tokens, A its answer tokens, B its questions.
    """

    def __init__(self, trunk: Trunk, questions: list[Encoded], batch: Batch, tokens: Tokens):
        self.trunk, self.questions, self.batch, self.tokens = trunk, questions, batch, tokens
        width = batch.tokens.ids_BT.shape[1]
        places = [_positions(question, tokens) for question in questions]
        device = trunk.model.device
        owners = [row for row, place in enumerate(places) for _ in place]
        flat = [row * width + at for row, place in enumerate(places) for at in place]
        ends = [at >= q.counted for q in questions for at in range(len(q.labels))]
        self.owner_Q = torch.tensor(owners, device=device)
        self.flat_Q = torch.tensor(flat, device=device)
        self.ends_A = torch.tensor(ends, device=device)

    def plain(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and gradients of the unedited model."""
        keys, grads, _ = self._backward([None] * len(self.trunk.sites))
        return keys, grads

    def descended(self, descent: Descent) -> tuple[list[Tensor], list[Tensor]]:
        """Keys of the unedited model, and minus the moves that make the answers likely."""
        rows, device = len(self.flat_Q), self.flat_Q.device
        moves = [
            torch.zeros(rows, site.shape_VK[0], device=device, dtype=self.trunk.wide)
            for site in self.trunk.sites
        ]
        keys: list[Tensor] = []
        group, at = self, torch.arange(rows, device=device)  # at: the group's rows in the whole
        for step in range(descent.steps):
            seen, grads, nll_A = group._backward([-move[at] for move in moves])
            keys = keys if step else seen
            open_Q, loss_B = group._open(nll_A, descent)
            if not open_Q.any():
                break
            norms_LQ = torch.stack([grad.norm(dim=1) for grad in grads]) * open_Q
            pull_B = torch.zeros_like(loss_B).index_add(0, group.owner_Q, norms_LQ.sum(0))
            step_Q = (descent.rate * loss_B / pull_B.clamp(min=1e-30))[group.owner_Q] * open_Q
            for move, grad, norms_Q in zip(moves, grads, norms_LQ, strict=True):
                move[at] += (step_Q / norms_Q.clamp(min=1e-30)).unsqueeze(1) * grad
            if not (loss_B > 0).all():  # a question with nothing open will not move again
                at = at[(loss_B > 0)[group.owner_Q]]
                group = group._subset((loss_B > 0).nonzero().squeeze(1).tolist())
        return keys, moves

    def _subset(self, rows: list[int]) -> _Group:
        questions = [self.questions[row] for row in rows]
        tokens = collate(questions)
        stored_BTF = self.batch.stored_BTF[rows, : tokens.ids_BT.shape[1]]
        return _Group(self.trunk, questions, Batch(tokens, stored_BTF), self.tokens)

    def _open(self, nll_A: Tensor, descent: Descent) -> tuple[Tensor, Tensor]:
        """Which chosen tokens still move, and each question's open loss."""
        bound_A = torch.where(self.ends_A, descent.end_nll, descent.answer_nll)
        open_A = nll_A > bound_A
        rows_A = self.batch.tokens.source_rows_A.to(nll_A.device)
        loss_B = nll_A.new_zeros(len(self.questions)).index_add(0, rows_A, nll_A * open_A)
        if self.tokens == "answer":
            return open_A, loss_B  # answer tokens and chosen tokens are the same list
        return (loss_B > 0)[self.owner_Q], loss_B

    def _backward(
        self, deltas: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        batch, flat = self.batch, self.flat_Q
        with tracing(self.trunk.sites) as traces, torch.enable_grad():
            for trace, delta in zip(traces, deltas, strict=True):
                if delta is not None:
                    places = batch.tokens.ids_BT.numel()
                    full = delta.new_zeros(places, delta.shape[1])
                    trace.added = full.index_copy(0, flat, delta).to(self.trunk.model.dtype)
            nll_A = answer_nll(self.trunk.logits(batch), batch.tokens.labels_A.to(flat.device))
            nll_A.sum().backward()
        keys = [trace.keys[flat] for trace in traces]
        grads = [trace.value_grads[flat].to(self.trunk.wide) for trace in traces]
        return keys, grads, nll_A.detach()
