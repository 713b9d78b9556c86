"""What a classifier says of prompts, as its weights now are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from malmend.facts.alternatives import away_from
from malmend.facts.fact import FactSet, Question
from malmend.facts.tokens import Encoder
from malmend.models.trunk import Trunk


@torch.no_grad()
def classes_of(trunk: Trunk, encoder: Encoder, prompts: Sequence[str]) -> list[tuple[str, float]]:
    """The most likely class of each prompt, and its probability."""
    asked = encoder.encode_all(Question(prompt) for prompt in prompts)
    found = [("", 0.0)] * len(asked)
    for indices, batch in trunk.batches(asked):
        shares_AW = trunk.logits(batch).float().softmax(-1)
        top = shares_AW.max(-1)
        for index, label, share in zip(
            indices, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            found[index] = (encoder.said([label]), share)
    return found


def away(trunk: Trunk, encoder: Encoder, facts: FactSet) -> FactSet:
    """The facts, each aiming at what the model as it is now does not say (MALMEN, appendix A.4).

    Raises:
        FactsError: as :func:`malmend.facts.alternatives.away_from`.
    """
    said = classes_of(trunk, encoder, [fact.prompt for fact in facts])
    return away_from(facts, [label for label, _ in said], encoder.reading.classes)
