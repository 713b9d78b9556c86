"""The loss that an editor is judged by, on the edited model (MALMEN, equation 1).

    L_meta = L_gen + locality * L_loc
    L_gen  = mean over facts of -log p(answer | equivalent prompt)
    L_loc  = mean over facts of KL(unedited || edited), summed over the unrelated answer's tokens,
             its end token included (without an answer: at the one next token)

Means over *facts*, by count: neither value nor gradient depends on the micro-batches.

Shape letters: A answer tokens, H hidden width, V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.models.sites import Site
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import kl_and_grad, nll_and_grad
from malmend.processes import ALONE, Processes

LOGITS = 1 << 22  # so many stand in memory at once
Losses = tuple[Tensor, Tensor]  # of each token, A, and by each logit, A x W
Part = Callable[[slice, Tensor], Losses]


@dataclass(frozen=True)
class Judged:
    """What one edited fact is judged by.

    ``unedited_AH`` are the unedited model's final states at the unrelated question's answer, from
    :meth:`malmend.models.trunk.Trunk.unedited_states`; without both, L_loc is not asked of it.
    """

    equivalent: Encoded
    unrelated: Encoded | None = None
    unedited_AH: Tensor | None = None


@dataclass
class MetaLoss:
    """Both parts in nats per fact, and G = dL_meta/dW per site, V x K, where it was asked for."""

    locality: float
    gen: float = 0.0
    loc: float = 0.0
    shift_grads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """L_meta."""
        return self.gen + self.locality * self.loc


def meta_loss(
    trunk: Trunk,
    judged: Sequence[Judged],
    locality: float = 1.0,
    grads: bool = True,
    processes: Processes = ALONE,
) -> MetaLoss:
    """L_meta of the model as it is now (edited) and, with ``grads``, G at the sites' weights.

    G is accumulated in float32 or wider, whatever the weights' dtype.  Of ``processes`` each brings
    its own facts, and both are of all.
    """
    out = MetaLoss(locality)
    count, device = processes.total(len(judged))[0], trunk.model.device
    with _weights_in_graph(trunk.sites if grads else ()), torch.set_grad_enabled(grads):

        def add(batch: Batch, weight: float, part: Part) -> float:
            loss = _through(trunk, batch, weight / count if grads else 0.0, part) / count
            _collect(trunk.sites, out.shift_grads)
            return loss

        for _, batch in trunk.batches([one.equivalent for one in judged]):
            labels_A = batch.tokens.labels_A.to(device)

            def said(rows: slice, at_AW: Tensor, labels_A: Tensor = labels_A) -> Losses:
                return nll_and_grad(at_AW, labels_A[rows])

            out.gen += add(batch, 1.0, said)
        others = [(one.unrelated, one.unedited_AH) for one in judged]
        held = [(q, states_AH) for q, states_AH in others if q and states_AH is not None]
        for indices, batch in trunk.batches([question for question, _ in held]):
            known_AH = torch.cat([held[i][1] for i in indices]).to(device)

            def moved(rows: slice, at_AW: Tensor, known_AH: Tensor = known_AH) -> Losses:
                with torch.no_grad():
                    return kl_and_grad(trunk.logits_of(known_AH[rows]), at_AW)

            out.loc += add(batch, locality, moved)
    out.gen, out.loc = processes.total(out.gen, out.loc)
    out.shift_grads = {n: processes.summed(grad) for n, grad in out.shift_grads.items()}
    return out


def _through(trunk: Trunk, batch: Batch, weight: float, part: Part) -> float:
    """The sum of a loss over a batch's answer tokens; its gradient, times ``weight``, goes back.

    The vocabulary is wide: logits are made of a few tokens at a time, and nothing of them is kept.
    """
    states_AH = trunk.final_states(batch)
    known_AH, total = states_AH.detach(), 0.0
    grad_AH = torch.zeros_like(known_AH)
    size = max(1, LOGITS // trunk.words)
    for rows in (slice(start, start + size) for start in range(0, len(known_AH), size)):
        part_AH = known_AH[rows].requires_grad_(bool(weight))
        at_AW = trunk.logits_of(part_AH)
        losses_A, by_AW = part(rows, at_AW.detach())
        total += losses_A.sum().item()
        if weight:
            at_AW.backward(by_AW.mul_(weight).to(at_AW.dtype))
            assert part_AH.grad is not None
            grad_AH[rows] = part_AH.grad
    if weight:
        states_AH.backward(grad_AH)
    return total


@contextmanager
def _weights_in_graph(sites: Sequence[Site]) -> Iterator[None]:
    for site in sites:
        site.weight.requires_grad_(True)
    try:
        yield
    finally:
        for site in sites:
            site.weight.requires_grad_(False)
            site.weight.grad = None


def _collect(sites: Sequence[Site], totals: dict[str, Tensor]) -> None:
    """Moves each weight's gradient into a wide running sum, so that bfloat16 never accumulates."""
    for site in sites:
        grad = site.weight.grad
        if grad is None:
            continue
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad_VK = site.oriented(grad).to("cpu", wide)
        if site.name in totals:
            totals[site.name] += grad_VK
        else:
            totals[site.name] = grad_VK.clone()
        site.weight.grad = None
