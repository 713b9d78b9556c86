"""Perplexity of a model, as its weights now are, on plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from malmend.errors import MalmendError
from malmend.models.load import LoadedModel


@torch.no_grad()
def perplexity(
    loaded: LoadedModel, text: str, window: int = 256, most_tokens: int = 20_000
) -> float:
    """exp of the mean negative log-likelihood per token of plain text.

    Read in windows of ``window`` tokens (fewer, where the model has fewer positions) without
    overlap; the first token of each is not predicted.  At most ``most_tokens`` are read, from the
    start.

    Raises:
        MalmendError: the text has fewer than two tokens, or the logits are NaN.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:most_tokens]
    total, count = 0.0, 0
    for piece in _pieces(ids, min(window, loaded.positions or window)):
        row = torch.tensor([piece], device=loaded.model.device)
        logits = loaded.model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += len(piece) - 1
    if count == 0:
        raise MalmendError("The text for perplexity has fewer than two tokens; give more text.")
    if math.isnan(total):
        raise MalmendError("The model's logits are NaN on the text; load it in float32.")
    return math.exp(min(total / count, 700.0))  # beyond that a float cannot say it


def _pieces(ids: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    for start in range(0, len(ids), size):
        if len(ids[start : start + size]) > 1:
            yield ids[start : start + size]
