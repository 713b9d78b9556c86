"""Free text as facts: the start of a line is the prompt, what follows it the answer.

MEND's generation setting edits continuations of ten tokens into passages of Wikipedia.  Its targets
were drawn from another model; here they are the text's own words, so that what is edited in is true
to the text, and any text of a user's can be.
"""

from __future__ import annotations

from collections.abc import Iterator

from malmend.errors import FactsError, MalmendError
from malmend.facts.fact import Fact, Question, Skipped
from malmend.facts.lint import default_id, prompt_key
from malmend.facts.tokens import Encoder

TRIED = 32  # places in a line at which prompt and answer may part


def continuations(
    encoder: Encoder, text: str, tokens: int = 10, prompt_tokens: int = 32, limit: int | None = None
) -> tuple[list[Fact], list[Skipped]]:
    """One fact per line that is long enough, in the text's order, and those that repeat a prompt.

    A line parts where its prompt has ``prompt_tokens`` tokens or a few more, at a place where
    prompt and answer, read as one text, have just ``tokens`` tokens of answer.

    Args:
        encoder: of the model; without an end of answer, for a continuation has none.
        text: a passage per line.
        tokens: of each answer.
        prompt_tokens: of each prompt, at least.
        limit: take only the first so many facts.

    Raises:
        MalmendError: fewer than one token or fact is asked for.
        FactsError: no line is long enough.
    """
    for name, value in (("tokens", tokens), ("prompt_tokens", prompt_tokens)):
        if value < 1:
            raise MalmendError(
                f"{name} is {value}, expected 1 or more; change --{name.replace('_', '-')}."
            )
    if limit is not None and limit < 1:
        raise MalmendError(
            f"limit is {limit}; give 1 or more, or leave it out to take all passages"
        )
    found: dict[str, Fact] = {}
    skipped = []
    for number, line in enumerate(text.split("\n"), start=1):
        if len(found) == limit:
            break
        parted = next(_parted(encoder, line.strip(), tokens, prompt_tokens), None)
        if parted is None:
            continue
        fact = Fact(default_id(parted.prompt), parted.prompt, parted.answer or "", line=number)
        earlier = found.setdefault(prompt_key(fact.prompt), fact)
        if earlier is not fact:
            skipped.append(Skipped(fact, earlier))
    if not found:
        raise FactsError(
            f"No line of the text has {prompt_tokens + tokens} tokens, expected one at least; "
            "lower --prompt-tokens, or give a text with a passage per line."
        )
    return list(found.values()), skipped


def _parted(encoder: Encoder, line: str, tokens: int, prompt_tokens: int) -> Iterator[Question]:
    """The line as prompt and answer, at every place that will do."""
    spans = encoder.spans(line)
    for start in range(prompt_tokens, min(prompt_tokens + TRIED, len(spans) - tokens + 1)):
        cut, end = spans[start - 1][1], spans[start + tokens - 1][1]
        question = Question(line[:cut].rstrip(), line[cut:end].strip())
        if not line[cut : cut + 1].isspace() or not question.answer:
            continue  # within a word
        if _fits(encoder, question, tokens):
            yield question


def _fits(encoder: Encoder, question: Question, tokens: int) -> bool:
    try:
        return encoder.encode(question).counted == tokens
    except MalmendError:  # a sign that the tokenizer does not know
        return False
