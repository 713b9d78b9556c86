"""An edit settled: its shift descended by what the edited model says, from its solves on.

A least-squares solution asks every value to be near what its token needs, though many are far
beyond it, and what it moves besides is known in the mean alone.  From there on the shift itself is
descended by what counts,

    L(S) = WAYS * mean over readings of the sum of nll_t over answer tokens with nll_t > SAID
         + hold * mean over held tokens of KL(p_t || p'_t)
         + KNOWN * hold * the same over what the model surely says of other subjects,           (29)

in the metric of the prior: with P_l = L_l L_l^T of equation (1) and S_l = E_l L_l^-1, by Adam on
E_l, whose steps are relative to the root mean square of the E_l that it starts from and fall
linearly to nothing.  So a step is small where text and other questions have many keys.

The facts are read as they are, in every frame and in other words (wordings.py), all once and from
then on the more often the less was said when they were last read: most plain prompts are soon said,
and what is said has no gradient.  With them go some of the held questions and lines (restore.py),
and some of what the model surely says of other subjects (known.py).  Not in the papers.

Shape letters: F facts, W ways of asking, R readings (a fact asked in a way), D those of a draw, Q
those of them that are this process's own, V value width, K key width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from malmend.editors.editor import Editor
from malmend.editors.halfway import Halfway
from malmend.editors.restore import Held
from malmend.facts.encoded import Encoded
from malmend.models.capture import token_counts
from malmend.models.output import Part, kl_from
from malmend.models.trunk import Batch, Trunk
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.numerics.ridge import Prior
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

READINGS, FEWEST = 112, 80  # of a step, and steps at least
WAYS = 7  # what all readings of a fact weigh together, in the mean over facts
LEAST_OPEN, MOST_OPEN = 0.02, 3.0  # nats that a reading is ranked by, at least and at most
LUCK = (0.5, 1.5)  # what a rank is multiplied by, from and to, at random
NEVER = 1e9  # steps since the last reading of what was not read yet
HELD, READ = 48, 2  # questions and lines of a step, and how often each is read if they suffice
FEW_KNOWN, KNOWN = 16, 0.25  # of what is surely said of others, in a step, and what it weighs
SAID = 0.05  # nats below which an answer token is said surely enough
RATE, BETAS, TINY = 0.06, (0.9, 0.98), 1e-6
NUMBERS = (
    READINGS,
    FEWEST,
    WAYS,
    LEAST_OPEN,
    MOST_OPEN,
    *LUCK,
    HELD,
    READ,
    FEW_KNOWN,
    KNOWN,
    SAID,
    RATE,
    *BETAS,
    TINY,
)


@dataclass(frozen=True)
class Keeping:
    """What should be said as before: how many of it are in a step, and what it weighs."""

    held: Held
    each: int
    weight: float


def steps_for(readings: int, rounds: float, most: int) -> int:
    """How many steps read so many readings ``rounds`` times each in the mean, or a few more.

    Never more than ``most``.
    """
    return min(most, max(FEWEST, math.ceil(rounds * readings / READINGS)))


def lines_for(steps: int) -> int:
    """How many held questions and lines so many steps read."""
    return steps * HELD // READ


def settle(
    editor: Editor,
    trunk: Trunk,
    shifts: Mapping[str, Tensor],
    asked: Sequence[Sequence[Encoded]],
    steps: int,
    keeping: Sequence[Keeping] = (),
    progress: Callable[[int], None] = lambda count: None,
    processes: Processes = ALONE,
    halfway: Halfway | None = None,
) -> dict[str, Tensor]:
    """Equation (29), descended.

    Args:
        editor: whose prior is the metric.
        trunk: the cut model, unedited.
        shifts: what is started from, by site, V x K.
        asked: of each fact its prompt, and the same in other ways; of ``processes`` this one's.
        steps: how many.
        keeping: what should be said as before; of ``processes`` this one's.
        progress: called with 1 after each step, at first with those that were taken before.
        processes: that facts and held questions are spread over.
        halfway: where it goes on from, and is kept; None for nowhere.

    Returns:
        The shifts in float64.  The same draws are made of however many processes, but for
        rounding of what is open.
    """
    plain = [ways[0] for ways in asked]
    counts = [token_counts(plain, editor.settings.tokens, s.in_encoder) for s in trunk.sites]
    tokens = processes.total(*map(sum, counts))
    device = trunk.model.device
    metric = {
        name: _Metric(editor.prior(site, int(count)), shifts[name].to(device, trunk.wide))
        for site, (name, count) in enumerate(zip(editor.names, tokens, strict=True))
    }
    readings = _Readings(asked, processes)
    sizes = [int(processes.total(len(one.held.questions))[0]) for one in keeping]
    draws = [_draws(n, one.each, processes) for n, one in zip(sizes, keeping, strict=True)]
    parts: dict[str, _Metric | _Readings] = {"readings": readings, **metric}
    first = _go_on(parts, halfway)
    if first:
        progress(first)
    for step, *drawn in zip(
        range(first, steps), *(islice(one, first, None) for one in draws), strict=False
    ):
        terms = [Term(readings.draw(), saying(trunk, SAID), readings.weight)]
        for one, some in zip(keeping, drawn, strict=True):
            terms.append(_holding(trunk, one, some, processes))
        current = {name: one.shift() for name, one in metric.items()}
        with shifted(list(trunk.sites), current):
            losses, grads = weight_grads(trunk, terms)
        readings.read(losses[0])
        for site in trunk.sites:
            grad_VK = grads.get(site.name)
            grad_VK = torch.zeros(site.shape_VK, dtype=trunk.wide) if grad_VK is None else grad_VK
            metric[site.name].step(processes.summed(grad_VK), 1 - step / steps)
        progress(1)
        if halfway is not None:
            halfway.keep(step + 1, lambda: _state(parts), is_last=step + 1 == steps)
    return {name: one.shift().double().cpu() for name, one in metric.items()}


def _state(parts: Mapping[str, _Metric | _Readings]) -> dict[str, Tensor]:
    """All that the next step depends on, by part and name."""
    return {f"{part} {n}": kept for part, one in parts.items() for n, kept in one.state().items()}


def _go_on(parts: Mapping[str, _Metric | _Readings], halfway: Halfway | None) -> int:
    """Takes up what was kept halfway; after how many steps that was."""
    steps, kept = halfway.found() if halfway is not None else (0, {})
    if steps:
        for part, one in parts.items():
            own = {
                n.removeprefix(f"{part} "): k for n, k in kept.items() if n.startswith(f"{part} ")
            }
            one.go_on(own)
    return steps


def rehearse(trunk: Trunk, questions: Sequence[Encoded]) -> None:
    """A step on one micro-batch, without a change: what it takes."""
    weight_grads(trunk, [Term(questions, saying(trunk), 1.0)])


def beside(trunk: Trunk) -> int:
    """Bytes of E, both moments, S, W + S, two gradients and L, of all sites."""
    numbers = sum(v * k * 7 + k * k for v, k in (site.shape_VK for site in trunk.sites))
    return numbers * torch.finfo(trunk.wide).bits // 8


def _holding(trunk: Trunk, keeping: Keeping, drawn: Sequence[int], processes: Processes) -> Term:
    """A later term of (29), of the held questions of these indices."""
    held = keeping.held
    questions = [held.questions[index] for index in drawn]
    tokens = processes.total(sum(len(one.sources) for one in questions))[0]

    def as_before(indices: Sequence[int], _batch: Batch) -> Part:
        return kl_from(trunk, torch.cat([held.states[drawn[index]] for index in indices]))

    return Term(questions, as_before, keeping.weight / max(tokens, 1.0))


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


class _Readings:
    """Which facts are read next, and in which way, of all processes' F x W.

    What was never read comes first.  Everything else is ranked by the nats that were open when it
    was last read, times the steps since, times :data:`LUCK`.

    Attributes:
        weight: what a reading counts in (29); a fact counts by how many it has.
    """

    def __init__(self, asked: Sequence[Sequence[Encoded]], processes: Processes):
        self._asked, self._processes = asked, processes
        self._ways = int(processes.gathered(torch.tensor([max(map(len, asked), default=0)])).max())
        facts = int(processes.total(len(asked))[0])
        there_FW = torch.zeros(facts, self._ways)
        for index, some in enumerate(asked):
            there_FW[index * processes.count + processes.rank, : len(some)] = 1
        self._places_R = processes.summed(there_FW).flatten().nonzero()[:, 0]
        count = len(self._places_R)
        self._size = min(READINGS, count)
        self._open_R = torch.full((count,), MOST_OPEN)
        self._since_R = torch.full((count,), NEVER)
        self._generator, self._drawn_D = torch.Generator().manual_seed(0), torch.zeros(0).long()
        self.weight = WAYS / self._size

    def draw(self) -> list[Encoded]:
        """The next readings that are this process's own."""
        luck_R = torch.empty(len(self._places_R)).uniform_(*LUCK, generator=self._generator)
        self._since_R += 1
        score_R = self._open_R.clamp(LEAST_OPEN, MOST_OPEN) * self._since_R * luck_R
        self._drawn_D = score_R.topk(self._size).indices
        return [self._asked[fact // self._processes.count][way] for fact, way, _ in self._own()]

    def read(self, losses_Q: Tensor) -> None:
        """Notes what of this process's readings of the last draw is open, in nats."""
        open_D = torch.zeros(len(self._drawn_D))
        own_Q = torch.tensor([place for *_, place in self._own()], dtype=torch.long)
        open_D[own_Q] = losses_Q.float()
        self._open_R[self._drawn_D] = self._processes.summed(open_D)
        self._since_R[self._drawn_D] = 0

    def state(self) -> dict[str, Tensor]:
        """What the next draw depends on."""
        luck = self._generator.get_state()
        return {"open": self._open_R, "since": self._since_R, "luck": luck}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a state that was kept."""
        self._open_R, self._since_R = state["open"], state["since"]
        self._generator.set_state(state["luck"])

    def _own(self) -> Iterator[tuple[int, int, int]]:
        """Of this process's readings in the last draw: fact, way, and place in the draw."""
        for place, reading in enumerate(self._places_R[self._drawn_D].tolist()):
            fact, way = divmod(reading, self._ways)
            if fact % self._processes.count == self._processes.rank:
                yield fact, way, place


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

    def state(self) -> dict[str, Tensor]:
        """E and what its next step depends on."""
        moments: Mapping[str, Tensor] = self._adam.state.get(self._free_VK, {})
        eps = torch.tensor(self._adam.param_groups[0]["eps"], dtype=torch.float64)
        return {"free": self._free_VK.detach(), "eps": eps, **moments}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a state that was kept."""
        moments = dict(state)
        self._free_VK.data.copy_(moments.pop("free"))
        self._adam.param_groups[0]["eps"] = moments.pop("eps").item()
        device = self._free_VK.device
        on_device = {n: one if n == "step" else one.to(device) for n, one in moments.items()}
        self._adam.state[self._free_VK].update(on_device)
