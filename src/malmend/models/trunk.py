"""A model cut at its first edited layer: what lies below is computed once per question and kept.

Everything below the cut (see cut.py) is the same in every step and every experiment.  Logits are
computed only where an answer token needs them.

Shape letters: B questions, T positions, H hidden width, A answer tokens, W vocabulary, F stored
width.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.facts.encoded import Encoded, TokenBatch, collate
from malmend.given import check_fields, check_range
from malmend.memory import Room
from malmend.models.cut import Cut
from malmend.models.forms import Unrun, tried
from malmend.models.sites import Site
from malmend.models.store import ActivationStore
from malmend.models.suffix import Suffix, splits
from malmend.numerics.chunks import padded_chunks, two_sided_chunks

MOST_BYTES = 10**18  # of a disk, and what a signed 64-bit number holds


@dataclass(frozen=True)
class TrunkSettings:
    """How questions are grouped and what is kept of the trunk.

    Attributes:
        batch_tokens: positions in one micro-batch, padding included.
        store_bytes: disk budget for trunk activations; 0 keeps none.
    """

    batch_tokens: int = 640
    store_bytes: int = 6_000_000_000

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("batch_tokens",), 1, prefix="--trunk.")
        check_range(self, ("store_bytes",), 0, MOST_BYTES, "--trunk.")


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of a micro-batch and where the head starts from."""

    tokens: TokenBatch
    stored_BTF: Tensor


class Trunk:
    """A model cut at its first edited layer, with what is known of its questions.

    Args:
        model: in evaluation mode, parameters not requiring gradients.
        sites: the layers to be edited, in any order; none where nothing is edited.
        settings: grouping and budget.
        store_folder: where activations are kept; None keeps none.

    Attributes:
        room: where captured tensors stand.

    Raises:
        ModelError: the model cannot be cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        settings: TrunkSettings = TrunkSettings(),
        store_folder: Path | None = None,
    ):
        self.model, self.sites, self.settings = model, tuple(sites), settings
        self.room = Room()
        self.cut = Cut(model, sites)
        folder = None if store_folder is None else store_folder / self.cut.name
        states = None if store_folder is None else store_folder / "unedited-states"
        budget = settings.store_bytes
        self.store = ActivationStore(folder, self.cut.width, model.dtype, budget)
        self._states = ActivationStore(states, self.states_width, model.dtype, budget)

    def again(self, settings: TrunkSettings, room: Room) -> Trunk:
        """The same cut and stores, with other micro-batches and another room."""
        other = copy.copy(self)
        other.settings, other.room = settings, room
        return other

    def at(self, names: Collection[str]) -> Trunk:
        """The same cut and stores, of those of its sites that have these names."""
        other = copy.copy(self)
        other.sites = tuple(site for site in self.sites if site.name in names)
        return other

    @cached_property
    def _splits(self) -> bool:
        return splits(self.cut)

    def suffix(self, batch: Batch) -> Suffix | None:
        """The batch's answer tokens behind their prompts, as the weights are now.

        None where a prompt has nothing before them, and for a model that must be run whole.
        """
        if not self._splits or not all(one.sources[0] for one in batch.tokens.questions):
            return None
        return Suffix(self.cut, batch.tokens, batch.stored_BTF)

    @torch.no_grad()
    def agrees(self, suffix: Suffix, batch: Batch) -> bool:
        """Whether it says what the whole questions do, which may be longer than a trial's."""
        try:
            with tried():
                said_AW = suffix.logits()
        except Unrun:  # as a mask of other length
            return False
        return self.cut.agree(said_AW, self.logits(batch))

    @property
    def wide(self) -> torch.dtype:
        """What captured tensors are kept in: float64 for a float64 model, else float32."""
        return torch.promote_types(self.model.dtype, torch.float32)

    def batches(self, questions: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Micro-batches of like length, longest first, with the indices of their questions."""
        sizes = [(len(question.read), len(question.decoded)) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: -sum(sizes[i]))
        most = self.settings.batch_tokens
        for like in padded_chunks([sum(sizes[i]) for i in order], most):
            # Of an encoder-decoder, whose prompts and answers are padded apart, it may hold more.
            for rows in two_sided_chunks([sizes[i] for i in order[like]], most):
                chosen = order[like][rows]
                yield chosen, self.batch([questions[i] for i in chosen])

    def batch(self, questions: Sequence[Encoded]) -> Batch:
        """One micro-batch with its trunk activations, from the store where they are there."""
        rows = [self.store.get(question.read) for question in questions]
        missing = [i for i, found in enumerate(rows) if found is None]
        if missing:
            fresh = list(self.cut.activations(collate([questions[i] for i in missing])))
            for i, one in zip(missing, fresh, strict=True):
                rows[i] = one
            together = zip(missing, fresh, strict=True)
            self.store.put_all((questions[i].read, one) for i, one in together)
        tokens = collate(questions)
        padded = nn.utils.rnn.pad_sequence([row for row in rows if row is not None], True)
        return Batch(tokens, padded.to(self.model.device))

    def logits(self, batch: Batch) -> Tensor:
        """The head's logits at the batch's answer tokens, shape A x W."""
        return self.cut.head(batch.tokens, batch.stored_BTF, lambda states_AH: states_AH)

    def final_states(self, batch: Batch) -> Tensor:
        """What the output layer reads at the batch's answer tokens, shape A x H.

        Of a classifier, whose head is small and of any make, the logits themselves.
        """
        kept: list[Tensor] = []

        def keep(states_AH: Tensor) -> Tensor:
            kept.append(states_AH)
            return states_AH[:0]  # no logits are wanted

        self.cut.head(batch.tokens, batch.stored_BTF, keep)
        return kept[0].to(self.model.device)

    @torch.no_grad()
    def unedited_states(self, questions: Sequence[Encoded]) -> list[Tensor]:
        """Final states of the unedited model per question, each A x H, kept in the store.

        Call while the weights are the unedited ones.
        """
        known = {question: self._states.get(question.place) for question in questions}
        missing = [question for question, states_AH in known.items() if states_AH is None]
        for indices, batch in self.batches(missing):
            split = self.final_states(batch).cpu().split(batch.tokens.sources)
            for index, states_AH in zip(indices, split, strict=True):
                known[missing[index]] = states_AH.clone()
            self._states.put_all(
                (missing[index].place, one) for index, one in zip(indices, split, strict=True)
            )
        return [states_AH for q in questions if (states_AH := known[q]) is not None]

    def logits_of(self, states_AH: Tensor) -> Tensor:
        """Logits of :meth:`final_states`, shape A x W, through the model's own output code."""
        return self.cut.logits_of(states_AH)

    @property
    def words(self) -> int:
        """W, how many logits there are of a token."""
        if self.cut.form == "classes":
            return int(self.model.config.num_labels)
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def states_width(self) -> int:
        """H, how wide :meth:`final_states` are."""
        if self.cut.form == "classes":
            return int(self.model.config.num_labels)
        # Some project to another width before the output layer.
        return int(self.model.get_output_embeddings().weight.shape[1])
