"""The loss that an editor is judged by, on the edited model (MALMEN, equation 1).

    L_meta = L_gen + locality * L_loc
    L_gen  = mean over facts of -log p(answer | equivalent prompt)
    L_loc  = mean over facts of KL(unedited || edited), summed over the unrelated answer's tokens,
             its end token included (without an answer: at the one next token)

Means over *facts*, by count: neither value nor gradient depends on the micro-batches.

Shape letters: A answer tokens, H hidden width, V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.models.output import Part, kl_from
from malmend.models.trunk import Batch, Trunk
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class Judged:
    """What one edited fact is judged by.

    ``unedited_AH`` are the unedited model's final states at the unrelated question's answer, from
    :meth:`malmend.models.trunk.Trunk.unedited_states`; without both, L_loc is not asked of it.
    """

    equivalent: Encoded
    unrelated: Encoded | None = None
    unedited_AH: Tensor | None = None


@dataclass(eq=False)
class MetaLoss:
    """Both parts in nats per fact, and G = dL_meta/dW per site, V x K, where it was asked for.

    G lies where the weights do.
    """

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
    out, count = MetaLoss(locality), max(1.0, processes.total(len(judged))[0])
    others = [(one.unrelated, one.unedited_AH) for one in judged]
    held = [(q, states_AH) for q, states_AH in others if q and states_AH is not None]

    def as_before(indices: Sequence[int], _batch: Batch) -> Part:
        return kl_from(trunk, torch.cat([held[index][1] for index in indices]))

    gen = Term([one.equivalent for one in judged], saying(trunk), 1 / count)
    loc = Term([question for question, _ in held], as_before, locality / count)
    losses, shift_grads = weight_grads(trunk, [gen, loc], grads)
    out.gen, out.loc = processes.total(*(one_Q.sum().item() / count for one_Q in losses))
    out.shift_grads = {n: processes.summed(grad) for n, grad in shift_grads.items()}
    return out
