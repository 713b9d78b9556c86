"""From questions to token ids, and the only place that knows which logit answers which label.

Shape letters: B questions, T positions, A answer tokens of a whole batch.

The boundary between prompt and answer is found in the *joined* text by character offsets, because
tokenizing the two apart gives other tokens for many tokenizers.  A token that straddles the
boundary belongs to the answer.  Special tokens that the tokenizer puts in front (BOS) stay; ones
that it puts behind are dropped.  Rows are padded on the right whatever the tokenizer's own padding
side, and masked by length, never by token id (a padding token may be an end token).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.facts.fact import Fact, Question

EndOfAnswer = Literal["eos", "newline", "none"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One question as token ids.

    ``answer_start`` is the index of the first answer token; ``answer_end`` is one past the last
    one that metrics count.  An end-of-answer token, where there is one, stands at ``answer_end``.
    A question without an answer has ``answer_start == answer_end == len(ids)``.
    """

    ids: tuple[int, ...]
    answer_start: int
    answer_end: int

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
    def sources(self) -> tuple[int, ...]:
        """The positions whose logits predict the labels (a label's position less one).

        A question without an answer has one source, its last token, and no label.
        """
        return tuple(range(self.answer_start - 1, max(len(self.ids) - 1, self.answer_start)))


@dataclass(frozen=True)
class TokenBatch:
    """Encoded questions as tensors, padded on the right."""

    ids_BT: Tensor
    mask_BT: Tensor
    source_rows_A: Tensor
    source_columns_A: Tensor
    labels_A: Tensor
    lengths: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def flat_sources_A(self) -> Tensor:
        """Indices of the sources in the B * T flattened positions."""
        return self.source_rows_A * self.ids_BT.shape[1] + self.source_columns_A

    @property
    def flat_attended(self) -> Tensor:
        """Indices of all real positions but each row's first, flattened.

        The first token is an attention sink: its key is fifty times the size of the others and
        says nothing about the text, so it stays out of every statistic and out of "all tokens".
        """
        attended_BT = self.mask_BT.bool().clone()
        attended_BT[:, 0] = False
        return attended_BT.flatten().nonzero().squeeze(1)


def collate(questions: Sequence[Encoded]) -> TokenBatch:
    """Pads on the right and lists where the logits of the answer tokens stand.

    ``labels_A`` holds -100 where a question has no answer.
    """
    width = max(len(question.ids) for question in questions)
    ids_BT = torch.zeros(len(questions), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    rows: list[int] = []
    columns: list[int] = []
    labels: list[int] = []
    for row, question in enumerate(questions):
        ids_BT[row, : len(question.ids)] = torch.tensor(question.ids)
        mask_BT[row, : len(question.ids)] = 1
        rows += [row] * len(question.sources)
        columns += question.sources
        labels += question.labels or (-100,)
    return TokenBatch(
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        source_rows_A=torch.tensor(rows),
        source_columns_A=torch.tensor(columns),
        labels_A=torch.tensor(labels),
        lengths=tuple(len(question.ids) for question in questions),
        sources=tuple(len(question.sources) for question in questions),
    )


class Encoder:
    """Turns questions into :class:`Encoded` for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with character offsets (a "fast" one).
        end_of_answer: what is put after the answer and trained: the tokenizer's end token, a line
            break, or nothing.  Metrics never count it.
        max_tokens: longest question, answer and end token included.
        chat: wrap the prompt as a user's turn of the tokenizer's chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_of_answer: EndOfAnswer = "eos",
        max_tokens: int = 512,
        chat: bool = False,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise MalmendError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets, which are "
                "needed to tell prompt from answer; load it with use_fast=True."
            )
        if chat and not tokenizer.chat_template:
            raise MalmendError(
                "The tokenizer has no chat template, so --chat cannot be used; leave it out."
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.chat = chat
        self.end_of_answer = end_of_answer
        self._end_ids = self._end_token(end_of_answer)

    def encode(self, question: Question) -> Encoded:
        """Token ids of prompt, answer and end token.

        Raises:
            MalmendError: the answer does not survive tokenisation, or the question is too long.
        """
        if question.answer is None:
            ids = self.prompt_ids(question.prompt)
            encoded = Encoded(ids, len(ids), len(ids))
        else:
            encoded = self._encode_joined(self.framed(question.prompt), question.answer.rstrip())
        if encoded.answer_start < 1:
            raise MalmendError(
                f"the prompt {question.prompt!r} has no token before the answer; give a longer one"
            )
        if len(encoded.ids) > self.max_tokens:
            raise MalmendError(
                f"{len(encoded.ids)} tokens, expected at most {self.max_tokens}; shorten the prompt"
            )
        return encoded

    def encode_all(self, questions: Iterable[Question]) -> list[Encoded]:
        """:meth:`encode` for each."""
        return [self.encode(question) for question in questions]

    def framed(self, prompt: str) -> str:
        """The prompt as the model reads it: as it is, or as a user's turn of a chat.

        Blanks at its end are left out: the one before the answer is part of the answer's token.
        """
        if not self.chat:
            return prompt.rstrip(" ")
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def passage_ids(self, text: str, most: int = 256) -> tuple[int, ...]:
        """The first ``most`` ids of plain text, for statistics; no frame, no end token."""
        return self._ids(text)[0][: min(most, self.max_tokens)]

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The ids to start free-running generation from."""
        return self._ids(self.framed(prompt))[0]

    def faults(self, facts: Iterable[Fact]) -> list[str]:
        """Every question of every fact that cannot be encoded, one line each."""
        found = []
        for fact in facts:
            fields = [("answer", fact.question)]
            fields += [("paraphrases", question) for question in fact.equivalents]
            fields += [("unrelated", question) for question in fact.unrelated]
            fields += [("neighbours", question) for question in fact.neighbours]
            fields += [("reversed", fact.reversed)] if fact.reversed else []
            for field, question in fields:
                try:
                    self.encode(question)
                except MalmendError as error:
                    found.append(f"line {fact.line}: field {field!r}: {error}")
        return found

    def _encode_joined(self, prompt: str, answer: str) -> Encoded:
        # A chat template ends where the reply begins, with whatever blank belongs there.
        blank = "" if self.chat or prompt[-1:].isspace() else " "
        ids, spans = self._ids(prompt + blank + (answer if self.chat else answer.lstrip()))
        start = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
        kept = self.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
        unknown = self.tokenizer.unk_token_id in ids[start:]
        if not answer.strip() or unknown or not _same(kept, answer):
            raise MalmendError(
                f"the answer {answer!r} does not survive tokenisation, it reads back as {kept!r}; "
                "write it with characters that the tokenizer knows"
            )
        return Encoded(ids + self._end_ids, start, len(ids))

    def _ids(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Ids and character spans, leading special tokens kept, trailing ones dropped."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalmendError(
                f"the text {text[:40]!a} is not UTF-8 (it holds {text[error.start]!a}); "
                "save or type it as UTF-8"
            ) from None
        special = {"bos_token": self.tokenizer.bos_token_id, "cls": self.tokenizer.cls_token_id}
        out = self.tokenizer(
            text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False
        )
        ids, spans = list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]
        marks = out["special_tokens_mask"]
        while ids and marks[len(ids) - 1] and spans[len(ids) - 1] == (0, 0):
            ids.pop()
        if self.chat and len(ids) > 1 and ids[0] == ids[1] and ids[0] in special.values():
            ids, spans = ids[1:], spans[1:]  # the template wrote the token that BOS added again
        return tuple(ids), spans[: len(ids)]

    def _end_token(self, end_of_answer: EndOfAnswer) -> tuple[int, ...]:
        if end_of_answer == "none":
            return ()
        if end_of_answer == "newline":
            ids = tuple(self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
            if "\n" not in self.tokenizer.decode(ids):
                raise MalmendError(
                    "The tokenizer has no token for a line break; set end_of_answer to 'eos' or "
                    "'none'."
                )
            return ids
        if self.tokenizer.eos_token_id is None:
            raise MalmendError(
                "The tokenizer has no end token; set end_of_answer to 'newline' or 'none'."
            )
        return (self.tokenizer.eos_token_id,)


def _same(kept: str, answer: str) -> bool:
    """Whether a decoded answer is the answer, up to outer blanks and Unicode composition."""
    return _plain(kept) == _plain(answer)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().casefold()
