"""Captured pairs of facts, kept on disk: neither keys nor value gradients change in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malmend.editors.settings import EditorSettings
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoder
from malmend.models.capture import Captured, capture, ends_of, token_counts
from malmend.models.store import ActivationStore
from malmend.models.trunk import Trunk


class Pairs:
    """What :func:`malmend.models.capture.capture` gives of facts, each captured once.

    Args:
        trunk: the unedited model, cut at the editor's sites.
        encoder: as the edits are encoded.
        settings: the editor's, which say what is captured.
        store: where pairs are kept, a number per row.
    """

    def __init__(
        self, trunk: Trunk, encoder: Encoder, settings: EditorSettings, store: ActivationStore
    ):
        self.trunk, self.encoder, self.settings, self.store = trunk, encoder, settings, store

    def of(self, facts: Sequence[Fact]) -> list[Captured]:
        """Keys and value gradients of the facts per site, from the store where they are there."""
        encoded = self.encoder.encode_all(fact.question for fact in facts)
        found = [self.store.get(one.place) for one in encoded]
        missing = [index for index, packed in enumerate(found) if packed is None]
        if missing:
            fresh = self._packed([encoded[index] for index in missing])
            for index, packed in zip(missing, fresh, strict=True):
                found[index] = packed
            self.store.put_all(
                (encoded[index].place, one) for index, one in zip(missing, fresh, strict=True)
            )
        return self._unpacked([packed for packed in found if packed is not None], encoded)

    def _packed(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        """Each question's pairs as one column of numbers: sites may see unlike many tokens."""
        tokens = self.settings.tokens
        parts = []
        pairs = capture(self.trunk, encoded, tokens, self.settings.descent)
        for site, pair in zip(self.trunk.sites, pairs, strict=True):
            counts = token_counts(encoded, tokens, site.in_encoder)
            parts += [pair.keys_NK.split(counts), pair.value_grads_NV.split(counts)]
        return [
            torch.cat([rows.flatten() for rows in of_one]).unsqueeze(1)
            for of_one in zip(*parts, strict=True)
        ]

    def _unpacked(self, packed: Sequence[Tensor], encoded: Sequence[Encoded]) -> list[Captured]:
        """The columns of :meth:`_packed`, per site."""
        left, tokens = [column.squeeze(1) for column in packed], self.settings.tokens
        found = []
        for site in self.trunk.sites:
            counts = token_counts(encoded, tokens, site.in_encoder)
            pair = []
            for width in reversed(site.shape_VK):
                sizes = [count * width for count in counts]
                rows = [part[:size].view(-1, width) for part, size in zip(left, sizes, strict=True)]
                left = [part[size:] for part, size in zip(left, sizes, strict=True)]
                held = self.trunk.room.empty(sum(counts), width, dtype=self.trunk.wide)
                pair.append(torch.cat(rows, out=held))
            ends = ends_of(encoded, tokens, site.in_encoder)
            found.append(Captured(pair[0], pair[1], ends, self.trunk.room))
        return found
