"""A fact asked in fewer words.

An edit that holds for its prompt, and for the prompt in frames, still leans on the words between:
asked otherwise, it may not be there.  With some of them left out, others each time, what is left to
answer by is what a rewording has too, above all the subject.  Not in the papers.
"""

from __future__ import annotations

import random

from malmend.facts.fact import Fact

LEFT_OUT = 0.3  # share of a prompt's other words
MARKS = ".,;:!?'\"()"


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
