"""Training an editor: Algorithm 2 of MALMEN, for both aggregations, and MEND's training.

One step takes m facts: capture (unedited model, kept on disk, for neither key nor value gradient
ever changes), transform and aggregate without a graph, put the shift on the model, take the
meta-loss on one paraphrase and one unrelated question per fact, and carry its gradient back through
the same factor into the network, chunk by chunk.  Nothing is printed here: every step is yielded.

What a step draws depends on the seed and the step's number alone, so a resumed run needs no
generator's state, and goes on bit for bit (on a CPU, at an equal thread count).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malmend.editors.checkpoint import check_finite
from malmend.editors.editor import Editor
from malmend.editors.folder import whole
from malmend.editors.metaloss import Judged, MetaLoss, meta_loss
from malmend.editors.pairs import TOGETHER, Pairs
from malmend.editors.resuming import (
    AGAIN,
    FILE,
    check_same,
    moments_of,
    read_training,
    save_training,
    state_with,
)
from malmend.editors.train_settings import TrainSettings
from malmend.editors.training_facts import check_trainable, drawn
from malmend.errors import EditorError, MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.budget import rows_of
from malmend.models.store import ActivationStore
from malmend.models.trunk import Trunk
from malmend.patch import shifted
from malmend.processes import ALONE, Processes

WEIGHTS = "editor."  # before the names of an editor's tensors in the file of a run


@dataclass(frozen=True)
class StepRecord:
    """One finished step; losses in nats per fact, of the editor as it was before the step.

    ``loss`` is gen + locality weight * loc; ``eta`` and the prior's ``weights`` are means over
    sites.
    """

    step: int
    loss: float
    gen: float
    loc: float
    grad_norm: float
    eta: float
    weights: tuple[float, ...]
    seconds: float


class Trainer:
    """An editor, its optimiser and the facts it learns from.

    Args:
        editor: is trained in place.
        trunk: the unedited model, cut at the editor's sites.
        encoder: as the edits are encoded.
        facts: each with paraphrases (where it has none, its own prompt serves).
        locality: unrelated questions; where empty, each fact's own are used.
        settings: how to train.
        store: where captured pairs are kept between epochs, a number per row.
        processes: that the facts of each step are spread over; each has an editor of its own, and
            they stay alike.
    """

    def __init__(
        self,
        editor: Editor,
        trunk: Trunk,
        encoder: Encoder,
        facts: Sequence[Fact],
        locality: Sequence[Question],
        settings: TrainSettings,
        store: ActivationStore,
        processes: Processes = ALONE,
    ):
        editor.check_fits(trunk.sites)
        self.editor, self.trunk, self.encoder = editor, trunk, encoder
        self.facts, self.locality, self.settings = list(facts), list(locality), settings
        self.processes = processes
        self.pairs = Pairs(trunk, encoder, editor.settings, store)
        self.step = 0
        if settings.facts_per_step >> settings.halvings < processes.count:
            raise MalmendError(
                f"A step may edit {settings.facts_per_step >> settings.halvings} facts and there "
                f"are {processes.count} processes, which need one each; raise --facts-per-step, or "
                "start fewer."
            )
        check_trainable(self.facts, self.locality, settings.facts_per_step, "--facts-per-step")
        scalars = [
            editor.log_eta_S,
            editor.log_weights_SP,
            editor.powers_SP,
            editor.log_ridge_S,
            editor.log_end_weight_S,
        ]
        groups = [{"params": scalars, "lr": settings.scalar_rate}]
        if network := list(editor.networks.parameters()):
            groups.append({"params": network, "lr": settings.network_rate})
        self.optimiser = torch.optim.Adam(groups)

    def run(self) -> Iterator[StepRecord]:
        """Trains from the present step to the last, yielding after each."""
        while self.step < self.settings.steps:
            yield self.take_step()

    def take_step(self) -> StepRecord:
        """One step of Algorithm 2."""
        start = time.perf_counter()
        all_facts, all_questions = self.draw(self.step)
        facts, questions = self.processes.share(all_facts), self.processes.share(all_questions)
        judged = self.judged(questions)
        eta = self.editor.log_eta_S.exp().mean().item()
        weights = tuple(self.editor.log_weights_SP.exp().mean(0).tolist())
        self._check_finite("eta", eta)
        for term, weight in zip(self.editor.terms, weights, strict=True):
            self._check_finite(f"the prior's weight of {term}", weight)
        self.optimiser.zero_grad(set_to_none=True)
        if self.editor.settings.method == "mend-single":
            (count,) = self.processes.total(len(facts))
            pairs = zip(facts, judged, strict=True)
            parts = [self._judge([fact], [one], ALONE, 1 / count) for fact, one in pairs]
            sums = (math.fsum(one.gen for one in parts), math.fsum(one.loc for one in parts))
            gen, loc = (one / count for one in self.processes.total(*sums))
        else:
            loss = self._judge(facts, judged, self.processes, 1.0)
            gen, loc = loss.gen, loss.loc
        for parameter in self.editor.parameters():
            if parameter.grad is not None:
                parameter.grad = self.processes.summed(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.editor.parameters(), self.settings.clip)
        self._check_finite("the meta-gradient's norm", norm.item())
        self.optimiser.step()
        self.step += 1
        return StepRecord(
            step=self.step,
            loss=gen + self.settings.locality_weight * loc,
            gen=gen,
            loc=loc,
            grad_norm=norm.item(),
            eta=eta,
            weights=weights,
            seconds=time.perf_counter() - start,
        )

    def _judge(
        self, facts: Sequence[Fact], judged: Sequence[Judged], processes: Processes, share: float
    ) -> MetaLoss:
        """Edits the facts together, and adds ``share`` of their loss's gradient to the editor's."""
        captured, chunk = self.pairs.of(facts), self.settings.chunk
        aggregations = self.editor.aggregate(captured, chunk, processes)
        shifts = {
            name: one.shift() for name, one in zip(self.editor.names, aggregations, strict=True)
        }
        with shifted(self.trunk.sites, shifts):
            loss = meta_loss(self.trunk, judged, self.settings.locality_weight, processes=processes)
        self._check_finite("the meta-loss", loss.total)
        grads = {name: share * grad_VK for name, grad_VK in loss.shift_grads.items()}
        self.editor.backward(captured, aggregations, grads, chunk, processes)
        return loss

    def draw(self, step: int) -> tuple[list[Fact], list[tuple[Question, Question]]]:
        """The facts of a step, each with one equivalent and one unrelated question.

        Of those that are :func:`drawn` a step's halving takes off a part.
        """
        size, seed = self.settings.facts_per_step, self.settings.seed
        halved = random.Random(f"{seed} size {step}").randint(0, self.settings.halvings)
        facts = drawn(self.facts, size, seed, step)[: size >> halved]
        choose = random.Random(f"{seed} step {step}")
        questions = []
        for fact in facts:
            equivalent = choose.choice(fact.equivalents or (fact.question,))
            far, near = self.locality or fact.unrelated, fact.neighbours
            if near and not (far and choose.random() >= self.settings.near):
                far = near
            questions.append((equivalent, choose.choice(far)))
        return facts, questions

    def judged(self, questions: Sequence[tuple[Question, Question]]) -> list[Judged]:
        """The questions of a step, ready for the meta-loss; the model must be unedited."""
        unrelated = self.encoder.encode_all(pair[1] for pair in questions)
        states = self.trunk.unedited_states(unrelated)
        return [
            Judged(self.encoder.encode(pair[0]), other, known)
            for pair, other, known in zip(questions, unrelated, states, strict=True)
        ]

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise MalmendError(
                f"Training diverged at step {self.step + 1} ({name} is {value}); "
                "lower --network-rate or --scalar-rate and start again in another --out."
            )

    def save(self, folder: Path, about: Mapping[str, object]) -> None:
        """Writes all that resuming needs to ``training.safetensors``, whole or not at all."""
        tensors = {f"{WEIGHTS}{n}": one for n, one in self.editor.state_dict().items()}
        moments = sorted(self.optimiser.state_dict()["state"])
        said = {"step": self.step, "moments": moments, **self._mine, **about}
        save_training(tensors | moments_of(self.optimiser), said, folder)

    def resume(self, folder: Path) -> dict[str, Any]:
        """Goes on from what :meth:`save` wrote; returns what it said about the run.

        Raises:
            EditorError: the file is damaged, or was written under other settings; nothing has
                changed.
        """
        path = folder / FILE
        with whole(path, AGAIN):
            about, tensors = read_training(path)
            check_same(about, self._mine, path)
            step = about["step"]
            if type(step) is not int or step < 1:
                raise ValueError(f"it stands at step {step!r}")
            check_finite(tensors)
            state = state_with(self.optimiser, tensors, about.get("moments"))
            self._take_weights({k.removeprefix(WEIGHTS): t for k, t in tensors.items()}, path)
            self.optimiser.load_state_dict(state)
        self.step = step
        return about

    def _take_weights(self, weights: Mapping[str, Tensor], path: Path) -> None:
        try:
            self.editor.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise EditorError(
                f"{path} holds an editor for layers of another shape; give the same model, or "
                "another --out."
            ) from error

    @property
    def _mine(self) -> dict[str, dict[str, Any]]:
        """The settings that a run is resumed under."""
        return {"settings": asdict(self.settings), "editor": asdict(self.editor.settings)}


def estimate_seconds(trainer: Trainer, sample: int = 24) -> float:
    """How long the remaining steps will take, from one rehearsed step on a few facts.

    The rehearsal changes nothing that is trained.  It reads facts that the store does not hold yet,
    as the first epoch does; later epochs are faster, so the estimate is on the high side.
    """
    facts, questions = trainer.draw(trainer.step)
    sample = min(sample, len(facts))
    start = time.perf_counter()
    captured = trainer.pairs.of(facts[:sample])
    judged = trainer.judged(questions[:sample])
    first = time.perf_counter() - start
    start = time.perf_counter()
    with shifted(trainer.trunk.sites, trainer.editor.shifts(captured)):
        meta_loss(trainer.trunk, judged, trainer.settings.locality_weight)
    again = time.perf_counter() - start
    size, halvings = trainer.settings.facts_per_step, trainer.settings.halvings
    left = trainer.settings.steps - trainer.step
    new = max(0, min(left, len(trainer.facts) // size - trainer.step))
    mean = sum(size >> one for one in range(halvings + 1)) / (halvings + 1)
    return (new * first + left * again) * mean / sample / trainer.processes.count


def step_bytes(
    editor: Editor, trunk: Trunk, settings: TrainSettings, questions: Sequence[Encoded]
) -> int:
    """Bytes that a step takes beside micro-batches, sums and captured tensors.

    These are gradient and Adam's moments, the network's graph over one chunk of tokens, dL/dD of
    all of a step's tokens in float64, and pairs on their way between the store and the step.  On an
    accelerator the first two lie there, and are not counted.
    """
    most = settings.facts_per_step
    longest = sorted(questions, key=lambda one: -len(one.ids))[:most]
    tokens = rows_of(trunk, longest, editor.settings.tokens)
    moving_tokens = rows_of(trunk, longest[:TOGETHER], editor.settings.tokens)
    widths = [site.shape_VK for site in trunk.sites]
    numbers = sum(v + k for v, k in widths) * trunk.wide.itemsize
    moving = 2 * moving_tokens * numbers
    asked = 8 * tokens * sum(v for v, _ in widths)
    if editor.device.type != "cpu":
        return moving + asked
    parameters = sum(one.numel() * one.element_size() for one in editor.parameters())
    network = editor.settings.network
    widest = max(value + key for value, key in editor.shapes.values())
    graph = network.blocks * (4 * widest + min(network.rank, widest))
    return 3 * parameters + 4 * settings.chunk * graph + moving + asked


def rehearse(trunk: Trunk, questions: Sequence[Encoded]) -> None:
    """The loss of a step, forward and backward."""
    meta_loss(trunk, [Judged(one) for one in questions])
