"""Free-running greedy answers: what a user of the model would see.

Decoding stops at any end token of the model, at the end of as many lines as the gold answer has, or
at the token limit; it is never cut at the length of the gold answer.  When an answer matches its
gold one says matching.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from malmend.errors import MalmendError
from malmend.evaluation.matching import can_still_match
from malmend.facts.tokens import Encoder
from malmend.models.ending import rounding
from malmend.models.forms import Unrun, reads, tried, without_cudnn
from malmend.models.load import LoadedModel

_TOGETHER: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Answer:
    """What a model said; ``cut`` where decoding stopped before the model ended it: it may go on."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class _Row:
    """One prompt to be answered."""

    ids: tuple[int, ...]
    limit: int
    gold: str | None

    @property
    def lines(self) -> int:
        """How many lines the answer is read for."""
        return max(1, len(_lines(self.gold or "")))


class _LineEnds(StoppingCriteria):
    """A row is done at its limit, after its lines, or when it can no longer match its gold.

    ``lengths`` holds how many tokens each row had by then: what is in it beyond is padding, or
    what a model without an end token says while others of its batch go on.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], start: int, rows: Sequence[_Row]):
        self.decode, self.start, self.rows = decode, start, rows
        self.lengths = [row.limit for row in rows]

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.start
        said = input_ids[:, self.start :].tolist()  # of all rows at once: a device is waited for
        for index, (row, new) in enumerate(zip(self.rows, said, strict=True)):
            if length < self.lengths[index]:
                text, gold = self.decode(new), row.gold
                lost = gold is not None and not can_still_match(text.lstrip(), gold)
                if lost or _ended_lines(text) >= row.lines:
                    self.lengths[index] = length
        done = [length >= limit for limit in self.lengths]
        return torch.tensor(done, device=input_ids.device)


def no_numbers(name: str) -> MalmendError:
    """What is said of a model whose logits are none."""
    return MalmendError(
        f"The logits of {name} hold NaN or infinity, so it says nothing; check its weights and the "
        "patch, or load it in float32."
    )


class _Numbers(LogitsProcessor):
    """Refuses NaN, of which the first token would be taken for the largest."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise no_numbers(self.name)
        return scores


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int] = 24,
    golds: Sequence[str] | None = None,
    batch_tokens: int = 2048,
    whole: bool = False,
) -> list[Answer]:
    """The model's answer to each prompt: as many lines as its gold has, outer blanks off.

    Args:
        loaded: model and tokenizer, as they are now.
        encoder: frames the prompts (chat or not).
        prompts: as the user writes them.
        max_new_tokens: the limit, or each prompt's own.  It is cut where the model's positions end.
        golds: answers to be matched; a row then also stops once it can no longer match, and is
            ``cut``.  Whether it matches is not changed by that.
        batch_tokens: positions in one batch.
        whole: go on over line breaks.

    Raises:
        MalmendError: a prompt leaves the model no position to answer at, or logits are NaN.
    """
    # An encoder-decoder has as many positions again for the answers, behind a prefix.
    room, before = loaded.positions, len(encoder.prefix)
    joined = encoder.reading.form == "causal"
    rows = []
    for index, prompt in enumerate(prompts):
        ids = encoder.prompt_ids(prompt)
        limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[index]
        if room is not None and len(ids) >= room:
            raise MalmendError(
                f"The prompt {prompt[:40]!r}... has {len(ids)} tokens, but {loaded.name} has "
                f"{room} positions for prompt and answer; shorten it."
            )
        limit = limit if room is None else min(limit, room - (len(ids) if joined else before))
        rows.append(_Row(ids, limit, None if golds is None else golds[index]))
    answers = [Answer("")] * len(prompts)
    alone = joined and len(rows) > 1 and not _says_the_same_together(loaded.model)
    for chosen in _batches(rows, batch_tokens, room if joined else None, alone):
        said = _decode_batch(loaded, [rows[index] for index in chosen], encoder.prefix, whole)
        for index, answer in zip(chosen, said, strict=True):
            answers[index] = answer
    return answers


@torch.no_grad()
def _says_the_same_together(model: PreTrainedModel) -> bool:
    """Whether a decoder says the same beside another prompt, and behind padding, on a trial.

    Some recurrent ones know no mask, or mix the states of a batch; none that has fewer positions
    than the trial.
    """
    if not reads(model, 6):
        return True
    if model not in _TOGETHER:
        ids = torch.tensor([[2, 1, 0, 1, 2], [0, 0, 0, 1, 2]], device=model.device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]], device=model.device)
        plain = GenerationConfig(
            max_new_tokens=2,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=model.generation_config.use_cache,
        )
        try:
            with _decoding_by(model, plain), tried():
                together, alone = (
                    model.generate(some, attention_mask=there, generation_config=plain)
                    for some, there in ((ids, mask), (ids[1:, 3:], mask[1:, 3:]))
                )
        except Unrun:  # of fewer positions than it states
            return True
        share = rounding(model.dtype)
        _TOGETHER[model] = all(
            (behind_RW[-1] - own_1W[0]).abs().max() <= share * own_1W.abs().max()
            for behind_RW, own_1W in zip(together.logits, alone.logits, strict=True)
        )
    return _TOGETHER[model]


def _batches(
    rows: Sequence[_Row], batch_tokens: int, room: int | None, alone: bool = False
) -> Iterator[list[int]]:
    """Indices of rows that are decoded together, longest prompts first.

    A batch goes on until its last row is done, so no row of it may run out of positions by then.
    With ``alone`` each holds one.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    chosen: list[int] = []
    most = 0
    for index in order:
        longest = len(rows[chosen[0] if chosen else index].ids)
        width = longest + max(most, rows[index].limit)
        if chosen and (
            alone or (len(chosen) + 1) * width > batch_tokens or width > (room or width)
        ):
            yield chosen
            chosen, most = [], 0
        chosen.append(index)
        most = max(most, rows[index].limit)
    if chosen:
        yield chosen


def _decode_batch(
    loaded: LoadedModel, asked: Sequence[_Row], prefix: tuple[int, ...], whole: bool
) -> list[Answer]:
    width = max(len(row.ids) for row in asked)
    device = loaded.model.device
    rows = torch.zeros(len(asked), width, dtype=torch.long)
    mask = torch.zeros_like(rows)
    encodes = loaded.reading.form == "seq2seq"
    for at, row in enumerate(asked):
        # A decoder's new tokens follow its prompt, so that is padded on the left.
        size = len(row.ids)
        place = slice(0, size) if encodes else slice(width - size, width)
        rows[at, place], mask[at, place] = torch.tensor(row.ids), 1
    stop = sorted(_end_ids(loaded))
    # What the answers stand behind: the prompts, or the prefix that a decoder is given.
    given = {}
    if encodes:
        given["decoder_input_ids"] = torch.tensor([prefix] * len(asked), device=device)
    before = len(prefix) if encodes else width

    line_ends = _LineEnds(lambda new: _text(loaded, new), before, asked)
    plain = GenerationConfig(
        max_new_tokens=max(row.limit for row in asked),
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        decoder_start_token_id=prefix[0] if encodes else None,
        use_cache=loaded.model.generation_config.use_cache,
    )
    with _decoding_by(loaded.model, plain):
        out = loaded.model.generate(
            input_ids=rows.to(device),
            attention_mask=mask.to(device),
            generation_config=plain,
            logits_processor=LogitsProcessorList([_Numbers(loaded.name)]),
            stopping_criteria=StoppingCriteriaList([] if whole else [line_ends]),
            **given,
        )
    rows_new = [
        ids[before : before + length].tolist()
        for ids, length in zip(out, line_ends.lengths, strict=True)
    ]
    if whole:
        return [Answer(_text(loaded, new).strip(), not _ended(loaded, new)) for new in rows_new]
    return [first_lines(loaded, new, row.lines) for new, row in zip(rows_new, asked, strict=True)]


@contextmanager
def _decoding_by(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Sets a model's own settings aside: whatever is unset would be filled in from them.

    What they forbid or favour would not be the model's first choice.  Decoded without cuDNN's
    attention.
    """
    own = model.generation_config
    model.generation_config = settings
    try:
        with without_cudnn():
            yield
    finally:
        model.generation_config = own


def first_lines(loaded: LoadedModel, new: Sequence[int], lines: int = 1) -> Answer:
    """New tokens as an answer: up to an end token, so many lines, outer blanks off.

    It is cut where the tokens hold neither an end token nor a line break after it.
    """
    text = _text(loaded, new)
    said = "\n".join(_lines(text)[:lines]).strip()
    return Answer(said, _ended_lines(text) < lines and not _ended(loaded, new))


def _lines(text: str) -> list[str]:
    """The lines that are not blank, as matching takes them."""
    return [line for line in text.split("\n") if line.strip()]


def _ended_lines(text: str) -> int:
    """How many of them a line break has ended."""
    return len(_lines(text[: text.rfind("\n") + 1]))


def _ended(loaded: LoadedModel, new: Sequence[int]) -> bool:
    return not _end_ids(loaded).isdisjoint(new)


def _text(loaded: LoadedModel, new: Sequence[int]) -> str:
    """The text of new tokens up to the first that ends an answer."""
    ends = _end_ids(loaded)
    kept = list(itertools.takewhile(lambda token: token not in ends, new))
    return loaded.tokenizer.decode(
        kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _end_ids(loaded: LoadedModel) -> set[int]:
    """Every id that ends an answer, from the generation settings and the tokenizer."""
    named = loaded.model.generation_config.eos_token_id
    ends = set(named) if isinstance(named, list) else {named}
    ends.add(loaded.tokenizer.eos_token_id)
    ends.discard(None)
    return ends
