"""What success means: every metric, by name, per question and per fact.

**token ratio** (MALMEN): share of answer tokens that the model would output, teacher forced.
**exact** (MEND): whether all of them are right.
**generated**: whether the free-running greedy answer is the gold answer (see generate.py).
**retention**: share of unrelated answer tokens whose top prediction the edit left unchanged.
**kl**: KL(unedited || edited) at those tokens, nats per token.

ES is over the edit prompts, GS over a fact's paraphrases (mean per fact, then over facts), LS over
unrelated questions against their gold answers; retention and kl need no gold answer.  The
end-of-answer token is never counted in token ratio or exact.

Shape letters: A answer tokens, H hidden width, W vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.evaluation.generate import can_still_match, first_line, generate, matches
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoded, Encoder
from malmend.models.load import LoadedModel
from malmend.models.trunk import Trunk
from malmend.numerics.losses import kl_per_token

Kind = Literal["ES", "GS", "LS"]


@dataclass(frozen=True)
class Asked:
    """One question put to one fact's model, with what is known of the reply.

    ``predicted`` are the ids of the top predictions at the gold answer's tokens, ``text`` is the
    free-running answer, where it was asked for, and ``kl`` is per counted token.
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


@dataclass
class Replies:
    """All replies of one model, edited or not."""

    rows: list[Asked] = field(default_factory=list)

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


class Examiner:
    """Puts the same questions to the unedited and to edited models.

    Args:
        loaded: the model; whatever weights it has when a method is called are examined.
        trunk: of the same model.
        encoder: with the end-of-answer token the model is meant to stop with.
        progress: called with the number of questions just answered.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        trunk: Trunk,
        encoder: Encoder,
        progress: Callable[[int], None] = lambda count: None,
    ):
        self.loaded, self.trunk, self.encoder, self.progress = loaded, trunk, encoder, progress
        self._before: dict[Question, tuple[tuple[int, ...], Tensor]] = {}

    def questions(self, facts: Sequence[Fact]) -> list[tuple[Kind, int, Question]]:
        """Everything that is asked about the facts: edit prompts, paraphrases, unrelated."""
        asked: list[tuple[Kind, int, Question]] = []
        for index, fact in enumerate(facts):
            asked.append(("ES", index, fact.question))
            asked += [("GS", index, question) for question in fact.equivalents]
            asked += [("LS", index, question) for question in fact.unrelated]
        return asked

    def examine(
        self, facts: Sequence[Fact], decode_facts: int | None = None, remember: bool = False
    ) -> Replies:
        """Asks everything once.

        Args:
            facts: what was, or will be, edited.
            decode_facts: answer the ES and GS questions of the first so many facts free-running
                too (the ``generated`` protocol); None for all, 0 for none.
            remember: keep the replies to unrelated questions as the unedited ones, against which
                later calls measure retention and KL.
        """
        asked = self.questions(facts)
        distinct = list(dict.fromkeys(question for _, _, question in asked))
        unrelated = {question for kind, _, question in asked if kind == "LS"}
        forced = self._forced(distinct, unrelated, remember)
        spoken = self._spoken(self.spoken_of(asked, decode_facts), forced)
        rows = []
        for kind, fact, question in asked:
            known = forced[question]
            ok = spoken.get(question) if kind != "LS" else None
            rows.append(
                Asked(
                    kind=kind,
                    fact=fact,
                    question=question,
                    token_ratio=known.token_ratio,
                    exact=known.exact,
                    generated=None if ok is None else float(matches(ok, question.answer or "")),
                    text=ok,
                    predicted=known.predicted,
                    kl=known.kl if kind == "LS" else (),
                )
            )
        return Replies(rows)

    @staticmethod
    def spoken_of(
        asked: Sequence[tuple[Kind, int, Question]], decode_facts: int | None
    ) -> list[Question]:
        """The distinct questions that are answered free-running."""
        chosen = [
            question
            for kind, fact, question in asked
            if kind != "LS" and (decode_facts is None or fact < decode_facts)
        ]
        return list(dict.fromkeys(chosen))

    @torch.no_grad()
    def _forced(
        self, questions: Sequence[Question], unrelated: set[Question], remember: bool
    ) -> dict[Question, _Forced]:
        encoded = self.encoder.encode_all(questions)
        out: dict[Question, _Forced] = {}
        for indices, batch in self.trunk.batches(encoded):
            states_AH = self.trunk.final_states(batch)
            logits_AW = self.trunk.logits_of(states_AH)
            top_A = logits_AW.argmax(dim=-1)
            start = 0
            for index in indices:
                one, question = encoded[index], questions[index]
                part = slice(start, start + len(one.sources))
                start = part.stop
                # Of a question without an answer, the next token is what must not move.
                counted = slice(part.start, part.start + max(one.counted, 1))
                kl: tuple[float, ...] = ()
                if question in unrelated:
                    predicted = tuple(top_A[counted].tolist())
                    if remember:
                        self._before[question] = (predicted, states_AH[counted].cpu())
                    elif question in self._before:
                        kl = self._moved(question, logits_AW[counted])
                out[question] = _Forced.of(one, top_A[part].tolist(), kl)
            self.progress(len(indices))
        return out

    def _moved(self, question: Question, logits_AW: Tensor) -> tuple[float, ...]:
        states_AH = self._before[question][1].to(logits_AW.device)
        return tuple(kl_per_token(self.trunk.logits_of(states_AH), logits_AW).tolist())

    def retention(self, replies: Replies) -> tuple[float | None, float | None]:
        """Share of unrelated answer tokens with an unchanged top prediction, and mean KL."""
        same: list[float] = []
        moved: list[float] = []
        for row in replies.rows:
            if row.kind == "LS" and row.question in self._before:
                before = self._before[row.question][0]
                same += [float(a == b) for a, b in zip(before, row.predicted, strict=True)]
                moved += row.kl
        if not same:
            return None, None
        # Rounding can leave the KL of two equal distributions a hair below zero.
        return math.fsum(same) / len(same), max(0.0, math.fsum(moved) / len(moved))

    def _spoken(
        self, questions: Sequence[Question], forced: dict[Question, _Forced]
    ) -> dict[Question, str]:
        """Free-running answers, decoded only where teacher forcing does not settle them.

        If every answer token *and* the end token are the model's first choice, then greedy
        decoding says exactly the answer and stops.  And its first token is the first choice after
        the prompt: where the answer cannot begin like that, it is lost, and the token is the text.
        Both hold only where prompt and answer, read as one text, begin with the prompt's tokens.
        """
        ends = self.encoder.end_of_answer != "none"
        settled: dict[Question, str] = {}
        for question in questions:
            known, gold = forced[question], question.answer or ""
            if self.encoder.prompt_ids(question.prompt) != known.prompt_ids:
                continue
            first = first_line(self.loaded, known.predicted[:1])
            if ends and known.with_end and "\n" not in gold.strip():
                settled[question] = gold.strip()
            elif not can_still_match(first, gold):
                settled[question] = first
        rest = [q for q in questions if q not in settled]
        golds = [q.answer or "" for q in rest]
        limit = 8 + max((len(forced[q].predicted) for q in rest), default=0)
        texts = generate(self.loaded, self.encoder, [q.prompt for q in rest], limit, golds)
        self.progress(len(questions))
        return settled | dict(zip(rest, texts, strict=True))


@dataclass(frozen=True)
class _Forced:
    """Teacher-forced reply to one question."""

    token_ratio: float | None
    exact: float | None
    with_end: bool
    prompt_ids: tuple[int, ...]
    predicted: tuple[int, ...]
    kl: tuple[float, ...]

    @classmethod
    def of(cls, one: Encoded, top: list[int], kl: tuple[float, ...]) -> _Forced:
        """Compares the top predictions at the sources with the labels."""
        right = [a == b for a, b in zip(top, one.labels, strict=False)]
        counted = right[: one.counted]
        return cls(
            token_ratio=sum(counted) / len(counted) if counted else None,
            exact=float(all(counted)) if counted else None,
            with_end=bool(right) and all(right),
            prompt_ids=one.ids[: one.answer_start],
            predicted=tuple(top[: max(one.counted, 1)]),
            kl=kl,
        )


@torch.no_grad()
def perplexity(
    loaded: LoadedModel, text: str, window: int = 256, most_tokens: int = 20_000
) -> float:
    """exp of the mean negative log-likelihood per token of plain text.

    Read in windows of ``window`` tokens without overlap; the first token of each is not predicted.
    At most ``most_tokens`` are read, from the start.

    Raises:
        MalmendError: the text has fewer than two tokens.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:most_tokens]
    total, count = 0.0, 0
    for piece in _pieces(ids, window):
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
