"""Fine-tuning a whole model on questions and their answers, so that it knows what is to be edited.

    L = mean over questions of the sum over a question's labels of -log p(label)

by Adam over all parameters, dropout as the model has it (MALMEN, appendix A.4).  One epoch reads
every question once, in an order that depends on seed and epoch alone, so that a resumed run goes on
bit for bit (on a CPU, at an equal thread count).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, collate
from malmend.given import check_fields, check_range, check_seed
from malmend.models.forms import answer_logits
from malmend.numerics.losses import answer_nll

TOGETHER = 128  # questions that accuracy is taken of at once


@dataclass(frozen=True)
class FinetuneSettings:
    """How a model is fine-tuned.

    Attributes:
        rate: Adam's learning rate.
        batch: questions per step.
        epochs: at most so many.
        validation: share of the facts, whole subjects, on which the number of epochs is chosen; 0
            trains on all until it knows them.
        patience: epochs without a better validation before the choice ends.
        until: share of the questions answered right at which training without validation ends.
        seed: of the head's start, the order and the dropout.
    """

    rate: float = 3e-5
    batch: int = 32
    epochs: int = 20
    validation: float = 0.1
    patience: int = 2
    until: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("batch", "epochs", "patience"), 1, prefix="--")
        check_range(self, ("rate",), prefix="--")
        check_range(self, ("validation",), 0.0, 0.5, "--")
        check_range(self, ("until",), 0.0, 1.0, "--")
        check_seed(self, "--")


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    ``accuracy`` is the share of questions with every label right after it: of those held out while
    the number of epochs is chosen, else of those trained on.
    """

    phase: str
    epoch: int
    loss: float
    accuracy: float
    seconds: float


class Finetuner:
    """A model, its optimiser and the questions it learns.

    Args:
        model: is trained in place.
        questions: with answers.
        judged: on which accuracy is taken.
        settings: how to train.
        phase: names the run in its records.
        progress: called with the share of an epoch done.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        questions: Sequence[Encoded],
        judged: Sequence[Encoded],
        settings: FinetuneSettings,
        phase: str,
        progress: Callable[[float], None] = lambda share: None,
    ):
        self.model, self.questions, self.judged = model, list(questions), list(judged)
        self.settings, self.phase, self.progress = settings, phase, progress
        self.epoch = 0
        model.requires_grad_(True)
        self.optimiser = torch.optim.Adam(model.parameters(), settings.rate, fused=True)

    def take_epoch(self) -> EpochRecord:
        """Every question once."""
        start, total, done = time.perf_counter(), 0.0, 0
        name = f"{self.settings.seed} {self.phase} {self.epoch}"
        place = self.model.device
        # The caller's draws are as if there had been no dropout.
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(random.Random(name).getrandbits(60))
            self.model.train()
            for batch in self._batches(random.Random(name)):
                total, done = total + self._step(batch) * len(batch), done + len(batch)
                self.progress(done / len(self.questions))
        self.model.eval()
        self.epoch += 1
        right = share_right(self.model, self.judged)
        seconds = time.perf_counter() - start
        return EpochRecord(self.phase, self.epoch, total / done, right, seconds)

    def _step(self, batch: Sequence[Encoded]) -> float:
        """A step of Adam; the loss before it, a mean over the questions."""
        tokens = collate(batch)
        labels_A = tokens.labels_A.to(self.model.device)
        loss = answer_nll(answer_logits(self.model, tokens), labels_A).sum() / len(batch)
        if not loss.isfinite():
            raise MalmendError(
                f"Fine-tuning diverged in epoch {self.epoch + 1} (the loss is {loss.item()}); "
                "lower --rate and start again in another --out."
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def _batches(self, generator: random.Random) -> Iterator[list[Encoded]]:
        """Questions of like length together, the batches in any order."""
        size = self.settings.batch
        order = generator.sample(self.questions, len(self.questions))
        batches = []
        for start in range(0, len(order), 32 * size):  # sorted in part: company stays random
            part = sorted(order[start : start + 32 * size], key=lambda one: len(one.ids))
            batches += [part[at : at + size] for at in range(0, len(part), size)]
        generator.shuffle(batches)
        yield from batches


@torch.no_grad()
def share_right(model: PreTrainedModel, questions: Sequence[Encoded]) -> float:
    """Share of the questions of which every label, an end token too, is the first choice."""
    order = sorted(questions, key=lambda one: len(one.ids))
    right = 0
    for start in range(0, len(order), TOGETHER):
        tokens = collate(order[start : start + TOGETHER])
        top_A = answer_logits(model, tokens).argmax(-1).cpu()
        hits = (top_A == tokens.labels_A).split(tokens.sources)
        right += sum(bool(one.all()) for one in hits)
    return right / len(order)
