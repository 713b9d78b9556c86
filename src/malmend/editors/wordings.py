"""A fact asked in other words, made of its prompt alone.

An edit that holds for its prompt, and for the prompt in frames, still leans on the words between:
asked otherwise, it may not be there.  With some of them left out, others each time, what is left to
answer by is what a rewording has too, above all the subject.

And an edit of a sentence to complete is not there in a question, whose answer follows a question
mark, nor one of a question in a sentence.  So one wording turns the one into the other.  It knows
a few English words and no grammar: what it makes is often clumsy ("What is Lyon located in?"), and
of a prompt in another language mostly a sentence with "what?" at its end.  Not in the papers.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace

from malmend.facts.fact import Fact

LEFT_OUT = 0.3  # share of a prompt's other words
MARKS = ".,;:!?'\"()"
TURNED = 1  # which of a fact's wordings is the turned one; later ones are too
BE, CALLED = "is|was|are|were", " called| named| known as"
SETTINGS = re.compile(r"((?:In|On|At|By|To|For|Of|From) [^,]+), (.+)")  # "In French, "
ENDS_IN_BE = re.compile(rf"(.+?),? ({BE})((?:{CALLED})?)(?: the| an?)?")
HOLDS_BE = re.compile(rf"([^,]+) ({BE})( [^,]+)")
SEVERAL = re.compile(r"\n|[.?!:;…]['\")]*(?:\s|\Z)")  # sentences, or a label before one
ASKS = re.compile(r"(?:Who|Whom|Whose|What|Which|Where|When|Why|How)\b|.*\?$", re.I)
ASKS_WHAT = re.compile(rf"(?:What|Who|Where|When) ({BE}) (.+?)((?:{CALLED})?)\??", re.I)
WITHOUT_NAME = re.compile("(?:The|An?|In|On|At|By|To|For|Of|From|Its?|This|That) ", re.I)


def wording(fact: Fact, which: int) -> str:
    """The prompt in other words, others for each ``which``; the same for the same.

    The first is in fewer words, that of :data:`TURNED` is turned, where that can be, and all others
    are turned and in fewer words.  None has the words of one of the fact's paraphrases in their
    order: by these an edit is measured, so it never reads them.
    """
    measured = {_words(one) for one in fact.paraphrases}
    found = turned(fact.prompt) if which >= TURNED else None
    subject = fact.subject or ""
    loses_subject = subject in fact.prompt and subject not in (found or "")
    if found is None or loses_subject or _words(found) in measured:
        found = fewer_words(fact, which)
    elif which > TURNED:
        found = fewer_words(replace(fact, prompt=found), which)
    return fact.prompt if _words(found) in measured else found


def _words(text: str) -> tuple[str, ...]:
    """A text without its marks and capitals."""
    return tuple(re.findall(r"\w+", text.casefold()))


def turned(prompt: str) -> str | None:
    """A sentence to complete as a question, or a question as such a sentence.

    None for a question that does not begin with "What is", "Who was" or the like, and for a prompt
    of several sentences or with a mark at its end.
    """
    said = prompt.strip(" ,")
    if SEVERAL.search(said.removesuffix("?")):
        return None
    if ASKS.match(said):
        asks = ASKS_WHAT.fullmatch(said)
        return asks and f"{_large(asks[2])} {asks[1]}{asks[3]}"
    setting, where = SETTINGS.fullmatch(said), ""
    if setting:
        where, said = f", {_small(setting[1])}", setting[2]
    found = ENDS_IN_BE.fullmatch(said) or HOLDS_BE.fullmatch(said)
    if found:
        return f"What {found[2]} {_small(found[1])}{found[3]}{where}?"
    return f"{said} what{where}?"


def _small(text: str) -> str:
    """The first letter small, unless a name may begin with it."""
    return text[0].lower() + text[1:] if WITHOUT_NAME.match(text) else text


def _large(text: str) -> str:
    return text[0].upper() + text[1:] if WITHOUT_NAME.match(text) else text


def fewer_words(fact: Fact, which: int) -> str:
    """The prompt with some words left out, others for each ``which``; the same for the same.

    Words of the subject stay; of a fact without one, all with a capital letter or a digit.
    """
    words = fact.prompt.split()
    subject = {one.strip(MARKS) for one in (fact.subject or "").split()}
    draw = random.Random(f"{which} {fact.prompt}")

    def stays(word: str) -> bool:
        named = word.strip(MARKS) in subject if subject else any(map(_names, word))
        return draw.random() >= LEFT_OUT or named

    return " ".join(filter(stays, words)) or fact.prompt


def _names(mark: str) -> bool:
    return mark.isupper() or mark.isdigit()
