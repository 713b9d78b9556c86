"""Puts the same questions to the unedited and to edited models.

Shape letters: A answer tokens, H hidden width, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from malmend.evaluation.generate import Answer, first_lines, generate, no_numbers
from malmend.evaluation.matching import can_still_match, matches
from malmend.evaluation.replies import (
    CHATTED,
    HELD,
    SPOKEN,
    Kind,
    Replies,
    Reply,
    questions_of,
)
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel
from malmend.models.output import LOGITS
from malmend.models.trunk import Trunk
from malmend.numerics.chunks import chunks
from malmend.numerics.losses import kl_per_token

TIMES, ROOM = 3, 8  # tokens that a free-running answer may take: so many of its gold answer's, more


class Examiner:
    """Asks everything about facts of one model, whatever weights it has at the time.

    Args:
        loaded: the model; whatever weights it has when a method is called are examined.
        trunk: of the same model.
        encoder: with the end-of-answer token the model is meant to stop with.
        chat: frames prompts for the model's chat template; None asks nothing through it.

    Attributes:
        progress: called with the number of questions just answered; set by whoever wants to know.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        trunk: Trunk,
        encoder: Encoder,
        chat: Encoder | None = None,
    ):
        self.loaded, self.trunk, self.encoder, self.chat = loaded, trunk, encoder, chat
        self.progress: Callable[[int], None] = lambda count: None
        self._before: dict[Question, tuple[tuple[int, ...], Tensor]] = {}

    def measures_against(self, other: Examiner) -> None:
        """Takes what another examiner of the same model remembers of it, unedited."""
        self._before = other._before

    def count(self, facts: Sequence[Fact], decode_facts: int | None = None) -> int:
        """How many questions :meth:`examine` answers; ``progress`` is told as many."""
        asked = list(questions_of(facts))
        chatted = _chosen(asked, CHATTED, decode_facts) if self.chat else []
        forced = {question for _, _, question in asked}
        spoken = _chosen(asked, SPOKEN, decode_facts) if self._speaks else []
        return len(forced) + len(spoken) + len(chatted)

    @property
    def _speaks(self) -> bool:
        """Whether the model can answer in its own words; a classifier has none."""
        return self.encoder.reading.form != "classes"

    def examine(
        self, facts: Sequence[Fact], decode_facts: int | None = None, remember: bool = False
    ) -> Replies:
        """Asks everything once.

        Args:
            facts: what was, or will be, edited.
            decode_facts: answer the ES, GS and RS questions of the first so many facts
                free-running too (the ``generated`` protocols); None for all, 0 for none.
            remember: keep the replies to neighbours and unrelated questions as the unedited ones,
                against which later calls measure what moved.

        Raises:
            MalmendError: the model's logits are NaN, or its KL is not finite.
        """
        asked = list(questions_of(facts))
        held = {question for kind, _, question in asked if kind in HELD}
        forced = self._forced(list(dict.fromkeys(q for _, _, q in asked)), held, remember)
        spoken = {}
        if self._speaks:
            spoken = self._spoken(_chosen(asked, SPOKEN, decode_facts), forced)
        chatted = self._chatted(_chosen(asked, CHATTED, decode_facts), forced)
        return Replies(
            [
                self._asked(
                    kind,
                    fact,
                    question,
                    forced[question],
                    spoken.get(question) if kind in SPOKEN else None,
                    chatted.get(question) if kind in CHATTED else None,
                )
                for kind, fact, question in asked
            ]
        )

    def _asked(
        self,
        kind: Kind,
        fact: int,
        question: Question,
        known: _Forced,
        said: Answer | None,
        in_chat: Answer | None,
    ) -> Reply:
        held, gold = kind in HELD, question.answer or ""
        before = self._before.get(question) if held and known.kl else None
        return Reply(
            kind=kind,
            fact=fact,
            question=question,
            token_ratio=known.token_ratio,
            exact=known.exact,
            generated=None if said is None else float(matches(said.text, gold)),
            text=None if said is None else said.text,
            cut=None if said is None else said.cut,
            predicted=known.predicted,
            kl=known.kl if held else (),
            generated_chat=None if in_chat is None else float(matches(in_chat.text, gold)),
            text_chat=None if in_chat is None else in_chat.text,
            cut_chat=None if in_chat is None else in_chat.cut,
            top=self.encoder.said(known.predicted) if said is None else None,
            moved=None if before is None else before[0] != known.predicted,
        )

    @torch.no_grad()
    def _forced(
        self, questions: Sequence[Question], held: set[Question], remember: bool
    ) -> dict[Question, _Forced]:
        encoded = self.encoder.encode_all(questions)
        out: dict[Question, _Forced] = {}
        for indices, batch in self.trunk.batches(encoded):
            states_AH = self.trunk.final_states(batch)
            logits_AW = self.trunk.logits_of(states_AH)
            self._check(not logits_AW.isnan().any())
            top = logits_AW.argmax(dim=-1).tolist()
            start = 0
            places: dict[Question, slice] = {}
            for index in indices:
                one, question = encoded[index], questions[index]
                part = slice(start, start + len(one.sources))
                start = part.stop
                counted = slice(part.start, part.start + one.predictions)
                if question in held and remember:
                    known = states_AH[counted].cpu().clone()
                    self._before[question] = (tuple(top[counted]), known)
                elif question in held and question in self._before:
                    places[question] = counted
                out[question] = _Forced.of(one, top[part])
            for question, kl in self._moved(places, logits_AW).items():
                out[question] = replace(out[question], kl=kl)
            self.progress(len(indices))
        return out

    def _moved(
        self, places: Mapping[Question, slice], logits_AW: Tensor
    ) -> dict[Question, tuple[float, ...]]:
        """KL of each question's tokens, which lie at ``places``: through one output for all.

        A run of the output layer costs as much for a token as for a hundred.
        """
        if not places:
            return {}
        before = [self._before[question][1] for question in places]
        states_AH = torch.cat(before).to(logits_AW.device)
        at_A = [at for place in places.values() for at in range(place.start, place.stop)]
        kl_A = torch.cat(
            [
                kl_per_token(self.trunk.logits_of(states_AH[rows]), logits_AW[at_A[rows]])
                for rows in chunks(len(at_A), max(1, LOGITS // self.trunk.words))
            ]
        )
        self._check(kl_A.isfinite().all())
        split = kl_A.cpu().split([len(one) for one in before])
        return {question: tuple(kl.tolist()) for question, kl in zip(places, split, strict=True)}

    def _check(self, whole: Tensor | bool) -> None:
        if not whole:
            raise no_numbers(self.loaded.name)

    def _spoken(
        self, questions: Sequence[Question], forced: dict[Question, _Forced]
    ) -> dict[Question, Answer]:
        """Free-running answers, decoded only where teacher forcing does not settle them.

        If every answer token *and* the end token are the model's first choice, then greedy
        decoding says exactly the answer and stops.  And its first token is the first choice after
        the prompt: where the answer cannot begin like that, it is lost, and cut after the token.
        Both hold only where prompt and answer, read as one text, begin with the prompt's tokens.
        """
        ends = self.encoder.end_of_answer != "none"
        settled: dict[Question, Answer] = {}
        for question in questions:
            known, gold = forced[question], question.answer or ""
            if self.encoder.prompt_ids(question.prompt) != known.prompt_ids:
                continue
            first = first_lines(self.loaded, known.predicted[:1])
            if ends and known.with_end:
                settled[question] = Answer(gold.strip())
            elif not can_still_match(first.text, gold):
                settled[question] = first
        rest = [question for question in questions if question not in settled]
        answers = self._decoded(self.encoder, rest, forced)
        self.progress(len(questions))
        return settled | dict(zip(rest, answers, strict=True))

    def _chatted(
        self, questions: Sequence[Question], forced: dict[Question, _Forced]
    ) -> dict[Question, Answer]:
        """Free-running answers through the chat template.

        All are decoded: teacher forcing, in another frame, settles none of them.
        """
        if self.chat is None:
            return {}
        answers = self._decoded(self.chat, questions, forced)
        self.progress(len(questions))
        return dict(zip(questions, answers, strict=True))

    def _decoded(
        self, encoder: Encoder, questions: Sequence[Question], forced: dict[Question, _Forced]
    ) -> list[Answer]:
        prompts = [question.prompt for question in questions]
        golds = [question.answer or "" for question in questions]
        limits = [TIMES * len(forced[question].predicted) + ROOM for question in questions]
        return generate(self.loaded, encoder, prompts, limits, golds)


def _chosen(
    asked: Sequence[tuple[Kind, int, Question]], kinds: Sequence[Kind], decode_facts: int | None
) -> list[Question]:
    """The distinct questions of some kinds, of the first so many facts."""
    chosen = [
        question
        for kind, fact, question in asked
        if kind in kinds and (decode_facts is None or fact < decode_facts)
    ]
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class _Forced:
    """Teacher-forced reply to one question."""

    token_ratio: float | None
    exact: float | None
    with_end: bool
    prompt_ids: tuple[int, ...]
    predicted: tuple[int, ...]
    kl: tuple[float, ...] = ()

    @classmethod
    def of(cls, one: Encoded, top: list[int]) -> _Forced:
        """Compares the top predictions at the sources with the labels."""
        right = [a == b for a, b in zip(top, one.labels, strict=False)]
        counted = right[: one.counted]
        return cls(
            token_ratio=sum(counted) / len(counted) if counted else None,
            exact=float(all(counted)) if counted else None,
            with_end=bool(right) and all(right),
            prompt_ids=one.prompt,
            predicted=tuple(top[: one.predictions]),
        )
