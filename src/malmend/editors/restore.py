"""What an edit moved of other answers and of text, asked back in its later solves.

A prior holds the shift small where text and other questions are, in the mean over all of them.  But
nearly all of what an edit disturbs is at few tokens, and there it is not the shift's size that
counts but what the model says.  So before a later solve the edited model reads *held* questions and
text.  At each token t where it says something else than the unedited model,

    L_t = KL(p_t || p'_t) > MOVED,

the outputs of all sites l are moved by free vectors delta_tl that bring L_t down, as an edit's are
by equation (6),

    delta_tl -= s_t g_tl / |g_tl|,    s_t = RATE * L_t / (sum of |g_tl| over l)                 (28)

(twice, where L_t > BACK; no second step is longer than ten times the first) and the solve gets one
more row, of weight ``refine.restore``: its key u'_t as the shift S_p leaves it, and for its value
d_t = S_p u'_t + delta_t, what it has and what brings back what was said.  There are no more such
rows than the edit has itself, the most moved first.

Held are questions and text of the project's own, but those that it measures by
(:func:`malmend.material.to_hold`).  Not in the papers.

Shape letters: H held tokens, A answer tokens of a micro-batch, M moved ones among them, K key
width, V value width, X hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.models.capture import Captured
from malmend.models.descent import LONGER, SHORT, step_length
from malmend.models.output import kl_from, through_output
from malmend.models.tracing import tracing
from malmend.models.trunk import Batch, Trunk
from malmend.processes import ALONE, Processes

MOVED, BACK = 0.15, 0.05  # nats at which a token counts as moved, and as brought back
STEPS, RATE = 2, 1.5
EACH, FEWEST = 20, 2000  # positions that are read for each edited token, and at least
NUMBERS = (MOVED, BACK, STEPS, RATE, EACH, FEWEST, LONGER)


@dataclass(frozen=True, eq=False)
class Held:
    """Questions and text at which a model should go on saying what it says unedited.

    ``states`` holds what the output layer reads at each one's answer tokens, A x X, unedited.
    """

    questions: tuple[Encoded, ...]
    states: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        trunk: Trunk,
        questions: Sequence[Encoded],
        edited: int,
        processes: Processes = ALONE,
    ) -> Held:
        """The first of them, as many as suit an edit of so many tokens; of processes this one's.

        Call while the weights are the unedited ones.
        """
        sizes = torch.tensor([len(one.ids) for one in questions]).cumsum(0)
        some = questions[: int((sizes < max(FEWEST, EACH * edited)).sum()) + 1]
        return cls.of_all(trunk, some, processes)

    @classmethod
    def of_all(
        cls, trunk: Trunk, questions: Sequence[Encoded], processes: Processes = ALONE
    ) -> Held:
        """All of them; of processes this one's.  Call while the weights are the unedited ones."""
        some = processes.share(questions)
        return cls(tuple(some), tuple(trunk.unedited_states(some)))


@torch.no_grad()
def moved(trunk: Trunk, held: Held) -> list[Tensor]:
    """L_t of each question's answer tokens, as the weights are now."""
    found = [torch.empty(0)] * len(held.questions)
    for indices, batch in trunk.batches(held.questions):
        loss = kl_from(trunk, torch.cat([held.states[index] for index in indices]))
        kl_A = through_output(trunk, trunk.final_states(batch), loss, 0.0).to("cpu", trunk.wide)
        for index, one_A in zip(indices, kl_A.split(batch.tokens.sources), strict=True):
            found[index] = one_A
    return found


def restoring(
    trunk: Trunk,
    held: Held,
    most: int,
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
) -> list[Captured]:
    """Keys and value gradients, -delta of (28), of the moved tokens at every site.

    Args:
        trunk: its weights as they are now.
        held: what should be said as before.
        most: so many tokens at most, the most moved ones; of ``processes`` this one's part.
        progress: called with the number of held questions just finished.
        processes: that held questions are spread over.
    """
    kl, (most,) = moved(trunk, held), map(int, processes.total(most))
    every_H = torch.cat([torch.empty(0, dtype=trunk.wide), *kl])
    ranked = processes.gathered(every_H).sort(descending=True).values
    least = max(MOVED, ranked[most].item()) if len(ranked) > most else MOVED
    chosen = [index for index, one_A in enumerate(kl) if (one_A > least).any()]
    progress(len(held.questions) - len(chosen))
    count, dtype = int((every_H > least).sum()), trunk.wide
    out = [
        Captured(
            trunk.room.empty(count, site.shape_VK[1], dtype=dtype),
            trunk.room.empty(count, site.shape_VK[0], dtype=dtype),
            room=trunk.room,
        )
        for site in trunk.sites
    ]
    first = 0
    for indices, batch in trunk.batches([held.questions[index] for index in chosen]):
        ones = [chosen[index] for index in indices]
        is_moved_A = torch.cat([kl[one] for one in ones]) > least
        before_MX = torch.cat([held.states[one] for one in ones])[is_moved_A]
        rows = slice(first, first + len(before_MX))
        pairs = _brought_back(trunk, batch, is_moved_A, before_MX)
        for site_out, (keys_MK, deltas_MV) in zip(out, pairs, strict=True):
            site_out.keys_NK[rows] = keys_MK.to("cpu", dtype)
            site_out.value_grads_NV[rows] = -deltas_MV.to("cpu", dtype)
        first = rows.stop
        progress(len(ones))
    return out


def rehearse(trunk: Trunk, questions: Sequence[Encoded]) -> None:
    """Equation (28) at every token of one micro-batch but the first: what it takes at most."""
    lines = [replace(one, answer_start=min(2, len(one.ids) - 1)) for one in questions]
    batch = trunk.batch(lines)
    with torch.no_grad():
        states_AX = trunk.final_states(batch)
    _brought_back(trunk, batch, torch.ones(len(states_AX), dtype=torch.bool), states_AX)


def _brought_back(
    trunk: Trunk, batch: Batch, is_moved_A: Tensor, before_MX: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Equation (28): of each site the keys, and delta after a few steps, of a batch's tokens."""
    device = trunk.model.device
    flat_M, is_moved_A = batch.tokens.flat_sources_A[is_moved_A].to(device), is_moved_A.to(device)
    places, loss = batch.tokens.ids_BT.numel(), kl_from(trunk, before_MX)
    deltas = [
        torch.zeros(len(flat_M), site.shape_VK[0], dtype=trunk.wide, device=device)
        for site in trunk.sites
    ]
    keys: list[Tensor] = []
    longest_M: Tensor | None = None
    for _ in range(STEPS):
        with tracing(trunk.sites) as traces, torch.enable_grad():
            for trace, delta_MV in zip(traces, deltas, strict=True):
                full = delta_MV.new_zeros(places, delta_MV.shape[1])
                trace.added = full.index_copy(0, flat_M, delta_MV).to(trunk.model.dtype)
            states_MX = trunk.final_states(batch)[is_moved_A]
            loss_M = through_output(trunk, states_MX, loss, 1.0).to(trunk.wide)
        keys = keys or [trace.keys_at(flat_M) for trace in traces]
        open_M = loss_M > BACK
        if not open_M.any():
            break
        grads = [trace.grads_at(flat_M).to(trunk.wide) for trace in traces]
        norms = [grad_MV.norm(dim=1) for grad_MV in grads]
        pull_M = torch.stack(norms).sum(0)
        step_M, longest_M = step_length(RATE * loss_M * open_M, pull_M, longest_M)
        for delta_MV, grad_MV, norm_M in zip(deltas, grads, norms, strict=True):
            delta_MV -= (step_M / norm_M.clamp(min=SHORT))[:, None] * grad_MV
    return list(zip(keys, deltas, strict=True))
