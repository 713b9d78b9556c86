"""From questions to token ids, for the three forms of model (see encoded.py).

For a causal model the boundary between prompt and answer is found in the *joined* text by character
offsets, because tokenizing the two apart gives other tokens for many tokenizers.  A token that
straddles the boundary belongs to the answer.  Special tokens that the tokenizer puts in front (BOS)
stay; ones that it puts behind are dropped.  An encoder reads its prompt with every special token
that it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError

from malmend.errors import MalmendError, nearest
from malmend.facts.encoded import Encoded, Form
from malmend.facts.fact import Fact, Question, class_key
from malmend.facts.tokenizer import EndOfAnswer, check_survives, end_ids, special_ids, tokenized

TRIED = "What is it?"  # what a chat template is tried with
Part = Literal["prompt", "answer"]
# Where a part of a question stands that is in another field than the question.
ELSEWHERE = {
    ("answer", "prompt"): "prompt",
    ("alternative", "prompt"): "prompt",
    ("paraphrases", "answer"): "answer",
}


@dataclass(frozen=True)
class Reading:
    """How a model reads a question: what its configuration says of it.

    Attributes:
        form: which of the three.
        classes: their names in order, of a classifier.
        start: the token that a decoder with an encoder begins with.
        tokens: how many it has embeddings for, where that is known; a tokenizer may give more.
    """

    form: Form = "causal"
    classes: tuple[str, ...] = ()
    start: int | None = None
    tokens: int | None = field(default=None, repr=False, compare=False)


class Unfit(MalmendError):
    """A question does not fit the model; this part of it is to change."""

    def __init__(self, message: str, part: Part):
        super().__init__(message)
        self.part = part


class Encoder:
    """Turns questions into :class:`Encoded` for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with character offsets (a "fast" one).
        end_of_answer: what is put after the answer and trained: the tokenizer's end token, a line
            break, or nothing.  Metrics never count it.
        max_tokens: longest question, answer and end token included.
        chat: wrap the prompt as a user's turn of the tokenizer's chat template.
        reading: of the model; a classifier's answers are the names of its classes, without an end.

    Attributes:
        prefix: what the decoder of an encoder-decoder is given before every answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_of_answer: EndOfAnswer = "eos",
        max_tokens: int = 512,
        chat: bool = False,
        reading: Reading = Reading(),
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
        self.reading = reading
        self.end_of_answer: EndOfAnswer = "none" if reading.form == "classes" else end_of_answer
        self._end_ids = end_ids(tokenizer, self.end_of_answer)
        self._special = special_ids(tokenizer)
        self.prefix = self._decoder_prefix() if reading.form == "seq2seq" else ()

    def encode(self, question: Question) -> Encoded:
        """Token ids of prompt, answer and end token.

        Raises:
            MalmendError: the answer does not survive tokenisation or names no class, the question
                is too long, or the model has no embedding for one of its tokens.
        """
        answer = question.answer
        if answer is not None and self.reading.form == "causal":
            encoded = self._encode_joined(self.framed(question.prompt), answer.strip())
        else:
            ids = self.prompt_ids(question.prompt)
            said = () if answer is None else self._answer_ids(answer)
            ends = self._end_ids if said else ()
            form, counted = self.reading.form, len(ids) + len(said)
            encoded = Encoded(ids + said + ends, len(ids), counted, form, self.prefix)
        if encoded.answer_start < 1:
            what = f"the prompt {question.prompt!r} has no token before the answer"
            raise Unfit(f"{what}; give a longer one", "prompt")
        self._check_length(encoded)
        self._embedded(encoded.prompt, "prompt")
        said = () if self.reading.form == "classes" else encoded.labels
        self._embedded((*encoded.decoded, *said), "answer")
        return encoded

    def _check_length(self, encoded: Encoded) -> None:
        """Raises Unfit, about the longer part, where the model cannot read so many tokens."""
        longest = max(len(encoded.read), len(encoded.decoded))
        if longest <= self.max_tokens:
            return
        of_answer = {"causal": len(encoded.labels), "classes": 0, "seq2seq": len(encoded.decoded)}
        part: Part = "answer" if of_answer[encoded.form] > len(encoded.prompt) else "prompt"
        what = f"the {part} has"
        if encoded.form == "causal" and encoded.labels:
            what = "prompt and answer together have"
        raise Unfit(
            f"{what} {longest} tokens, expected at most {self.max_tokens}; shorten the {part}", part
        )

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
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise MalmendError(
                f"the tokenizer's chat template cannot be filled ({error}); mend it, or leave out "
                "what asks through it"
            ) from None

    def in_chat(self) -> Encoder | None:
        """The same encoder through the model's chat template.

        None where there is none that holds what a user says in tokens that the model has, or where
        the model is no causal one.
        """
        if self.reading.form != "causal" or not getattr(self.tokenizer, "chat_template", None):
            return None
        found = Encoder(self.tokenizer, self.end_of_answer, self.max_tokens, True, self.reading)
        try:
            found.prompt_ids(TRIED)
            return found if TRIED in found.framed(TRIED) else None
        except MalmendError:
            return None

    def passage_ids(self, text: str, most: int = 256) -> tuple[int, ...]:
        """The first ``most`` ids of plain text, for statistics; no frame, no end token."""
        return self._embedded(self.ids_of(text)[0][: min(most, self.max_tokens)])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in plain text its tokens stand, by characters; special tokens left out."""
        return [span for span in self.ids_of(text)[1] if span[1] > span[0]]

    def passage(self, text: str) -> Encoded:
        """Plain text as a question, for statistics.

        It has no answer; an encoder-decoder reads the first half and goes on with the second.
        """
        ids, prefix = self.passage_ids(text), self.prefix
        if self.reading.form == "classes":
            # With the marks that every prompt has.
            ids = self._embedded(tokenized(self.tokenizer, text)[0])
            ids = ids if len(ids) <= self.max_tokens else self.passage_ids(text)
        cut = len(ids) if self.reading.form != "seq2seq" else (len(ids) + 1) // 2
        return Encoded(ids, cut, len(ids), self.reading.form, prefix)

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """The ids that the answer follows, or that an encoder reads."""
        if self.reading.form == "causal":
            return self._embedded(self.ids_of(self.framed(prompt))[0])
        return self._embedded(tokenized(self.tokenizer, self.framed(prompt))[0])

    def said(self, ids: Sequence[int]) -> str:
        """What ids of an answer say, end tokens and the like by their names."""
        if self.reading.form == "classes":
            return ", ".join(self.reading.classes[index] for index in ids)
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)).strip()

    def faults(self, facts: Iterable[Fact]) -> list[str]:
        """Every question of every fact that cannot be encoded, one line each."""
        found = []
        for fact in facts:
            fields = [("answer", fact.question)]
            fields += [("paraphrases", question) for question in fact.equivalents]
            fields += [("unrelated", question) for question in fact.unrelated]
            fields += [("neighbours", question) for question in fact.neighbours]
            fields += [("reversed", fact.reversed)] if fact.reversed else []
            if fact.alternative is not None and self.reading.form == "classes":
                fields.append(("alternative", Question(fact.prompt, fact.alternative)))
            for name, question in fields:
                try:
                    self.encode(question)
                except MalmendError as error:
                    name = ELSEWHERE.get((name, getattr(error, "part", "")), name)
                    found.append(f"{fact.where}: field {name!r}: {error}")
        return list(dict.fromkeys(found))  # each of several paraphrases says the same of an answer

    def _embedded(self, ids: tuple[int, ...], part: Part = "prompt") -> tuple[int, ...]:
        """The ids; raises Unfit where the model has no embedding for one of them."""
        known = self.reading.tokens
        if known is not None and max(ids, default=-1) >= known:
            beyond = next(one for one in ids if one >= known)
            raise Unfit(
                f"{self.tokenizer.decode([beyond])!r} is the tokenizer's token number {beyond}, "
                f"and the model has embeddings for {known} tokens; leave it out, or give the "
                "model's own tokenizer",
                part,
            )
        return ids

    def _answer_ids(self, answer: str) -> tuple[int, ...]:
        """An answer that is not read with its prompt: its class, or what a decoder says."""
        if self.reading.form == "seq2seq":
            ids = self.ids_of(answer.strip())[0][len(self.prefix) - 1 :]
            check_survives(self.tokenizer, self._special, answer, ids)
            return ids
        names = [class_key(name) for name in self.reading.classes]
        if class_key(answer) not in names:
            raise MalmendError(
                f"the answer {answer!r} is no class of this model"
                f"{nearest(answer, self.reading.classes) or ','} expected one of "
                f"{', '.join(map(repr, self.reading.classes))}"
            )
        return (names.index(class_key(answer)),)

    def _decoder_prefix(self) -> tuple[int, ...]:
        """The start token, and what the tokenizer puts in front of every text (BART's BOS)."""
        if self.reading.start is None:
            raise MalmendError(
                "The configuration of this encoder-decoder names no decoder_start_token_id, which "
                "its answers begin with; set it in config.json."
            )
        ids, _, marks = tokenized(self.tokenizer, "a")
        first = next((i for i, mark in enumerate(marks) if not mark), 0)
        return (self.reading.start, *ids[:first])

    def _encode_joined(self, prompt: str, answer: str) -> Encoded:
        # A chat template ends where the reply begins, with whatever blank belongs there.
        blank = "" if self.chat or prompt[-1:].isspace() else " "
        ids, spans = self.ids_of(prompt + blank + answer)
        start = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
        check_survives(self.tokenizer, self._special, answer, ids[start:])
        return Encoded(ids + self._end_ids, start, len(ids))

    def ids_of(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Ids and character spans, leading special tokens kept, trailing ones dropped."""
        ids, spans, marks = tokenized(self.tokenizer, text)
        count = len(ids)
        while count and marks[count - 1] and spans[count - 1] == (0, 0):
            count -= 1
        first = 0
        special = {"bos_token": self.tokenizer.bos_token_id, "cls": self.tokenizer.cls_token_id}
        if self.chat and count > 1 and ids[0] == ids[1] and ids[0] in special.values():
            first = 1  # the template wrote the token that BOS added again
        return ids[first:count], spans[first:count]
