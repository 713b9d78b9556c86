"""Training KE: its network by Adam, the multiplier of the KL's bound by ascent (ke.py)."""

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
from malmend.editors.metaloss import Judged, meta_loss
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
from malmend.errors import EditorError
from malmend.facts.fact import Fact, Question
from malmend.methods.ke import KeSettings, Network, fill, heard, shifts_of
from malmend.patch import shifted
from malmend.workbench import Workbench

CLIP = 1.0  # largest norm of a step's gradient
Drawn = tuple[Question, Question, Question]  # an edit, an equivalent question, an unrelated one


@dataclass(frozen=True)
class KeRecord:
    """One finished step, in nats per fact; multiplier and network as they were before it."""

    step: int
    loss: float
    gen: float
    loc: float
    multiplier: float
    margin: float
    seconds: float


class KeTrainer:
    """A network, its optimiser and multiplier, and the facts and questions that it learns from.

    Without ``locality`` each fact's own unrelated questions serve, or its neighbours.  The bench is
    cut at the sites of the settings.
    """

    def __init__(
        self,
        settings: KeSettings,
        bench: Workbench,
        facts: Sequence[Fact],
        locality: Sequence[Question],
    ):
        self.settings, self.bench = settings, bench
        self.facts, self.locality = list(facts), list(locality)
        self.step, self.multiplier = 0, 1.0
        size = settings.facts_per_step
        check_trainable(self.facts, self.locality, size, "ke.facts_per_step")
        width = heard(bench, bench.encoder.encode(self.facts[0].question))[0].shape[1]
        sites = {site.name: site.shape_VK for site in bench.trunk.sites}
        self.network = Network(settings, width, sites)
        self.optimiser = torch.optim.Adam(self.network.parameters(), settings.rate)

    def run(self) -> Iterator[KeRecord]:
        """Trains from the present step to the last, yielding after each."""
        while self.step < self.settings.steps:
            yield self.take_step()

    def take_step(self) -> KeRecord:
        """Descends in the network, ascends in the multiplier."""
        start, multiplier = time.perf_counter(), self.multiplier
        settings = self.settings
        margin = max(settings.floor, settings.margin * settings.decay**self.step)
        self.optimiser.zero_grad()
        gen, loc = self.backward(self.draw(self.step))
        loss = gen + multiplier * (loc - margin)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP).item()
        if not math.isfinite(loss + norm):
            raise EditorError(
                f"Training diverged at step {self.step + 1} (loss {loss}, gradient {norm}); "
                "lower ke.rate or ke.start and start again in another --out."
            )
        self.optimiser.step()
        self.multiplier = max(0.0, multiplier + settings.multiplier_rate * (loc - margin))
        self.step += 1
        seconds = time.perf_counter() - start
        return KeRecord(self.step, loss, gen, loc, multiplier, margin, seconds)

    def draw(self, step: int) -> list[Drawn]:
        """A step's facts, in a new order each epoch; the prompt is one of its equivalents."""
        size, seed = self.settings.facts_per_step, self.settings.seed
        choice, asked = random.Random(f"{seed} step {step}").choice, list[Drawn]()
        for fact in drawn(self.facts, size, seed, step):
            others = self.locality or fact.unrelated or fact.neighbours
            equivalent = choice((fact.question, *fact.equivalents))
            asked.append((fact.question, equivalent, choice(others)))
        return asked

    def backward(self, drawn: Sequence[Drawn]) -> tuple[float, float]:
        """Adds the network's gradient of a step's loss; returns the means of its two parts.

        Questions go alone, so that no rounding depends on what the trunk has kept.
        """
        trunk, gen, loc = self.bench.trunk, 0.0, 0.0
        for edit, equivalent, other in map(self.bench.encoder.encode_all, drawn):
            (known_AH,) = trunk.unedited_states([other])
            shifts = shifts_of(self.network, self.bench, edit)
            with shifted(trunk.sites, {name: one.detach() for name, one in shifts.items()}):
                loss = meta_loss(trunk, [Judged(equivalent, other, known_AH)], self.multiplier)
            proxy = [(one * loss.shift_grads[name].to(one)).sum() for name, one in shifts.items()]
            (torch.stack(proxy).sum() / len(drawn)).backward()
            gen, loc = gen + loss.gen / len(drawn), loc + loss.loc / len(drawn)
        return gen, loc

    def save(self, folder: str | Path) -> None:
        """Writes three files, each whole; resuming reads ``training.safetensors`` alone."""
        folder, tensors = Path(folder), self.network.state_dict()
        about = {
            "method": "ke",
            "settings": asdict(self.settings),
            "step": self.step,
            "sites": self.network.sites,
            **self._run,
        }
        state = {f"network.{name}": one for name, one in tensors.items()}
        state |= moments_of(self.optimiser)
        save_training(state, {**about, "multiplier": self.multiplier}, folder)
        write_folder({name: one.float() for name, one in tensors.items()}, about, folder)

    def resume(self, folder: str | Path) -> dict[str, Any]:
        """Goes on from what :meth:`save` wrote; returns what it said about the run.

        Raises:
            EditorError: it is damaged, or of another run.
        """
        path = Path(folder) / FILE
        with whole(path, AGAIN):
            about, tensors = read_training(path)
            check_run(about, self._run, Path(folder))
            check_same(about, {"settings": asdict(self.settings)}, path)
            step, multiplier = int(about["step"]), float(about["multiplier"])
            count = len(list(self.network.parameters()))  # all have moments from the first step on
            state = state_with(self.optimiser, tensors, range(count if step else 0))
            if not 0 <= multiplier < math.inf:
                raise ValueError(f"its multiplier is {multiplier}")
            weights = {key.removeprefix("network."): one for key, one in tensors.items()}
            fill(self.network, weights)
            self.optimiser.load_state_dict(state)
        self.step, self.multiplier = step, multiplier
        return about

    @property
    def _run(self) -> dict[str, Any]:
        return run_of(self.bench.loaded, self.facts, self.locality)
