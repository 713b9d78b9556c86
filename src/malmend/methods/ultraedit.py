"""UltraEdit: normalised gradients in place of a network, then least squares (Gu et al., 2025).

With keys u_j and value gradients g_j of the answer tokens, mean and spread of both by dimension
over all tokens so far (those of the present batch included),

    u^_j = (u_j - mean_u) / std_u,   g^_j = (g_j - mean_g) / std_g
    d_j  = -eta |u^_j|^2 g^_j,       S = D U^T (U U^T + lambda I)^-1,   lambda = 1

Nothing is trained.  Facts come in batches of ``batch``: each is captured on the model as the ones
before it left it, and its shift is added to theirs; the mean and spread go on.

Deviations: eta is 1e-3, for at the 1e-6 of models of billions no answer of SmolLM2 changes
(docs/deviations.md).  A dimension that does not vary is not blown up (numerics/moments.py), so that
a single token, of which no spread is known, keeps its gradient's own scale.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.facts.encoded import Tokens
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range
from malmend.methods.method import Found
from malmend.models.capture import Captured, capture
from malmend.models.device import wide_device
from malmend.models.sites import Linear, Site, find_sites
from malmend.numerics.moments import RunningMoments
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor
from malmend.patch import shifted
from malmend.progress import Progress, counting
from malmend.workbench import Workbench


@dataclass(frozen=True)
class UltraEdit:
    """UltraEdit's settings.

    Attributes:
        eta: length of a move, for keys and gradients of unit spread.
        ridge: lambda, the weight of the shift's own square.
        batch: facts that are solved together; null for all in one.
        layers: edit a feed-forward layer of this many last blocks; null for six.
        linear: which layers of the block, "second", "first" or "both".
        tokens: which tokens are captured, "answer", "all" or "auto".
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    eta: float = 1e-3
    ridge: float = 1.0
    batch: int | None = None
    layers: int | None = None
    linear: Linear = "second"
    tokens: Tokens = "auto"
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("layers",), 1, prefix="ultraedit.")
        check_range(self, ("eta", "ridge"), prefix="ultraedit.")
        whole = "leave it out for all at once"
        check_range(self, ("batch",), 1, prefix="ultraedit.", advice=whole)

    @property
    def name(self) -> Literal["ultraedit"]:
        """As tables and patches call it."""
        return "ultraedit"

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """One or both feed-forward layers of each of the last blocks."""
        return find_sites(model, self.layers, linear=self.linear)

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """Batch after batch."""
        found = Found({}, 0)
        for last in self.batches(bench, facts, progress):
            found = last
        return found

    def batches(
        self, bench: Workbench, facts: Sequence[Fact], progress: Progress
    ) -> Iterator[Found]:
        """What is found after each batch, those before it included."""
        sites, device = bench.trunk.sites, wide_device(bench.trunk.model)
        questions = bench.encoder.encode_all(fact.question for fact in facts)
        size = self.batch or len(questions)
        known = [tuple(map(RunningMoments, reversed(site.shape_VK))) for site in sites]
        shifts = {site.name: torch.zeros(site.shape_VK, dtype=torch.float64) for site in sites}
        count, rows = counting(progress, "keys and value gradients", len(questions)), 0
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            with shifted(sites, shifts):
                captured = capture(bench.trunk, part, self.tokens, None, count)
            for site, pair, (keys, grads) in zip(sites, captured, known, strict=True):
                keys.add(pair.keys_NK)
                grads.add(pair.value_grads_NV)
                shifts[site.name] = shifts[site.name] + self._solved(pair, keys, grads, device)
            rows += max(len(pair.keys_NK) for pair in captured)
            yield Found(dict(shifts), rows)

    def _solved(
        self, pair: Captured, keys: RunningMoments, grads: RunningMoments, device: torch.device
    ) -> Tensor:
        """One site's shift for a batch."""
        keys_NK, grads_NV = pair.keys_NK.double(), pair.value_grads_NV.double()
        gain_N1 = ((keys_NK - keys.mean_F) / keys.std()).square().sum(1, keepdim=True)
        diffs_NV = -self.eta * gain_N1 * (grads_NV - grads.mean_F) / grads.std()
        return RidgeFactor(keys_NK, Prior(self.ridge, device=device)).shift(diffs_NV)
