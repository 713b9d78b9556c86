"""An edit settled: its shift descended by what the edited model says, from its solves on.

A least-squares solution asks every value to be near what its token needs, though many are far
beyond it, and what it moves besides is known in the mean alone.  From there on the shift itself is
descended by what counts,

    L(S) = mean over facts of the sum of nll_t over answer tokens of all frames, nll_t > SAID
         + hold * mean over held tokens of KL(p_t || p'_t),                                    (29)

in the metric of the prior: with P_l = L_l L_l^T of equation (1) and S_l = E_l L_l^-1, by Adam on
E_l, whose steps are relative to the root mean square of the E_l that it starts from and fall
linearly to nothing.  So a step is small where text and other questions have many keys.

Each step reads some facts in every frame and in fewer words (wordings.py), and some of the held
questions and lines (restore.py).
Not in the papers.

Shape letters: A answer tokens, X hidden width, V value width, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from malmend.editors.editor import Editor
from malmend.editors.restore import Held
from malmend.facts.encoded import Encoded
from malmend.models.capture import token_counts
from malmend.models.output import Part, kl_from
from malmend.models.trunk import Batch, Trunk
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.numerics.ridge import Prior
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

FACTS, FEWEST = 16, 80  # facts of a step, and steps at least
HELD, READ = 48, 2  # questions and lines of a step, and how often each is read
SAID = 0.05  # nats below which an answer token is said surely enough
RATE, BETAS, TINY = 0.06, (0.9, 0.98), 1e-6
NUMBERS = (FACTS, FEWEST, HELD, READ, SAID, RATE, *BETAS, TINY)


def steps_for(facts: int, rounds: float) -> int:
    """How many steps read each of so many facts ``rounds`` times, or a few more."""
    return max(FEWEST, math.ceil(rounds * facts / FACTS))


def lines_for(steps: int) -> int:
    """How many held questions and lines so many steps read."""
    return steps * HELD // READ


def settle(
    editor: Editor,
    trunk: Trunk,
    shifts: Mapping[str, Tensor],
    asked: Sequence[Sequence[Encoded]],
    steps: int,
    hold: float,
    held: Held | None = None,
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Equation (29), descended.

    Args:
        editor: whose prior is the metric.
        trunk: the cut model, unedited.
        shifts: what is started from, by site, V x K.
        asked: of each fact its prompt, and the same asked otherwise; of ``processes`` this one's.
        steps: how many.
        hold: weight of what should be said as before.
        held: that; None for nothing.
        progress: called with 1 after each step.
        processes: that facts and held questions are spread over.

    Returns:
        The shifts in float64.  The same draws are made of however many processes.
    """
    (facts,), plain = processes.total(len(asked)), [rows[0] for rows in asked]
    counts = [token_counts(plain, editor.settings.tokens, s.in_encoder) for s in trunk.sites]
    tokens = processes.total(*map(sum, counts))
    device = trunk.model.device
    metric = {
        name: _Metric(editor.prior(site, int(count)), shifts[name].to(device, trunk.wide))
        for site, (name, count) in enumerate(zip(editor.names, tokens, strict=True))
    }
    lines = int(processes.total(len(held.questions))[0]) if held else 0
    fact_draws = _draws(int(facts), FACTS, processes)
    held_draws = _draws(lines, HELD, processes)
    for step in range(steps):
        mine = [asked[index] for index in next(fact_draws)]
        drawn = processes.total(len(mine))[0]
        terms = [Term([row for rows in mine for row in rows], saying(trunk, SAID), 1 / drawn)]
        if held is not None and lines:
            terms.append(_holding(trunk, held, next(held_draws), hold, processes))
        current = {name: one.shift() for name, one in metric.items()}
        with shifted(list(trunk.sites), current):
            _, grads = weight_grads(trunk, terms)
        for site in trunk.sites:
            grad_VK = grads.get(site.name)
            grad_VK = torch.zeros(site.shape_VK, dtype=trunk.wide) if grad_VK is None else grad_VK
            metric[site.name].step(processes.summed(grad_VK), 1 - step / steps)
        progress(1)
    return {name: one.shift().double().cpu() for name, one in metric.items()}


def rehearse(trunk: Trunk, questions: Sequence[Encoded]) -> None:
    """A step on one micro-batch, without a change: what it takes."""
    weight_grads(trunk, [Term(questions, saying(trunk), 1.0)])


def beside(trunk: Trunk) -> int:
    """Bytes of E, both moments, S, W + S, two gradients and L, of all sites."""
    numbers = sum(v * k * 7 + k * k for v, k in (site.shape_VK for site in trunk.sites))
    return numbers * torch.finfo(trunk.wide).bits // 8


def _holding(
    trunk: Trunk, held: Held, drawn: Sequence[int], hold: float, processes: Processes
) -> Term:
    """The second term of (29), of the held questions of these indices."""
    questions = [held.questions[index] for index in drawn]
    tokens = processes.total(sum(len(one.sources) for one in questions))[0]

    def as_before(indices: Sequence[int], _batch: Batch) -> Part:
        return kl_from(trunk, torch.cat([held.states[drawn[index]] for index in indices]))

    return Term(questions, as_before, hold / max(tokens, 1.0))


def _draws(count: int, size: int, processes: Processes) -> Iterator[list[int]]:
    """Of so many things over all processes the next few, as indices of this process's own.

    Each is drawn once before any is drawn again.
    """
    generator, queue = torch.Generator().manual_seed(0), list[int]()
    while True:
        while len(queue) < min(size, count):
            queue += torch.randperm(count, generator=generator).tolist()
        some, queue = queue[:size], queue[size:]
        yield [one // processes.count for one in some if one % processes.count == processes.rank]


class _Metric:
    """E of one site, and its optimiser.

    Args:
        prior: P = L L^T.
        shift_VK: S to start from.

    Raises:
        MalmendError: P is singular.
    """

    def __init__(self, prior: Prior, shift_VK: Tensor):
        eye_KK = torch.eye(shift_VK.shape[1], dtype=torch.float64)
        # Of a multiple of the identity the size does not matter: steps are relative.
        self._root_KK = (eye_KK if prior.is_identity else prior.factor_KK).to(shift_VK)
        self._free_VK = torch.nn.Parameter(shift_VK @ self._root_KK)
        self._rate = RATE * self._free_VK.detach().square().mean().sqrt().item()
        self._adam = torch.optim.Adam([self._free_VK], betas=BETAS)

    def shift(self) -> Tensor:
        """S = E L^-1, V x K."""
        free_VK, root_KK = self._free_VK.detach(), self._root_KK
        return torch.linalg.solve_triangular(root_KK, free_VK, upper=False, left=False)

    def step(self, grad_VK: Tensor, share: float) -> None:
        """One step, at this share of the rate, of dL/dS: dL/dE = dL/dS L^-T."""
        grad_VK = torch.linalg.solve_triangular(
            self._root_KK.T, grad_VK.to(self._free_VK), upper=True, left=False
        )
        group = self._adam.param_groups[0]
        if not self._adam.state:  # what is smaller than this part of the first is rounding
            group["eps"] = TINY * grad_VK.square().mean().sqrt().item() or TINY
        self._free_VK.grad, group["lr"] = grad_VK, self._rate * share
        self._adam.step()
        self._free_VK.grad = None
