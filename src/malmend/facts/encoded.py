"""Questions as token ids, and where in them an answer is read off.

Three forms of model, and what each reads of a question:

    causal    prompt and answer as one text; a token's logits stand one position before it
    classes   the prompt; the logits of the classes stand at its first token
    seq2seq   the prompt in the encoder, the answer in the decoder, behind a fixed prefix

Rows are padded on the right whatever the tokenizer's own padding side, and masked by length, never
by token id (a padding token may be an end token).

Shape letters: B questions, T positions, D decoder positions, A answer tokens of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Form = Literal["causal", "classes", "seq2seq"]
Tokens = Literal["auto", "answer", "all"]


def resolved(tokens: Tokens, form: Form) -> Literal["answer", "all"]:
    """What "auto" stands for: a classifier's "all", for its first token says little but the class.

    Of any other model it is the tokens that output the answer.
    """
    if tokens == "auto":
        return "all" if form == "classes" else "answer"
    return tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """One question as ids: its prompt, then the answer's labels.

    ``answer_start`` is the index of the first answer token; ``answer_end`` is one past the last
    one that metrics count.  An end-of-answer token, where there is one, stands at ``answer_end``.
    A question without an answer has ``answer_start == answer_end == len(ids)``.  Of "classes" the
    answer is one label, the number of a class.  ``prefix`` is what a decoder with an encoder is
    given before the answer.
    """

    ids: tuple[int, ...]
    answer_start: int
    answer_end: int
    form: Form = "causal"
    prefix: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, ...]:
        """Names the question in a store: the same ids may be cut into prompt and answer twice."""
        return (*self.ids, self.answer_start)

    @property
    def labels(self) -> tuple[int, ...]:
        """The tokens to be predicted: the answer and its end token."""
        return self.ids[self.answer_start :]

    @property
    def counted(self) -> int:
        """How many of the labels metrics count."""
        return self.answer_end - self.answer_start

    @property
    def predictions(self) -> int:
        """How many count: of the counted labels, or where there is none of the next token."""
        return max(self.counted, 1)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the answer."""
        return self.ids[: self.answer_start]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads, or its encoder."""
        return self.ids if self.form == "causal" else self.prompt

    @property
    def decoded(self) -> tuple[int, ...]:
        """What the decoder of an encoder-decoder reads: the prefix, then all labels but the last.

        That is the model's own shift to the right, written out so that a prefix of several tokens
        (BART's start and beginning-of-text) is neither trained nor counted.
        """
        return (*self.prefix, *self.labels[:-1]) if self.form == "seq2seq" else ()

    @property
    def sources(self) -> tuple[int, ...]:
        """The positions whose logits predict the labels.

        A question without an answer has one source, where its answer would begin, and no label.
        """
        if self.form == "classes":
            return (0,)
        first = self.answer_start - 1 if self.form == "causal" else len(self.prefix) - 1
        return tuple(range(first, first + max(len(self.labels), 1)))

    def columns(self, tokens: Tokens, in_encoder: bool = False) -> range:
        """Positions of the chosen tokens.

        Of the encoder of an encoder-decoder always the whole prompt, for no token of it outputs the
        answer.  Of a decoder's "all" the first token stays out: it is an attention sink, whose key
        is fifty times the size of the others and says nothing about the text.
        """
        if in_encoder:
            return range(len(self.read))
        if resolved(tokens, self.form) == "answer":
            return range(self.sources[0], self.sources[-1] + 1)
        if self.form == "seq2seq":
            return range(len(self.decoded))
        return range(1 if self.form == "causal" else 0, len(self.read))

    def ends(self, tokens: Tokens, in_encoder: bool = False) -> list[bool]:
        """Which of the chosen tokens output an end-of-answer token."""
        first = self.sources[0]
        has_end = not in_encoder and len(self.labels) > self.counted > 0
        return [has_end and at - first == self.counted for at in self.columns(tokens, in_encoder)]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Encoded questions as tensors, padded on the right.

    ``decoded_BD`` and its mask are there for an encoder-decoder only.
    """

    questions: tuple[Encoded, ...]
    ids_BT: Tensor
    mask_BT: Tensor
    labels_A: Tensor
    decoded_BD: Tensor | None = None
    decoded_mask_BD: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row reads."""
        return tuple(len(question.read) for question in self.questions)

    @property
    def sources(self) -> tuple[int, ...]:
        """Answer tokens of each row."""
        return tuple(len(question.sources) for question in self.questions)

    @cached_property
    def source_rows_A(self) -> Tensor:
        """Which row each answer token is of."""
        return torch.repeat_interleave(torch.tensor(self.sources))

    @cached_property
    def flat_sources_A(self) -> Tensor:
        """Indices of the sources in the flattened positions."""
        return self.flat("answer")

    def width(self, in_encoder: bool = False) -> int:
        """Padded positions of a row, where a layer reads it."""
        decoded_BD = None if in_encoder else self.decoded_BD
        return (self.ids_BT if decoded_BD is None else decoded_BD).shape[1]

    def flat(self, tokens: Tokens, in_encoder: bool = False) -> Tensor:
        """Indices of the chosen tokens in the flattened positions, row after row."""
        width = self.width(in_encoder)
        places = [
            row * width + at
            for row, question in enumerate(self.questions)
            for at in question.columns(tokens, in_encoder)
        ]
        return torch.tensor(places, dtype=torch.long)


def collate(questions: Sequence[Encoded]) -> TokenBatch:
    """Pads on the right.  ``labels_A`` holds -100 where a question has no answer."""
    ids_BT, mask_BT = _padded([question.read for question in questions])
    decoded_BD = decoded_mask_BD = None
    if questions[0].form == "seq2seq":
        decoded_BD, decoded_mask_BD = _padded([question.decoded for question in questions])
    labels = [label for question in questions for label in (question.labels or (-100,))]
    return TokenBatch(
        tuple(questions), ids_BT, mask_BT, torch.tensor(labels), decoded_BD, decoded_mask_BD
    )


def _padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids, mask
