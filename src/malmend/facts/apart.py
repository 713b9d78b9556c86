"""Which texts say nothing of the facts that are edited, so that they can be held as they are.

A fact's words are those of its subject, or where no subject is given the names in its prompt:
numbers, and words with a capital (the first one unless a text has it in small letters), or where
there is no name all words of the prompt.  A text is of a fact if it has all of these words, or a
name that no more than a few texts have.  Other forms of a word, and translations, are not found.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from malmend.facts.fact import Fact

WORD = re.compile(r"\w+")
FEW = 2  # texts at most that have a word which tells by itself what they are of


def apart(texts: Sequence[str], facts: Iterable[Fact], few: int = FEW) -> list[bool]:
    """Of each text whether it is of none of the facts; a name tells that ``few`` texts have."""
    plain = [_plain(text) for text in texts]
    small = {word for text in plain for word in WORD.findall(text) if word == word.lower()}
    folded = [_folded(WORD.findall(text)) for text in plain]
    counts = Counter(word for words in folded for word in words)
    telling: set[str] = set()
    together: dict[str, list[frozenset[str]]] = {}
    unspaced: set[str] = set()  # of a language whose words no blanks part
    for fact in facts:
        about, is_named = _about(fact, small)
        if is_named:
            telling.update(word for word in about if counts[word] <= few)
        for word in sorted(about)[:1]:
            together.setdefault(word, []).append(about)
        subject = _plain(fact.subject or "").casefold().strip()
        if subject and not subject.isascii():
            unspaced.add(subject)
    starts = _shortest(unspaced)
    return [
        telling.isdisjoint(words)
        and not any(about <= words for word in words for about in together.get(word, ()))
        and not _holds(text, starts)
        for text, words in zip(map(str.casefold, plain), folded, strict=True)
    ]


def _shortest(subjects: Iterable[str]) -> list[str]:
    """In order, without those that begin as another of them: who has these has that one."""
    found: list[str] = []
    for subject in sorted(subjects):
        if not (found and subject.startswith(found[-1])):
            found.append(subject)
    return found


def _holds(text: str, subjects: Sequence[str]) -> bool:
    """Whether one of the subjects, none in ASCII and as :func:`_shortest` gives, is in the text.

    Of those one alone may begin at a place, the last that is not behind the text from there on;
    so that many subjects take hardly longer than few.
    """
    if not subjects or text.isascii():
        return False
    for start in range(len(text)):
        at = bisect_right(subjects, text[start:])
        if at and text.startswith(subjects[at - 1], start):
            return True
    return False


def _about(fact: Fact, small: set[str]) -> tuple[frozenset[str], bool]:
    """A fact's words, and whether they are names."""
    named = _words(fact.subject or "")
    if not named:
        prompt = _words(fact.prompt)
        named = names(prompt, small)
        return _folded(named or prompt), bool(named)
    return _folded(named), True


def names(words: Iterable[str], small: Collection[str]) -> list[str]:
    """Of a text's words the numbers and those with a capital.

    A capital of the first one tells nothing where ``small`` has it, as it is elsewhere.
    """
    return [
        word
        for index, word in enumerate(words)
        if is_number(word) or (word != word.lower() and (index or word.lower() not in small))
    ]


def is_number(word: str) -> bool:
    """Whether a word has a digit."""
    return any(map(str.isdigit, word))


def _folded(words: Iterable[str]) -> frozenset[str]:
    """Without single letters, as of "Kiribati's"."""
    return frozenset(word.casefold() for word in words if len(word) > 1 or not word.isascii())


def _words(text: str) -> list[str]:
    return WORD.findall(_plain(text))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)
