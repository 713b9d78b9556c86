"""Keys and value gradients of the edit loss at every site, for chosen tokens only.

Sites of one half of an encoder-decoder see other tokens than those of the other half: the encoder's
all of the prompt's, the decoder's those that output the answer.

Shape letters: N captured tokens, K key width, V value width, A answer tokens of a micro-batch.

The edit loss is *summed* over facts and their answer tokens (Algorithm 1 of MALMEN), so what is
captured for a fact does not depend on which other facts stand in its micro-batch.

With a :class:`Descent` (descent.py), minus the moves that make the answers likely stand in place of
gradients.

Captured tensors are float32 (float64 for a float64 model), on the CPU, in the questions' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded, Tokens, resolved
from malmend.memory import Room
from malmend.models.descent import Descent, Group
from malmend.models.tracing import tracing
from malmend.models.trunk import Batch, Trunk


@dataclass(frozen=True, eq=False)
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

    def followed(self, by: Captured) -> Captured:
        """The tokens of both."""
        pairs = [(self.keys_NK, by.keys_NK), (self.value_grads_NV, by.value_grads_NV)]
        keys_NK, value_grads_NV = (
            torch.cat(
                pair,
                out=self.room.empty(
                    len(pair[0]) + len(pair[1]), *pair[0].shape[1:], dtype=pair[0].dtype
                ),
            )
            for pair in pairs
        )
        ends_N = None
        if self.ends_N is not None:
            more = torch.zeros(len(by.keys_NK), dtype=torch.bool)
            ends_N = torch.cat([self.ends_N, more if by.ends_N is None else by.ends_N])
        return Captured(keys_NK, value_grads_NV, ends_N, self.room)


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
    splits = None if resolved(tokens, trunk.cut.form) == "answer" else False
    for indices, batch in trunk.batches(questions):
        rows = _rows_of(starts, indices)
        suffix = trunk.suffix(batch) if splits is not False else None
        if splits is None and suffix is not None:  # once, of the longest questions
            splits = trunk.agrees(suffix, batch)
            suffix = suffix if splits else None
        group = Group(trunk, [questions[i] for i in indices], batch, tokens, suffix)
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
        trace.keys_at(batch.tokens.flat(tokens, trace.site.in_encoder)).to(torch.float64)
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
