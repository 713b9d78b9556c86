"""Perplexity of a model, as its weights now are, on plain text, and on which text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from malmend.errors import MalmendError
from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel

LEAST, MOST = 1_000, 4_000  # tokens of the lines that the prior has not read


@dataclass(frozen=True)
class PlainText:
    """A text, and what it is."""

    words: str
    source: str


def unread(encoder: Encoder, text: str, read: int) -> PlainText | None:
    """The lines of the project's own text that follow those of which the prior is taken.

    The prior is taken over lines up to the one that brings the sum of (tokens - 1) to ``read``; of
    the next lines so many are given that they have ``MOST`` tokens.  None where they have fewer
    than ``LEAST``: how many are left depends on the tokenizer.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sizes = [len(encoder.passage_ids(line)) for line in lines]
    total, first = 0, 0
    while first < len(lines) and total < read:
        total += max(0, sizes[first] - 1)
        first += 1
    tokens, last = 0, first
    while last < len(lines) and tokens < MOST:
        tokens += sizes[last]
        last += 1
    if tokens < LEAST:
        return None
    source = (
        f"malmend's own text, lines {first + 1:,} to {last:,} ({tokens:,} tokens), "
        "which the prior has not read"
    )
    return PlainText("\n".join(lines[first:last]), source)


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
