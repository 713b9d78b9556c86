"""KE, the KnowledgeEditor (De Cao et al., 2021): a network says what of a gradient to follow.

A bidirectional LSTM reads "prompt, old answer, new answer".  From its last states a feed-forward
network per edited matrix W makes vectors a, b (width K) and gamma, delta (width V) and a scalar c.
With G the gradient of -log p(answer | prompt) at the unedited W,

    S = 1e-3 * sigmoid(c) * ( (gamma softmax(a)^T) o G  +  delta softmax(b)^T )         V x K

both softmaxes over the layer's inputs, whichever way it stores W.  It is trained on

    minimise  -log p(answer | equivalent prompt)    where    KL(unedited || edited) <= margin

of the edited model, by a Lagrangian: a multiplier of (KL - margin) rises where the KL on unrelated
questions is above the margin and falls below it, never under 0; the margin shrinks with every step.
The network is reached through the proxy <dL/dS, S>; no graph through the model is kept.

The paper edits one fact.  So each fact of a step gets its own shift, and what is found for several
facts is the sum of their shifts, each from the unedited model.

Deviations: only the second feed-forward layers of the last blocks are edited, as by the editors
here (published: every matrix but embeddings and norms).  1e-3 is the default of the published
class, but both its training scripts give 1; gamma's unit undoes it, delta's does not.  The
softmaxes are over inputs (published: over the weight's rows as it lies), the optimiser is Adam
(RMSprop), and no label is smoothed (BART's loss).  The old answer is the first choice at each token
of the new one, teacher forced.  The margin shrinks by itself, not where held-out facts succeed, and
the multiplier's ascent is plain.  Embeddings are normalised, two learned vectors stand between the
parts, gamma and delta have units: the shift starts as -``start`` G.

Shape letters: H embedding width, V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel

from malmend.editors.checkpoint import check_trained_for
from malmend.editors.folder import read_folder, settings_from, whole
from malmend.editors.metaloss import Judged, meta_loss
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range, check_seed
from malmend.methods.method import Found
from malmend.models.sites import Site, find_sites
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

MOST_HIDDEN = 10_000  # whose networks have billions of numbers already
SCALE = 1e-3  # of every shift: the published class's default, where its scripts give 1


@dataclass(frozen=True)
class KeSettings:
    """How a KnowledgeEditor is made and trained.

    Attributes:
        layers: edit the second feed-forward layers of this many last blocks.
        hidden: width of the LSTM in each direction, and of the feed-forward networks.
        start: how much of the gradient is descended before anything is learned.
        margin: the KL allowed at the first step, in nats per question.
        decay: what the margin is multiplied by with each step.
        floor: the smallest margin.
        rate: Adam's learning rate.
        multiplier_rate: of the multiplier's ascent, which starts at 1.
        steps: optimiser steps.
        facts_per_step: facts whose gradients make a step, each edited alone.
        seed: of the network's start, the order of the facts and the questions drawn.
        save_every: steps between checkpoints.
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    layers: int = 3
    hidden: int = 128
    start: float = 1e-3
    margin: float = 0.1
    decay: float = 0.99
    floor: float = 0.01
    rate: float = 1e-3
    multiplier_rate: float = 0.1
    steps: int = 500
    facts_per_step: int = 8
    seed: int = 0
    save_every: int = 20
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("layers", "steps", "facts_per_step", "save_every"), 1, prefix="ke.")
        check_range(self, ("hidden",), 1, MOST_HIDDEN, "ke.")
        rates = ("rate", "multiplier_rate")
        check_range(self, ("start", "margin", "floor", *rates), prefix="ke.")
        check_range(self, ("decay",), most=1.0, prefix="ke.")
        check_seed(self, "ke.")

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The second feed-forward layers, of an encoder-decoder in each half."""
        return find_sites(model, self.layers)


class Outputs(NamedTuple):
    """What the network says of one matrix."""

    a_K: Tensor
    gamma_V: Tensor
    b_K: Tensor
    delta_V: Tensor
    c: Tensor

    def shift(self, grad_VK: Tensor) -> Tensor:
        """S, given G."""
        mask_VK = torch.outer(self.gamma_V, self.a_K.softmax(0))
        offset_VK = torch.outer(self.delta_V, self.b_K.softmax(0))
        return SCALE * self.c.sigmoid() * (mask_VK * grad_VK.to(mask_VK) + offset_VK)


class Network(nn.Module):
    """The LSTM, and a head per site of these names and shapes (V, K)."""

    def __init__(self, settings: KeSettings, embedding: int, sites: Mapping[str, Sequence[int]]):
        super().__init__()
        self.sites, self.start, hidden = dict(sites), settings.start, settings.hidden
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)  # no accelerator's
            self.lstm = nn.LSTM(embedding, hidden, bidirectional=True)
            self.marks_2H = nn.Parameter(torch.randn(2, embedding))
            self.firsts = nn.ModuleList(nn.Linear(2 * hidden, hidden) for _ in sites)
            self.seconds = nn.ModuleList(
                nn.Linear(hidden, 2 * sum(shape) + 1) for shape in sites.values()
            )
        for one in self.seconds.parameters():
            nn.init.zeros_(one)

    def forward(self, parts: Sequence[Tensor]) -> dict[str, Outputs]:
        """Of the embeddings of prompt, old and new answer, each T x H; by site."""
        marks_2H = self.marks_2H
        prompt, old, new = (layer_norm(part.to(marks_2H), part.shape[1:]) for part in parts)
        _, (last, _) = self.lstm(torch.cat([prompt, marks_2H[:1], old, marks_2H[1:], new]))
        found = {}
        for at, (name, (value, key)) in enumerate(self.sites.items()):
            raw = self.seconds[at](self.firsts[at](last.flatten()).tanh())
            a_K, gamma_V, b_K, delta_V, c = raw.split([key, value, key, value, 1])
            gamma_V = (gamma_V - 1) * (2 * self.start * key / SCALE)
            found[name] = Outputs(a_K, gamma_V, b_K, delta_V * key, c)
        return found


def heard(bench: Workbench, edit: Encoded) -> list[Tensor]:
    """The embeddings of prompt, old and new answer; of a class, of its name's tokens."""
    model = bench.trunk.model
    try:
        embed = model.get_input_embeddings()
    except NotImplementedError as error:
        raise EditorError(
            f"KE reads facts through the model's input embeddings, and {type(model).__name__} "
            "names none; use another method."
        ) from error
    with torch.no_grad():
        said = bench.trunk.logits(bench.trunk.batch([edit])).argmax(-1).tolist()
        parts = [list(edit.prompt), said, list(edit.labels)]
        if edit.form == "classes":
            for at, classes in enumerate(parts[1:], 1):
                name, read = bench.encoder.said(classes), bench.encoder.tokenizer
                parts[at] = read(name, add_special_tokens=False)["input_ids"]
        device = model.device
        return [embed(torch.tensor(ids, dtype=torch.long, device=device)).cpu() for ids in parts]


def shifts_of(network: Network, bench: Workbench, edit: Encoded) -> dict[str, Tensor]:
    """S of one fact by site, in the network's graph; the model must be unedited."""
    grads = meta_loss(bench.trunk, [Judged(edit)]).shift_grads
    found = network(heard(bench, edit))
    return {name: one.shift(grads[name].cpu()) for name, one in found.items()}


def fill(network: Network, weights: Mapping[str, Tensor]) -> None:
    """Puts weights into a network; raises ValueError where they are not its own, or not finite."""
    shapes = {name: one.shape for name, one in network.state_dict().items()}
    if shapes != {name: one.shape for name, one in weights.items()}:
        raise ValueError("it holds a network of another shape")
    if not all(one.isfinite().all() for one in weights.values()):
        raise ValueError("it holds NaN or infinity")
    network.load_state_dict(weights)


@dataclass(frozen=True)
class Ke:
    """KE by a network that :class:`KeTrainer` saved in ``folder``."""

    folder: str

    @property
    def name(self) -> Literal["ke"]:
        """As tables and patches call it."""
        return "ke"

    @property
    def end_of_answer(self) -> EndOfAnswer:
        """As the network was trained."""
        return self._loaded[0].end_of_answer

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The sites of the folder; raises EditorError where the model's are others."""
        settings, _, _, network = self._loaded
        sites = settings.sites_in(model)
        found = {site.name: list(site.shape_VK) for site in sites}
        if found != network.sites:
            raise EditorError(
                f"The editor {self.folder} edits {', '.join(network.sites)}, this model has "
                f"{', '.join(found)} of its own shapes; train one for this model."
            )
        return sites

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """The sum of the shifts of all facts, each from the base.

        Raises:
            EditorError: no network there, a damaged one, or one for another base.
        """
        settings, about, identity, network = self._loaded
        check_trained_for(bench.loaded, self.folder, about["base"])
        sites = bench.trunk.sites
        totals = {site.name: torch.zeros(site.shape_VK, dtype=torch.float64) for site in sites}
        count = counting(progress, "shifts", len(facts))
        for fact in facts:
            shifts = shifts_of(network, bench, bench.encoder.encode(fact.question))
            for name, shift_VK in shifts.items():
                totals[name] += shift_VK.detach()
            count(1)
        said = {"settings": asdict(settings), "editor": self.folder, "editor_id": identity}
        return Found(totals, max(min(site.shape_VK) for site in sites), said)

    @cached_property
    def _loaded(self) -> tuple[KeSettings, dict[str, Any], str, Network]:
        folder = Path(self.folder)
        with whole(f"The editor in {folder}", "train it again"):
            about, tensors, identity = read_folder(folder, _check_method)
            settings = settings_from(KeSettings, about["settings"])
            network = Network(settings, tensors["marks_2H"].shape[1], about["sites"])
            fill(network, tensors)
            if not isinstance(about["base"], str):
                raise ValueError("it names no base")
        return settings, about, identity, network.requires_grad_(False)


def _check_method(about: Mapping[str, Any]) -> None:
    if about["method"] != "ke":
        raise ValueError(f"it is of the method {about['method']!r}")
