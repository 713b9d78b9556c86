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
from malmend.models.sites import Site
from malmend.models.store import ActivationStore
from malmend.models.trunk import Trunk
from malmend.numerics.chunks import chunks

TOGETHER = 256  # facts whose pairs stand in memory beside the step's own


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
        found = [self._room(site, encoded) for site in self.trunk.sites]
        firsts = [0] * len(found)
        for group in chunks(len(encoded), TOGETHER):
            some = encoded[group]
            packed = self._kept(some)
            for index, (site, pair) in enumerate(zip(self.trunk.sites, found, strict=True)):
                counts = token_counts(some, self.settings.tokens, site.in_encoder)
                rows = slice(firsts[index], firsts[index] + sum(counts))
                for out_NX in (pair.keys_NK[rows], pair.value_grads_NV[rows]):
                    cuts = [count * out_NX.shape[1] for count in counts]
                    parts = [one[:cut] for one, cut in zip(packed, cuts, strict=True)]
                    torch.cat(parts, out=out_NX.view(-1))
                    packed = [one[cut:] for one, cut in zip(packed, cuts, strict=True)]
                firsts[index] = rows.stop
        return found

    def _room(self, site: Site, encoded: Sequence[Encoded]) -> Captured:
        """Of one site, with nothing in it."""
        tokens, room = self.settings.tokens, self.trunk.room
        count = sum(token_counts(encoded, tokens, site.in_encoder))
        keys_NK, grads_NV = (
            room.empty(count, width, dtype=self.trunk.wide) for width in reversed(site.shape_VK)
        )
        return Captured(keys_NK, grads_NV, ends_of(encoded, tokens, site.in_encoder), room)

    def _kept(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        """The numbers of :meth:`_packed`; what the store lacks is captured, and kept there."""
        found = [self.store.get(one.place) for one in encoded]
        missing = [index for index, packed in enumerate(found) if packed is None]
        if missing:
            fresh = self._packed([encoded[index] for index in missing])
            for index, packed in zip(missing, fresh, strict=True):
                found[index] = packed
            self.store.put_all(
                (encoded[index].place, one) for index, one in zip(missing, fresh, strict=True)
            )
        return [packed.squeeze(1) for packed in found if packed is not None]

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
