"""A loss through the output layer, whose logits are made of a few tokens at a time.

The vocabulary is wide: all logits of a micro-batch, with what autograd keeps of them, would take
more than everything else.

Shape letters: A answer tokens, H hidden width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from malmend.models.trunk import Trunk
from malmend.numerics.chunks import chunks
from malmend.numerics.losses import kl_and_grad

LOGITS = 1 << 23  # so many stand in memory at once
Losses = tuple[Tensor, Tensor]  # of each token, A, and by each logit, A x W
Part = Callable[[slice, Tensor], Losses]


def through_output(trunk: Trunk, states_AH: Tensor, part: Part, weight: float) -> Tensor:
    """The loss of each token, A; the gradient of their sum, times ``weight``, goes back.

    Args:
        trunk: whose output layer it is.
        states_AH: :meth:`Trunk.final_states`, or some of them, in a graph unless ``weight`` is 0.
        part: of some tokens and their logits, each loss and its derivative by the logits.
        weight: 0 for no gradient.
    """
    known_AH = states_AH.detach()
    grad_AH, found = torch.zeros_like(known_AH), []
    for rows in chunks(len(known_AH), max(1, LOGITS // trunk.words)):
        part_AH = known_AH[rows].requires_grad_(bool(weight))
        at_AW = trunk.logits_of(part_AH)
        losses_A, by_AW = part(rows, at_AW.detach())
        found.append(losses_A)
        if weight:
            at_AW.backward(by_AW.mul_(weight).to(at_AW.dtype))
            assert part_AH.grad is not None
            grad_AH[rows] = part_AH.grad
    if weight:
        states_AH.backward(grad_AH)
    return torch.cat(found)


def kl_from(trunk: Trunk, before_AH: Tensor) -> Part:
    """KL(before || after), ``before_AH`` the final states of the same tokens before."""
    before_AH = before_AH.to(trunk.model.device)

    def part(rows: slice, at_AW: Tensor) -> Losses:
        with torch.no_grad():
            return kl_and_grad(trunk.logits_of(before_AH[rows]), at_AW)

    return part
