"""Training the base of ENN: equation 5 of MEND's appendix, through the inner steps (enn.py)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from malmend.editors.folder import whole, write_folder
from malmend.editors.resuming import (
    AGAIN,
    FILE,
    check_run,
    check_same,
    moments_of,
    read_training,
    run_of,
    save_training,
    state_with,
)
from malmend.editors.training_facts import check_trainable, drawn
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.files import writable_folder
from malmend.methods.enn import (
    EnnSettings,
    Weights,
    checked,
    copies,
    descended,
    held,
    products,
    shapes_of,
    slope_at,
)
from malmend.numerics.losses import kl_per_token
from malmend.workbench import Workbench

Asked = tuple[Question, Question, Question]  # of a fact: prompt, equivalent, unrelated


@dataclass(frozen=True)
class EnnRecord:
    """One finished step; losses in nats per fact, as they were before it."""

    step: int
    loss: float
    base: float
    edit: float
    loc: float
    seconds: float


class EnnTrainer:
    """A base in training; the model on the bench, cut at ``settings.sites_in``, stays as it is.

    ``locality`` are unrelated questions; where empty, each fact's own are used.

    Raises:
        EditorError: too few facts, or one without an unrelated question.
    """

    def __init__(
        self,
        settings: EnnSettings,
        bench: Workbench,
        facts: Sequence[Fact],
        locality: Sequence[Question] = (),
    ):
        self.settings, self.bench, self.trunk, self.step = settings, bench, bench.trunk, 0
        self.facts, self.locality = list(facts), list(locality)
        size = settings.facts_per_step
        check_trainable(self.facts, self.locality, size, "enn.facts_per_step")
        self.weights = [nn.Parameter(weight) for weight in copies(self.trunk)]
        start_S = torch.full((len(self.weights),), math.log(settings.inner_rate))
        self.log_rates_S = nn.Parameter(start_S.to(self.weights[0]))
        self.parameters = [*self.weights, self.log_rates_S]  # in the optimiser's order
        rates = [settings.rate] * len(self.weights) + [settings.scalar_rate]
        pairs = zip(self.parameters, rates, strict=True)
        self.optimiser = torch.optim.Adam([{"params": [one], "lr": rate} for one, rate in pairs])

    def run(self) -> Iterator[EnnRecord]:
        """Trains from the present step to the last, yielding after each."""
        while self.step < self.settings.steps:
            yield self.take_step()

    def draw(self, step: int) -> list[Asked]:
        """What is asked of the facts of a step; depends on seed and step alone."""
        size, seed = self.settings.facts_per_step, self.settings.seed
        choose, asked = random.Random(f"{seed} step {step}"), []
        for fact in drawn(self.facts, size, seed, step):
            equivalent = choose.choice(fact.equivalents or (fact.question,))
            unrelated = choose.choice(self.locality or fact.unrelated or fact.neighbours)
            asked.append((fact.question, equivalent, unrelated))
        return asked

    def take_step(self) -> EnnRecord:
        """One step of Adam.

        Raises:
            MalmendError: the loss or its gradient is not finite; nothing has changed.
        """
        start = time.perf_counter()
        base, edit, loc = self.differentiate(self.draw(self.step))
        loss = base + self.settings.c_edit * edit + self.settings.c_loc * loc
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise MalmendError(
                f"Training diverged at step {self.step + 1} (the loss is {loss}, its gradient's "
                f"norm {norm}); lower enn.rate, enn.scalar_rate or enn.inner_rate and "
                "start again in another --out."
            )
        self.optimiser.step()
        self.step += 1
        return EnnRecord(self.step, loss, base, edit, loc, time.perf_counter() - start)

    def differentiate(self, drawn: Sequence[Asked]) -> tuple[float, float, float]:
        """L_base, L_edit and L_loc; their gradient goes to the parameters' ``grad``."""
        encode, c_edit = self.bench.encoder.encode_all, self.settings.c_edit
        prompts, equivalents, unrelated = map(encode, zip(*drawn, strict=True))
        rates_S, steps = self.log_rates_S.detach().exp(), self.settings.inner_steps
        path, slopes, _ = descended(self.trunk, self.weights, rates_S, prompts, steps)
        edit, at_last = slope_at(self.trunk, path[-1], equivalents)
        base, loc, direct, disturbed = self._locality(path[-1], unrelated)
        down = [c_edit * one + other for one, other in zip(at_last, disturbed, strict=True)]
        self.log_rates_S.grad = torch.zeros_like(self.log_rates_S)
        for weights, slope in zip(reversed(path[:-1]), reversed(slopes), strict=True):
            along = [rate * one for rate, one in zip(rates_S, down, strict=True)]
            self.log_rates_S.grad -= products(along, slope)
            curved = slope_at(self.trunk, weights, prompts, along)[1]
            down = [one - other for one, other in zip(down, curved, strict=True)]
        for weight, one, other in zip(self.weights, down, direct, strict=True):
            weight.grad = one + other
        return base, edit, loc

    @torch.enable_grad()
    def _locality(
        self, edited: Weights, unrelated: Sequence[Encoded]
    ) -> tuple[float, float, Weights, Weights]:
        """L_base, L_loc, and the gradient of both, weighted, at W and at W_k."""
        leaves = [one.detach().requires_grad_() for one in (*self.weights, *edited)]
        totals, base, loc = [torch.zeros_like(one) for one in leaves], 0.0, 0.0
        known, count = self.trunk.unedited_states(unrelated), len(unrelated)
        for indices, batch in self.trunk.batches(unrelated):
            states_AH = torch.cat([known[i] for i in indices]).to(self.trunk.model.device)
            with torch.no_grad():
                original_AW = self.trunk.logits_of(states_AH)
            with held(self.trunk.sites, leaves[: len(edited)]):
                trained_AW = self.trunk.logits(batch)
            with held(self.trunk.sites, leaves[len(edited) :]):
                edited_AW = self.trunk.logits(batch)
            kept = kl_per_token(original_AW, trained_AW).sum() / count
            moved = kl_per_token(trained_AW, edited_AW).sum() / count
            grads = torch.autograd.grad(kept + self.settings.c_loc * moved, leaves)
            totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
            base, loc = base + kept.item(), loc + moved.item()
        return base, loc, totals[: len(edited)], totals[len(edited) :]

    def save(self, folder: str | Path) -> None:
        """Writes the folder that :class:`Enn` reads, and in it what resuming needs."""
        folder = writable_folder(folder)
        moved = zip(self.trunk.sites, self.weights, copies(self.trunk), strict=True)
        tensors = {s.name: s.oriented(one.detach() - before).float() for s, one, before in moved}
        tensors["log_rates"] = self.log_rates_S.detach()
        about = {
            "method": "enn",
            "settings": asdict(self.settings),
            "sites": shapes_of(self.trunk),
            "seed": self.settings.seed,
            "step": self.step,
            **self._run,
        }
        state = {f"{i}.value": one.detach() for i, one in enumerate(self.parameters)}
        save_training(state | moments_of(self.optimiser), about, folder)
        write_folder(tensors, about, folder)

    def resume(self, folder: str | Path) -> dict[str, Any]:
        """Goes on from what :meth:`save` wrote, bit for bit on a CPU; returns what it said.

        Raises:
            EditorError: the file is damaged, or of another run; nothing has changed.
        """
        path = Path(folder) / FILE
        with whole(path, AGAIN):
            about, found = read_training(path)
            check_run(about, self._run, Path(folder))
            check_same(about, {"settings": asdict(self.settings)}, path)
            step, each = int(about["step"]), list(enumerate(self.parameters))
            state = state_with(self.optimiser, found, range(len(each) if step else 0))
            checked(found, {f"{i}.value": [*one.shape] for i, one in each})
        for i, one in each:
            one.data.copy_(found[f"{i}.value"])
        self.optimiser.load_state_dict(state)
        self.step = step
        return about

    @property
    def _run(self) -> dict[str, Any]:
        return run_of(self.bench.loaded, self.facts, self.locality)
