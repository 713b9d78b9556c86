"""Losses of a model as its weights are now, and their gradient by the edited weights.

Shape letters: Q questions, A answer tokens, H hidden width, V value width, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.models.device import wide_device
from malmend.models.output import Losses, Part, through_output
from malmend.models.sites import Site, put_back
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import nll_and_grad


@dataclass(frozen=True, eq=False)
class Term:
    """A weighted sum of losses: of the answer tokens of some questions.

    ``part`` makes, of the indices of a micro-batch's questions and of the batch itself, what
    :func:`malmend.models.output.through_output` asks for.
    """

    questions: Sequence[Encoded]
    part: Callable[[Sequence[int], Batch], Part]
    weight: float


def weight_grads(
    trunk: Trunk, terms: Sequence[Term], grads: bool = True
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each term's losses by question, without its weight, and the weighted sum's gradient by site.

    The losses are Q numbers in float64 on the CPU, the gradients V x K where the weights lie.

    The gradient is accumulated in float32 or wider, whatever the weights' dtype; before that a term
    weighs at least a half and less than 1, the power of two that is left comes then.
    """
    device = wide_device(trunk.model)
    losses = [torch.zeros(len(term.questions), dtype=torch.float64) for term in terms]
    totals = dict[str, Tensor]()
    with _weights_in_graph(trunk.sites if grads else ()), torch.set_grad_enabled(grads):
        for term, losses_Q in zip(terms, losses, strict=True):
            # By one over a number of facts most derivatives would be below the least of float16.
            factor, power = math.frexp(term.weight)
            kept = list[tuple[list[int], Tensor]]()
            for indices, batch in trunk.batches(term.questions):
                states_AH = trunk.final_states(batch)
                part = term.part(indices, batch)
                losses_A = through_output(trunk, states_AH, part, factor if grads else 0.0)
                _collect(trunk.sites, totals, 2.0**power)
                parts = losses_A.to(device).to(torch.float64).split(batch.tokens.sources)
                kept.append((indices, torch.stack([one_A.sum() for one_A in parts])))
            # Off a GPU only here: after every micro-batch it would have to wait.
            for indices, sums_Q in kept:
                losses_Q[torch.tensor(indices)] = sums_Q.cpu()
    return losses, totals


def saying(trunk: Trunk, enough: float = 0.0) -> Callable[[Sequence[int], Batch], Part]:
    """A term's part: -log p(answer token), nothing where it is no more than ``enough`` nats."""

    def of(_indices: Sequence[int], batch: Batch) -> Part:
        labels_A = batch.tokens.labels_A.to(trunk.model.device)

        def part(rows: slice, at_AW: Tensor) -> Losses:
            nll_A, by_AW = nll_and_grad(at_AW, labels_A[rows])
            if enough:
                is_open_A = nll_A > enough
                nll_A, by_AW = nll_A * is_open_A, by_AW.mul_(is_open_A[:, None])
            return nll_A, by_AW

        return part

    return of


@contextmanager
def _weights_in_graph(sites: Sequence[Site]) -> Iterator[None]:
    def back() -> None:
        for site in sites:
            site.weight.requires_grad_(False)
            site.weight.grad = None

    with put_back(back):
        for site in sites:
            site.weight.requires_grad_(True)
        yield


def _collect(sites: Sequence[Site], totals: dict[str, Tensor], scale: float) -> None:
    """Moves each weight's gradient, times ``scale``, into a wide running sum.

    So bfloat16 never accumulates.
    """
    for site in sites:
        grad = site.weight.grad
        if grad is None:
            continue
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_VK = site.oriented(grad).to(wide)
        if site.name in totals:
            totals[site.name].add_(grad_VK, alpha=scale)
        else:
            totals[site.name] = scale * grad_VK
        site.weight.grad = None
