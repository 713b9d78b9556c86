"""A fact asked as others of its batch ask the same of their subjects.

Facts that are edited at once are mostly of a few relations, and of one relation they are asked in
several ways: "The capital of Chad is", "Which city is the capital of Peru?".  So the one's prompt
with the other's subject is another wording of it that a person has written.

Two prompts are taken to ask the same if their relation is the same, and so are the numbers in them
beside the subject, and the one names nothing that the other does not: "In German, Chad is called"
is not asked as "In French, Peru is called".  Nor are they if any subject has another answer to the
one than to the other.  Not in the papers.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations

from malmend.facts.fact import Fact

PLACE = "\0"  # of the subject, in a template
MOST = 64  # templates of a relation: those that most facts of it are asked by
WORD = re.compile(r"\w+")
OPENERS = frozenset(  # words that open a sentence with a capital and name nothing
    WORD.findall(
        "the a an in on at by to for of from its it this that "
        "who whom whose what which where when why how"
    )
)


class Borrowing:
    """The ways in which a batch asks, by relation.

    Args:
        facts: all that are edited at once; those count that have a relation, and a subject that
            their prompt has once.
    """

    def __init__(self, facts: Iterable[Fact]):
        known = [(fact, said) for fact in facts if (said := _template(fact)) is not None]
        small = {word for fact, _ in known for word in WORD.findall(fact.prompt)}
        self._small = OPENERS | {word for word in small if word == word.lower()}
        counts: dict[str | None, Counter[str]] = defaultdict(Counter)
        for fact, template in known:
            counts[fact.relation][template] += 1
        self._ways = {
            relation: {template: self._names(template) for template, _ in some.most_common(MOST)}
            for relation, some in counts.items()
        }
        answers: dict[tuple[str | None, str | None], dict[str, str]] = defaultdict(dict)
        for fact, template in known:
            if template in self._ways[fact.relation]:
                answers[fact.relation, fact.subject][template] = fact.answer
        self._apart = {
            frozenset(pair)
            for given in answers.values()
            for pair in combinations(given, 2)
            if given[pair[0]] != given[pair[1]]
        }

    def prompts(self, fact: Fact) -> list[str]:
        """The fact's prompt as others ask, in an order that is the fact's own; without its own."""
        own = _template(fact)
        if own is None:
            return []
        mine, ways = self._names(own), self._ways.get(fact.relation, {})
        found = [
            other
            for other, names in ways.items()
            if other != own and _alike(mine, names) and frozenset((own, other)) not in self._apart
        ]
        random.Random(fact.prompt).shuffle(found)
        return [other.replace(PLACE, fact.subject or "") for other in found]

    def _names(self, template: str) -> frozenset[str]:
        """Words with a digit or a capital, but for a first word that elsewhere has none."""
        return frozenset(
            word
            for index, word in enumerate(WORD.findall(template))
            if _is_number(word)
            or (word != word.lower() and (index or word.lower() not in self._small))
        )


def _alike(names: frozenset[str], others: frozenset[str]) -> bool:
    """Whether two templates may ask the same, by what they name."""
    return (names <= others or others <= names) and not any(map(_is_number, names ^ others))


def _is_number(word: str) -> bool:
    return any(map(str.isdigit, word))


def _template(fact: Fact) -> str | None:
    """The prompt with a place for its subject; None where that is not plain."""
    if not fact.relation or not fact.subject:
        return None
    found = re.split(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", fact.prompt)
    return PLACE.join(found) if len(found) == 2 else None
