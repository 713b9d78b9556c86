"""What was asked and what a model replied, unedited and edited: plain values.

Five kinds of questions: **ES** edit prompts, **GS** paraphrases, **NS** neighbours (the same
question about another subject), **LS** unrelated questions, **RS** the fact asked from the other
side.  NS and LS must not move; RS is reported only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from malmend.facts.fact import Fact, Question

Kind = Literal["ES", "GS", "NS", "LS", "RS"]
KINDS: tuple[Kind, ...] = ("ES", "GS", "NS", "LS", "RS")
HELD: tuple[Kind, ...] = ("NS", "LS")  # what an edit must leave alone
SPOKEN: tuple[Kind, ...] = ("ES", "GS", "RS")  # answered free-running too
CHATTED: tuple[Kind, ...] = ("ES", "GS")  # and through the chat template


@dataclass(frozen=True)
class Reply:
    """One question put to one fact's model, with what is known of the reply.

    What does not apply to the question's kind, or was not asked, is None or empty.

    Attributes:
        token_ratio, exact: teacher forced, over the gold answer's tokens.
        generated: whether ``text``, the free-running answer, is the gold answer.
        cut: whether ``text`` may be only how the answer begins: decoding stops once it can no
            longer be the gold answer, or at its limit of tokens.
        generated_chat, text_chat, cut_chat: the same, asked through the chat template.
        predicted: ids of the top predictions at the gold answer's tokens, or at the next token.
        top: what those ids say, where there is no ``text``.
        kl: KL(unedited || edited) per counted token, nats; NS and LS of an edited model.
        moved: whether any of those predictions is another one than the unedited model's; likewise.
    """

    kind: Kind
    fact: int
    question: Question
    token_ratio: float | None = None
    exact: float | None = None
    generated: float | None = None
    text: str | None = None
    predicted: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()
    generated_chat: float | None = None
    text_chat: str | None = None
    top: str | None = None
    moved: bool | None = None
    cut: bool | None = None
    cut_chat: bool | None = None

    @property
    def right(self) -> bool | None:
        """Whether the answer is right, free-running where it was decoded; None where none is."""
        found = self.exact if self.generated is None else self.generated
        return None if found is None else found == 1.0

    @property
    def said(self) -> str:
        """What the model says, free-running where it was decoded."""
        return (self.top if self.text is None else self.text) or ""

    @property
    def mean_kl(self) -> float | None:
        """Mean over the counted tokens; rounding could leave it a hair below zero."""
        return max(0.0, math.fsum(self.kl) / len(self.kl)) if self.kl else None


@dataclass
class Replies:
    """All replies of one model, edited or not, in the order of the questions."""

    rows: list[Reply] = field(default_factory=list)

    def mean(self, kind: Kind, metric: str) -> float | None:
        """Mean over a fact's questions, then over facts; None where nothing was asked."""
        by_fact: dict[int, list[float]] = {}
        for row in self.rows:
            value = getattr(row, metric)
            if row.kind == kind and value is not None:
                by_fact.setdefault(row.fact, []).append(value)
        if not by_fact:
            return None
        return math.fsum(math.fsum(v) / len(v) for v in by_fact.values()) / len(by_fact)


@dataclass(frozen=True)
class FactRow:
    """One fact with its replies, before and after, in the same order.

    ``answer_tokens`` is the length of its answer in the model's tokens, the end token not counted.
    """

    id: str
    prompt: str
    answer: str
    unedited: tuple[Reply, ...]
    edited: tuple[Reply, ...]
    relation: str | None = None
    subject: str | None = None
    answer_tokens: int = 0


def rows_of(facts: Sequence[Fact], unedited: Replies, edited: Replies | None) -> list[FactRow]:
    """Replies by fact."""
    before: dict[int, list[Reply]] = {index: [] for index in range(len(facts))}
    after: dict[int, list[Reply]] = {index: [] for index in range(len(facts))}
    for row in unedited.rows:
        before[row.fact].append(row)
    for row in edited.rows if edited else ():
        after[row.fact].append(row)
    return [
        FactRow(
            id=fact.id,
            prompt=fact.prompt,
            answer=fact.answer,
            unedited=tuple(before[index]),
            edited=tuple(after[index]),
            relation=fact.relation,
            subject=fact.subject,
            answer_tokens=next((len(r.predicted) for r in before[index] if r.kind == "ES"), 0),
        )
        for index, fact in enumerate(facts)
    ]


def questions_of(facts: Sequence[Fact]) -> Iterator[tuple[Kind, int, Question]]:
    """Everything that is asked about the facts, fact by fact, in the order of :data:`KINDS`."""
    for index, fact in enumerate(facts):
        yield "ES", index, fact.question
        for question in fact.equivalents:
            yield "GS", index, question
        for question in fact.neighbours:
            yield "NS", index, question
        for question in fact.unrelated:
            yield "LS", index, question
        if fact.reversed is not None:
            yield "RS", index, fact.reversed
