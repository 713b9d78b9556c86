"""An edit settled: its shift descended by what the edited model says, from its solves on.

A least-squares solution asks every value to be near what its token needs, though many are far
beyond it, and what it moves besides is known in the mean alone.  From there on the shift itself is
descended by what counts,

    L(S) = WAYS * mean over readings of the sum of nll_t over answer tokens with nll_t > SAID
         + hold * mean over held tokens of KL(p_t || p'_t)
         + hold * the same over what the model surely says of other subjects,                   (29)

in the metric of the prior: with P_l = L_l L_l^T of equation (1) and S_l = E_l L_l^-1, by Adam on
E_l, whose steps are relative to the root mean square of what the solves found and fall linearly to
nothing.  So a step is small where text and other questions have many keys.

It starts from :data:`START` times what the solves found.  What they move besides is undone only
where something is held, and what is not held of it stays: half a shift moves a quarter as much, and
the facts are soon said again.

Not only the layers that were solved for settle.  A feed-forward layer's output is edited by keys
in which a subject is hard to tell by a straight line; what the attention gives and the first layer
reads tells it better.  So these layers settle too, from E_l = 0, in steps of as great a part of
W_l L_l as the solved layers' have of theirs in the mean, E_k what the solves found:

    rate_l = RATE * rms(W_l L_l) * mean over solved layers k of rms(E_k) / rms(W_k L_k)         (30)

The facts are read as they are, in every frame and in other words (wordings.py).  With them go some
of the held questions and lines (restore.py), and some of what the model surely says of other
subjects (known.py); draws.py says which, in each step.  Not in the papers.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from malmend.editors import draws
from malmend.editors.draws import Readings, in_turns
from malmend.editors.halfway import Halfway
from malmend.editors.restore import Held
from malmend.facts.encoded import Encoded
from malmend.models.output import Part, kl_from
from malmend.models.trunk import Batch, Trunk
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.numerics.prior import Prior
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

SAID = 0.05  # nats below which an answer token is said surely enough
START = 0.5  # of the solved shift is started from
RATE, BETAS, TINY = 0.06, (0.9, 0.98), 1e-6
NUMBERS = (*draws.NUMBERS, SAID, START, RATE, *BETAS, TINY)


@dataclass(frozen=True)
class Keeping:
    """What should be said as before: how many of it are in a step, and what it weighs."""

    held: Held
    each: int
    weight: float


def settle(
    trunk: Trunk,
    priors: Mapping[str, Prior],
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
        trunk: the cut model, unedited; all of its sites settle.
        priors: the metric, by site.
        shifts: what the solves found, V x K, by site; a site that has none starts at zero.
        asked: of each fact its prompt, and the same in other ways; of ``processes`` this one's.
        steps: how many.
        keeping: what should be said as before; of ``processes`` this one's.
        progress: called with 1 after each step, at first with those that were taken before.
        processes: that facts and held questions are spread over.
        halfway: where it goes on from, and is kept; None for nowhere.

    Returns:
        The shifts in float64, of NaN where a step gave it, which is the last then.  The same draws
        are made of however many processes, but for rounding of what is open.
    """
    metric = _metric(trunk, priors, shifts)
    readings = Readings(asked, processes, steps)
    sizes = [int(processes.total(len(one.held.questions))[0]) for one in keeping]
    others = [in_turns(n, one.each, processes) for n, one in zip(sizes, keeping, strict=True)]
    parts: dict[str, _Metric | Readings] = {"readings": readings, **metric}
    first = _go_on(parts, halfway)
    if first:
        progress(first)
    for step, *some_of_each in zip(
        range(first, steps), *(islice(one, first, None) for one in others), strict=False
    ):
        terms = [Term(readings.draw(), saying(trunk, SAID), readings.weight)]
        for one, some in zip(keeping, some_of_each, strict=True):
            terms.append(_holding(trunk, one, some, processes))
        current = {name: one.shift() for name, one in metric.items()}
        with shifted(trunk.sites, current):
            losses, grads = weight_grads(trunk, terms)
        readings.read(losses[0])
        for site in trunk.sites:
            grad_VK = grads.get(site.name)
            grad_VK = torch.zeros(site.shape_VK, dtype=trunk.wide) if grad_VK is None else grad_VK
            metric[site.name].step(processes.summed(grad_VK), 1 - step / steps)
        if any(one.broken for one in metric.values()):
            break  # no step mends it, and it is not to be gone on from
        progress(1)
        if halfway is not None:
            halfway.keep(step + 1, lambda: _state(parts), is_last=step + 1 == steps)
    return {name: one.shift().cpu().double() for name, one in metric.items()}


def _metric(
    trunk: Trunk, priors: Mapping[str, Prior], shifts: Mapping[str, Tensor]
) -> dict[str, _Metric]:
    """E of every site."""
    device, found = trunk.model.device, dict[str, _Metric]()
    for site in trunk.sites:
        shift_VK = shifts.get(site.name, torch.zeros(site.shape_VK))
        weight_VK = site.oriented(site.weight.detach())
        found[site.name] = _Metric(
            priors[site.name], shift_VK.to(device, trunk.wide), weight_VK.to(device, trunk.wide)
        )
    solved = [found[name].share for name in shifts]
    for name in found.keys() - shifts.keys():
        found[name].share = sum(solved) / len(solved)
    return found


def _state(parts: Mapping[str, _Metric | Readings]) -> dict[str, Tensor]:
    """All that the next step depends on, by part and name."""
    return {f"{part} {n}": kept for part, one in parts.items() for n, kept in one.state().items()}


def _go_on(parts: Mapping[str, _Metric | Readings], halfway: Halfway | None) -> int:
    """Takes up what was kept halfway; after how many steps that was."""
    steps, kept = halfway.found(_state(parts)) if halfway is not None else (0, {})
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


def settling_bytes(trunk: Trunk, held: Sequence[Encoded]) -> int:
    """Bytes of E, both moments, S, W + S, two gradients and L, of all sites, and of what is held.

    That is what the output layer reads of these questions, as :class:`Held` keeps it.  On an
    accelerator all but this lies there, and of E and its moments a copy is made to be kept.
    """
    shapes = [site.shape_VK for site in trunk.sites]
    here = trunk.model.device.type == "cpu"
    numbers = sum(v * k * 7 + k * k if here else v * k * 3 for v, k in shapes)
    states = sum(len(one.sources) for one in held) * trunk.states_width
    return numbers * trunk.wide.itemsize + states * trunk.model.dtype.itemsize


def _holding(trunk: Trunk, keeping: Keeping, chosen: Sequence[int], processes: Processes) -> Term:
    """A later term of (29), of the held questions of these indices."""
    held = keeping.held
    questions = [held.questions[index] for index in chosen]
    tokens = processes.total(sum(len(one.sources) for one in questions))[0]

    def as_before(indices: Sequence[int], _batch: Batch) -> Part:
        return kl_from(trunk, torch.cat([held.states[chosen[index]] for index in indices]))

    return Term(questions, as_before, keeping.weight / max(tokens, 1.0))


class _Metric:
    """E of one site, and its optimiser.

    Args:
        prior: P = L L^T.
        shift_VK: S that the solves found.
        weight_VK: W.

    Attributes:
        share: rms(E) / rms(W L) of what they found, or what is to stand for it: of (30).

    Raises:
        MalmendError: P is singular.
    """

    def __init__(self, prior: Prior, shift_VK: Tensor, weight_VK: Tensor):
        eye_KK = torch.eye(shift_VK.shape[1], dtype=torch.float64)
        # Of a multiple of the identity the size does not matter: steps are relative.
        self._root_KK = (eye_KK if prior.is_identity else prior.factor()).to(shift_VK)
        solved_VK = shift_VK @ self._root_KK
        self._free_VK = torch.nn.Parameter(START * solved_VK)
        self._whole = (weight_VK @ self._root_KK).square().mean().sqrt().item() or 1.0
        self.share = solved_VK.square().mean().sqrt().item() / self._whole
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
        self._free_VK.grad, group["lr"] = grad_VK, RATE * self.share * self._whole * share
        self._adam.step()
        self._free_VK.grad = None

    @property
    def broken(self) -> bool:
        """Whether E holds NaN or infinity."""
        return not bool(self._free_VK.isfinite().all())

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
