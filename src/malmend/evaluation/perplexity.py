"""Perplexity of a model, as its weights now are, on plain text, and on which text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from malmend.editors.keymoments import first_of, lines_of
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel
from malmend.models.trunk import Trunk
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.numerics.chunks import chunks

LEAST, MOST = 1_000, 4_000  # tokens of the lines that the prior has not read
WINDOW, MOST_READ = 256, 20_000  # tokens of a text: read together, and in all
HIGHEST = 1e100  # stands for whatever is above, as where a probability is 0


@dataclass(frozen=True)
class PlainText:
    """A text, and what it is."""

    words: str
    source: str


def unread(encoder: Encoder, text: str, read: int) -> PlainText | None:
    """The lines of the project's own text that follow those of which the prior is taken.

    The prior is taken over the lines that :func:`first_of` gives for ``read``; of the next lines so
    many are given that they have ``MOST`` tokens.  None where they have fewer than ``LEAST``: how
    many are left depends on the tokenizer.
    """
    lines = lines_of(text)
    passages = [encoder.passage(line) for line in lines]
    first = last = len(first_of(passages, read))
    tokens = 0
    while last < len(lines) and tokens < MOST:
        tokens += len(passages[last].ids)
        last += 1
    if tokens < LEAST:
        return None
    source = (
        f"malmend's own text, lines {first + 1:,} to {last:,} ({tokens:,} tokens), "
        "which the prior has not read"
    )
    return PlainText("\n".join(lines[first:last]), source)


def whole_or_first(encoder: Encoder, words: str, name: str) -> PlainText:
    """A text that was given; where only its first part will be read, its name says so."""
    tokens = len(encoder.tokenizer(words, add_special_tokens=False)["input_ids"])
    part = f", its first {MOST_READ:,} of {tokens:,} tokens" if tokens > MOST_READ else ""
    return PlainText(words, f"{name}{part}")


def perplexity(loaded: LoadedModel, trunk: Trunk, text: str) -> float:
    """exp of the mean negative log-likelihood per token of plain text.

    Read in windows of :data:`WINDOW` tokens (fewer, where the model has fewer positions) without
    overlap; the first token of each is not predicted.  At most :data:`MOST_READ` are read, from the
    start.  What is above :data:`HIGHEST` is given as that.

    Args:
        loaded: the model, as its weights now are.
        trunk: of the same model, which keeps what no edit of its sites changes: a text is run
            through the blocks below them once.

    Raises:
        MalmendError: the text has fewer than two tokens, or the logits are NaN.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_READ]
    windows = [
        Encoded(tuple(ids[rows]), 1, rows.stop - rows.start)
        for rows in chunks(len(ids), min(WINDOW, loaded.positions or WINDOW))
        if rows.stop - rows.start > 1
    ]
    if not windows:
        raise MalmendError("The text for perplexity has fewer than two tokens; give more text.")
    losses_Q = weight_grads(trunk, [Term(windows, saying(trunk), 1.0)], grads=False)[0][0]
    mean = losses_Q.sum().item() / sum(one.counted for one in windows)
    if math.isnan(mean):
        raise MalmendError("The model's logits are NaN on the text; load it in float32.")
    return math.exp(mean) if mean < math.log(HIGHEST) else HIGHEST
