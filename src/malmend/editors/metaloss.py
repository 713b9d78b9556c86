"""The loss that an editor is judged by, on the edited model (MALMEN, equation 1).

    L_meta = L_gen + locality * L_loc
    L_gen  = mean over facts of -log p(answer | equivalent prompt)
    L_loc  = mean over facts of KL(unedited || edited), summed over the unrelated answer's tokens,
             its end token included (without an answer: at the one next token)

Means over *facts*, by count: neither value nor gradient depends on the micro-batches.

Shape letters: A answer tokens, H hidden width, V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.models.output import Losses, Part, kl_from, through_output
from malmend.models.sites import Site
from malmend.models.trunk import Batch, Trunk
from malmend.numerics.losses import nll_and_grad
from malmend.processes import ALONE, Processes


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
            states_AH = trunk.final_states(batch)
            losses_A = through_output(trunk, states_AH, part, weight / count if grads else 0.0)
            _collect(trunk.sites, out.shift_grads)
            return losses_A.sum().item() / count

        for _, batch in trunk.batches([one.equivalent for one in judged]):
            labels_A = batch.tokens.labels_A.to(device)

            def said(rows: slice, at_AW: Tensor, labels_A: Tensor = labels_A) -> Losses:
                return nll_and_grad(at_AW, labels_A[rows])

            out.gen += add(batch, 1.0, said)
        others = [(one.unrelated, one.unedited_AH) for one in judged]
        held = [(q, states_AH) for q, states_AH in others if q and states_AH is not None]
        for indices, batch in trunk.batches([question for question, _ in held]):
            known_AH = torch.cat([held[i][1] for i in indices])
            out.loc += add(batch, locality, kl_from(trunk, known_AH))
    out.gen, out.loc = processes.total(out.gen, out.loc)
    out.shift_grads = {n: processes.summed(grad) for n, grad in out.shift_grads.items()}
    return out


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
