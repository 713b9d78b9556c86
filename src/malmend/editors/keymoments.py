"""The second moments of keys that the prior of the ridge holds (equations 1 and 13).

    text      mean of k k^T over the tokens of general text, of a decoder each line's first left
              out: it is an attention sink, and by itself would make up nearly all of the trace
    asked     mean of k k^T over questions about other subjects, at the tokens that an edit would
              have rows of: neighbours of calibration facts, their unrelated questions and general
              ones, each kind of the same weight
    wording   mean of e e^T, e = (key at a paraphrase's answer token) - (key at the edit prompt's
              same token): how another wording moves the key of the same fact

The first two say where a shift would be felt by what it should leave alone; the third, how far a
key is the fact's own.  All come from calibration facts and text, never from the facts edited.

Shape letters: N tokens, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, Tokens
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder
from malmend.models.capture import keys_in
from malmend.models.device import wide_device
from malmend.models.trunk import Trunk
from malmend.progress import Progress, silent

WORDINGS = 3  # paraphrases of a fact: some have dozens, which say little more


def key_moments(
    trunk: Trunk,
    encoder: Encoder,
    terms: Sequence[str],
    facts: Sequence[Fact],
    text: str,
    most_tokens: int,
    general: Sequence[Question] = (),
    tokens: Tokens = "auto",
    progress: Progress = silent,
) -> dict[str, list[Tensor]]:
    """For each term the second moment of every site, K x K in float64.

    Args:
        trunk: the unedited model.
        encoder: as the edits are encoded.
        terms: of "text", "asked" and "wording".
        facts: calibration facts, with paraphrases and questions about others.
        text: general text, one passage per line.
        most_tokens: the text is read up to the line that reaches so many.
        general: questions about all kinds of things.
        tokens: which tokens the edits will be captured at.
        progress: called with stage and share done.
    """
    found: dict[str, list[Tensor]] = {}
    passages = passages_of(encoder, text)
    if "text" in terms:
        found["text"] = text_moment(trunk, passages, most_tokens, progress)
    if "asked" in terms:
        kinds = (
            [question for fact in facts for question in fact.neighbours],
            [question for fact in facts for question in fact.unrelated],
            general,
        )
        found["asked"] = asked_moments(trunk, encoder, kinds, passages, tokens)
        progress("keys of questions about others", 1.0)
    if "wording" in terms:
        found["wording"] = wording_moment(trunk, encoder, facts)
        progress("keys of paraphrases", 1.0)
    return found


def lines_of(text: str) -> list[str]:
    """The lines of a text that hold something, as facts files part them: no other sign ends one."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def passages_of(encoder: Encoder, text: str) -> list[Encoded]:
    """The lines of a text that have two tokens or more, without an answer."""
    lines = map(encoder.passage, lines_of(text))
    passages = [passage for passage in lines if len(passage.ids) > 1]
    if not passages:
        raise MalmendError("The calibration text has no line of two tokens; give more text.")
    return passages


def end_of(passage: Encoded, tokens: int) -> Encoded:
    """A line of text as a question: its last tokens are the answer, where there is to be one."""
    if passage.form == "classes":
        return passage
    return replace(passage, answer_start=max(1, len(passage.ids) - tokens))


def first_of(passages: Sequence[Encoded], most_tokens: int) -> list[Encoded]:
    """The first passages, until they have so many tokens, not counting each one's first."""
    sizes = torch.tensor([len(one.ids) - 1 for one in passages]).cumsum(0)
    return list(passages[: int((sizes < most_tokens).sum()) + 1])


def others_of(fact: Fact) -> tuple[Question, ...]:
    """Questions about other subjects, near ones first."""
    return (*fact.neighbours, *fact.unrelated)


@torch.no_grad()
def text_moment(
    trunk: Trunk,
    passages: Sequence[Encoded],
    most_tokens: int,
    progress: Progress = silent,
) -> list[Tensor]:
    """C_text of every site: the mean of k k^T over the text, but a line's first token of a decoder.

    Of other forms every token counts, in both halves of an encoder-decoder.
    """
    questions = first_of(passages, most_tokens)
    totals, done = _Totals(trunk), 0
    for indices, batch in trunk.batches(questions):
        totals.add(keys_in(trunk, batch, "all"))
        done += len(indices)
        progress("keys of general text", done / len(questions))
    return totals.means()


def asked_moments(
    trunk: Trunk,
    encoder: Encoder,
    kinds: Sequence[Sequence[Question]],
    passages: Sequence[Encoded],
    tokens: Tokens = "auto",
) -> list[Tensor]:
    """C_asked over several kinds of questions, each of the same weight however many it has.

    A question counts once, in the first kind that has it.  Without any question it is of the ends
    of the text.
    """
    seen: set[Question] = set()
    means: list[list[Tensor]] = []
    for kind in kinds:
        fresh = [question for question in dict.fromkeys(kind) if question not in seen]
        seen.update(fresh)
        if fresh:
            means.append(asked_moment(trunk, encoder.encode_all(fresh), tokens))
    if not means:
        return asked_moment(trunk, passages, tokens)
    return [sum(parts) / len(means) for parts in zip(*means, strict=True)]


@torch.no_grad()
def asked_moment(
    trunk: Trunk, questions: Sequence[Encoded], tokens: Tokens = "auto"
) -> list[Tensor]:
    """C_asked of every site: the mean of k k^T over the tokens of which an edit has rows."""
    totals = _Totals(trunk)
    for _, batch in trunk.batches(questions):
        totals.add(keys_in(trunk, batch, tokens))
    return totals.means()


@torch.no_grad()
def wording_moment(trunk: Trunk, encoder: Encoder, facts: Sequence[Fact]) -> list[Tensor]:
    """C_wording of every site: the mean of e e^T over the answer tokens of three paraphrases.

    A paraphrase in which the answer has another number of tokens is left out.  Of a site in the
    encoder of an encoder-decoder it is zero: no token of one wording is another's.
    """
    pairs = [
        (plain, other)
        for fact in facts
        for plain in [encoder.encode(fact.question)]
        for other in encoder.encode_all(fact.equivalents[:WORDINGS])
        if len(other.sources) == len(plain.sources)
    ]
    distinct = list(dict.fromkeys(one for pair in pairs for one in pair))
    keys: dict[Encoded, list[Tensor]] = {}
    for indices, batch in trunk.batches(distinct):
        seen = keys_in(trunk, batch, "answer")
        split = [
            [keys_NK[:0]] * len(indices) if site.in_encoder else keys_NK.split(batch.tokens.sources)
            for site, keys_NK in zip(trunk.sites, seen, strict=True)
        ]
        keys |= {
            distinct[index]: list(rows)
            for index, rows in zip(indices, zip(*split, strict=True), strict=True)
        }
    totals = _Totals(trunk)
    for start in range(0, len(pairs), 256):
        part = pairs[start : start + 256]
        moved = [
            [there - here for here, there in zip(keys[plain], keys[other], strict=True)]
            for plain, other in part
        ]
        totals.add([torch.cat(rows) for rows in zip(*moved, strict=True)])
    return totals.means()


class _Totals:
    """Running sums of r r^T over rows, one per site."""

    def __init__(self, trunk: Trunk):
        widths, device = [site.shape_VK[1] for site in trunk.sites], wide_device(trunk.model)
        self.sums = [torch.zeros(k, k, dtype=torch.float64, device=device) for k in widths]
        self.counts = [0] * len(widths)

    def add(self, rows: Sequence[Tensor]) -> None:
        for index, rows_NK in enumerate(rows):
            there_NK = rows_NK.to(self.sums[index])
            self.sums[index].addmm_(there_NK.T, there_NK)
            self.counts[index] += len(rows_NK)

    def means(self) -> list[Tensor]:
        return [
            (total_KK / max(count, 1)).cpu()
            for total_KK, count in zip(self.sums, self.counts, strict=True)
        ]
