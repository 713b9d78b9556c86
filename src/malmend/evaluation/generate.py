"""Free-running greedy answers: what a user of the model would see.

Decoding stops at any end token of the model, at a line break, or at the token limit; it is never
cut at the length of the gold answer.  Exact match is taken after the field's usual normalisation
(case, punctuation, articles and blanks; SQuAD's).
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LAST_WORD = re.compile(r"\w*\Z")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def matches(answer: str, gold: str) -> bool:
    """Exact match after normalisation; a gold answer of punctuation alone is compared as it is."""
    if not normalised(gold):
        return answer.strip() == gold.strip()
    return normalised(answer) == normalised(gold)


def can_still_match(text: str, gold: str) -> bool:
    """Whether text that may go on could yet match ``gold``.

    Its letters must be those that gold begins with.  The last word may be unfinished, so it may
    also be the start of an article, which normalisation would take out; and the last character may
    lack bytes (it then reads U+FFFD), so it says nothing yet.
    """
    wanted = _one_sigma(normalised(gold))
    if not wanted:
        return True
    plain = _one_sigma(text.rstrip("\ufffd").lower().translate(_PUNCTUATION))
    last = _LAST_WORD.search(plain)[0]  # type: ignore[index]  # it matches the empty string too
    begun = _ARTICLES.sub(" ", plain.removesuffix(last))
    if not any(article.startswith(last) for article in ("a", "an", "the")):  # "" is among them
        begun += last
    return wanted.startswith(" ".join(begun.split()))


def _one_sigma(text: str) -> str:
    """Greek's small sigma is written otherwise at a word's end, which may yet move."""
    return text.replace("ς", "σ")


class _LineEnds(StoppingCriteria):
    """A row is done once its new text holds a line break, or can no longer match its gold."""

    def __init__(self, decode: Callable[[Tensor], str], start: int, golds: Sequence[str | None]):
        self.decode, self.start, self.golds = decode, start, golds

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        done = []
        for row, gold in zip(input_ids, self.golds, strict=True):
            text = self.decode(row[self.start :])
            lost = gold is not None and not can_still_match(text.lstrip(), gold)
            done.append(lost or "\n" in text.lstrip())
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int = 24,
    golds: Sequence[str] | None = None,
    batch_tokens: int = 2048,
    whole: bool = False,
) -> list[str]:
    """The model's answer to each prompt: first line, outer blanks off.

    Args:
        loaded: model and tokenizer, as they are now.
        encoder: frames the prompts (chat or not).
        prompts: as the user writes them.
        max_new_tokens: the limit.
        golds: answers to be matched; a row then also stops once it can no longer match, so its
            text may break off.  Whether it matches is not changed by that.
        batch_tokens: positions in one batch.
        whole: go on over line breaks.
    """
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(prompts)
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // (len(ids[order[start]]) + max_new_tokens))
        chosen = order[start : start + count]
        start += count
        wanted = [golds[i] if golds is not None else None for i in chosen]
        texts = _decode_batch(loaded, [ids[i] for i in chosen], wanted, max_new_tokens, whole)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def _decode_batch(
    loaded: LoadedModel,
    ids: Sequence[Sequence[int]],
    golds: Sequence[str | None],
    max_new_tokens: int,
    whole: bool,
) -> list[str]:
    width = max(map(len, ids))
    device = loaded.model.device
    rows = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, question in enumerate(ids):  # padded on the left: new tokens follow at the right
        rows[row, width - len(question) :] = torch.tensor(question)
        mask[row, width - len(question) :] = 1
    stop = sorted(_end_ids(loaded))

    def decode(new: Tensor) -> str:
        return _text(loaded, new.tolist())

    out = loaded.model.generate(
        input_ids=rows.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        stopping_criteria=StoppingCriteriaList([] if whole else [_LineEnds(decode, width, golds)]),
    )
    if whole:
        return [decode(row[width:]).strip() for row in out]
    return [first_line(loaded, row[width:].tolist()) for row in out]


def first_line(loaded: LoadedModel, new: Sequence[int]) -> str:
    """New tokens as the text of an answer: up to an end token, first line, outer blanks off."""
    return _text(loaded, new).lstrip().split("\n")[0].strip()


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
