"""What is asked of a tokenizer itself: how it cuts a text, what ends an answer, what survives."""

from __future__ import annotations

import unicodedata
from collections.abc import Set
from typing import Any, Literal

from malmend.errors import MalmendError

EndOfAnswer = Literal["eos", "newline", "none"]


def tokenized(
    tokenizer: Any, text: str
) -> tuple[tuple[int, ...], list[tuple[int, int]], list[int]]:
    """Ids, character spans and which are special, as the tokenizer frames a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalmendError(
            f"the text {text[:40]!a} is not UTF-8 (it holds {text[error.start]!a}); "
            "save or type it as UTF-8"
        ) from None
    out = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False
    )
    spans = [tuple(span) for span in out["offset_mapping"]]
    return tuple(out["input_ids"]), spans, out["special_tokens_mask"]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that are no text of an answer; the unknown token, which stands for text, is none."""
    added = tokenizer.added_tokens_decoder.items()  # many of which no role is known
    special = {*tokenizer.all_special_ids, *(id for id, one in added if one.special)}
    special.discard(tokenizer.unk_token_id)
    return special


def end_ids(tokenizer: Any, end_of_answer: EndOfAnswer) -> tuple[int, ...]:
    """What is put after an answer; raises MalmendError where the tokenizer lacks it."""
    if end_of_answer == "none":
        return ()
    if end_of_answer == "newline":
        ids = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
        if "\n" not in tokenizer.decode(ids):
            raise MalmendError(
                "The tokenizer has no token for a line break; set end_of_answer to 'eos' or 'none'."
            )
        return ids
    if tokenizer.eos_token_id is None:
        raise MalmendError(
            "The tokenizer has no end token; set end_of_answer to 'newline' or 'none', or make "
            "an encoder a classifier with malmend finetune first."
        )
    return (tokenizer.eos_token_id,)


def check_survives(tokenizer: Any, special: Set[int], answer: str, ids: tuple[int, ...]) -> None:
    """Raises MalmendError unless an answer's ids read back as it, and hold no special token."""
    if marks := [one for one in ids if one in special]:
        raise MalmendError(
            f"the answer {answer!r} holds {tokenizer.decode(marks[:1])!r}, a special "
            "token, which is no text of an answer; leave it out"
        )
    kept = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not answer.strip() or tokenizer.unk_token_id in ids or not _same(kept, answer):
        raise MalmendError(
            f"the answer {answer!r} does not survive tokenisation, it reads back as {kept!r}; "
            "write it with characters that the tokenizer knows"
        )


def _same(kept: str, answer: str) -> bool:
    """Whether a decoded answer is the answer, up to outer blanks and Unicode composition."""
    return _plain(kept) == _plain(answer)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().casefold()
