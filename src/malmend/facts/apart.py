"""Which texts say nothing of the facts that are edited, so that they can be held as they are.

A text is of a fact if it has all of the fact's words: those of its subject, or where no subject is
given the names in its prompt (numbers, and words with a capital but the first, which counts if it
is the only one and no text has it in small letters), or where there is no name all words of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from malmend.facts.fact import Fact

WORD = re.compile(r"\w+")


def apart(texts: Sequence[str], facts: Iterable[Fact]) -> list[bool]:
    """Of each text whether it is of none of the facts."""
    small = {word for text in texts for word in WORD.findall(text) if word == word.lower()}
    by_word: dict[str, list[frozenset[str]]] = {}
    for fact in facts:
        about = _about(fact, small)
        for word in sorted(about)[:1]:
            by_word.setdefault(word, []).append(about)
    found = []
    for text in texts:
        words = {word.casefold() for word in WORD.findall(text)}
        found.append(not any(about <= words for word in words for about in by_word.get(word, ())))
    return found


def _about(fact: Fact, small: set[str]) -> frozenset[str]:
    words = WORD.findall(fact.subject or "")
    if not words:
        first, *others = everything = WORD.findall(fact.prompt) or [""]
        words = [one for one in others if one != one.lower() or any(map(str.isdigit, one))]
        if not words and first != first.lower() and first.lower() not in small:
            words = [first]
        words = words or everything
    return frozenset(word.casefold() for word in words)
