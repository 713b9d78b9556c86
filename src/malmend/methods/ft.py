"""Fine-tuning on the edits alone (FT; MALMEN, appendix A.5), and beside text (FT+KL; MEND).

    minimise over W    mean over facts of -log p(answer | prompt)
                       + locality * mean over passages of the sum of KL(unedited || tuned)

by AdamW over the feed-forward layers of the last blocks, everything else as it was.  The shift is
what W moved by, weight decay included.

Deviations: the published text does not say how many facts make a step; here it is ``batch``.  Of a
gated feed-forward the gate stays.  The passages are ends of lines of the package's own text, the
KL is summed over their last five tokens.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.editors.keymoments import end_of
from malmend.editors.metaloss import Judged, meta_loss
from malmend.editors.training_facts import batches
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range, check_seed
from malmend.material import general_text
from malmend.methods.method import Found
from malmend.models.sites import Site, feed_forward_sites
from malmend.patch import shifted
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

LAST = 5  # tokens at a passage's end at which the KL is taken


@dataclass(frozen=True)
class FineTuning:
    """FT, and with ``locality`` above 0 FT+KL.

    Attributes:
        layers: tune the feed-forward layers of this many last blocks.
        rate: AdamW's learning rate.
        decay: AdamW's weight decay.
        epochs: how often each fact is seen.
        batch: facts per step.
        locality: weight of the KL on text, of which each step reads as many passages as facts.
        seed: of the order.
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    layers: int = 3
    rate: float = 5e-4
    decay: float = 5e-4
    epochs: int = 5
    batch: int = 8
    locality: float = 0.0
    seed: int = 0
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("layers", "epochs", "batch"), 1, prefix="ft.")
        check_range(self, ("rate", "decay", "locality"), 0.0, prefix="ft.")
        check_seed(self, "ft.")

    @property
    def name(self) -> Literal["ft", "ft-kl"]:
        """As tables and patches call it."""
        return "ft-kl" if self.locality else "ft"

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """As :func:`malmend.models.sites.feed_forward_sites`."""
        return feed_forward_sites(model, self.layers)

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """Every fact ``epochs`` times."""
        trunk, sites = bench.trunk, bench.trunk.sites
        judged = [Judged(bench.encoder.encode(fact.question)) for fact in facts]
        passages = self._passages(bench) if self.locality else []
        start = [site.oriented(site.weight.detach().to(trunk.wide)).cpu() for site in sites]
        weights = [nn.Parameter(weight_VK.clone()) for weight_VK in start]
        optimiser = torch.optim.AdamW(weights, self.rate, weight_decay=self.decay)
        count = counting(progress, "fine-tuning", self.epochs * len(judged))
        order = batches(len(judged), self.batch, self.epochs, self.seed)
        losses, turns = [], cycle(passages)
        for batch in order:
            asked = [judged[index] for index in batch]
            if passages:
                asked = [
                    replace(one, unrelated=other.unrelated, unedited_AH=other.unedited_AH)
                    for one, other in zip(asked, turns, strict=False)
                ]
            with shifted(sites, _moved(sites, weights, start)):
                loss = meta_loss(trunk, asked, self.locality)
            losses.append(loss.total)
            for site, weight in zip(sites, weights, strict=True):
                weight.grad = loss.shift_grads[site.name].to(weight)
            optimiser.step()
            count(len(batch))
        shifts = {
            site.name: weight.detach().double() - before.double()
            for site, weight, before in zip(sites, weights, start, strict=True)
        }
        return Found(shifts, max(min(site.shape_VK) for site in sites), {"losses": losses})

    def _passages(self, bench: Workbench) -> list[Judged]:
        """Ends of lines of the package's own text, with what the unedited model says there."""
        ends = [end_of(line, LAST) for line in general_text(bench.encoder)]
        states = bench.trunk.unedited_states(ends)
        return [Judged(one, one, known) for one, known in zip(ends, states, strict=True)]


def _moved(
    sites: Sequence[Site], weights: Sequence[Tensor], start: Sequence[Tensor]
) -> dict[str, Tensor]:
    pairs = zip(sites, weights, start, strict=True)
    return {site.name: weight.detach() - before for site, weight, before in pairs}


@dataclass(frozen=True)
class FineTuningKL(FineTuning):
    """FT+KL: the same fields, text held by default."""

    locality: float = 1.0
