"""A fact asked as others of its batch ask the same of their subjects.

Facts that are edited at once are mostly of a few relations, and of one relation they are asked in
several ways: "The capital of Chad is", "Which city is the capital of Peru?".  So the one's prompt
with the other's subject is another wording of it that a person has written.

Two ways are taken to ask the same if their relation is the same and several subjects are asked in
either, both with an article or both without; the numbers in them are the same, and the one names
nothing that the other does not ("In German, Chad is called" is not asked as "In French, Peru is
called"); they differ in more than one word, as "The first wife of" and "The second wife of" do not;
and no subject has another answer to the one than to the other.  Names are words with a capital, so
German nouns are, and what tells two ways apart in small letters alone, or in letters without a
case, is not seen: a relation should be one.  A subject in letters that no blanks part is not found.
Not in the papers.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from malmend.facts.apart import WORD, is_number, names
from malmend.facts.fact import Fact

FORMAT = 6  # of what is read; raised with every change of it
MOST_TEMPLATES = 64  # of a relation: those in which most of its subjects are asked
LEAST_SUBJECTS = 2  # that are asked so
OPENERS = frozenset(  # words that open a sentence with a capital and name nothing
    WORD.findall(
        "the a an in on at by to for of from its it this that "
        "who whom whose what which where when why how"
    )
)
ARTICLES = frozenset(("the", "a", "an"))

Template = tuple[str, str, bool]  # before the subject, behind it, and whether an article is its own
Place = tuple[str, Template]  # of a relation


class Borrowing:
    """The ways in which a batch asks, by relation.

    Args:
        facts: all that are edited at once; those lend that have a relation, and a subject that
            their prompt has once.
    """

    def __init__(self, facts: Iterable[Fact] = ()):
        known = list(facts)
        self._answers = defaultdict[tuple[str, ...], set[str]](set)
        small = set[str]()
        asked = defaultdict[Place, dict[str, str]](dict)  # to each subject the answer
        for fact in known:
            self._answers[plain(fact.prompt)].add(fact.answer)
            small.update(word for word in WORD.findall(fact.prompt) if word == word.lower())
            if (found := _template(fact)) is not None:
                relation, subject = str(fact.relation), str(fact.subject)
                asked[relation, found[0]][subject] = fact.answer
        self._small = OPENERS | small
        self._asked = dict(asked)
        self._apart = dict[tuple[str, frozenset[Template]], bool]()  # of pairs that were compared
        self._lent = defaultdict[str, list[Template]](list)
        for (relation, template), subjects in sorted(
            asked.items(), key=lambda one: (-len(one[1]), one[0])
        ):
            if len(subjects) >= LEAST_SUBJECTS and len(self._lent[relation]) < MOST_TEMPLATES:
                self._lent[relation].append(template)
        self._same = dict[Place, list[Template]]()

    def prompts(self, fact: Fact, most: int) -> list[str]:
        """The fact as others ask, in up to so many ways; their order is the fact's own.

        None is asked in the batch with another answer, or of a paraphrase's words: by these an edit
        is measured, so it never reads them.
        """
        found = _template(fact) if most > 0 else None
        if found is None:
            return []
        own, subject = found
        relation = str(fact.relation)
        ways = list(self._ways(relation, own))
        random.Random(fact.prompt).shuffle(ways)
        lent, taken = list[str](), list[Template]()
        for way in ways:
            if len(lent) == most:
                break
            prompt = _filled(way, subject)
            told = self._answers.get(plain(prompt), {fact.answer}) == {fact.answer}
            agrees = all(not self._is_apart(relation, way, other) for other in taken)
            if told and agrees and not measured(fact, prompt, parts=True):
                lent.append(prompt)
                taken.append(way)
        return lent

    def _ways(self, relation: str, own: Template) -> list[Template]:
        """The templates that ask the same as one, without those of its very words."""
        if (relation, own) not in self._same:
            mine, words = self._named(own), plain(" ".join(own[:2]))
            self._same[relation, own] = [
                other
                for other in self._lent.get(relation, ())
                if own[2] == other[2]
                and _alike(mine, self._named(other))
                and not _nearly(words, plain(" ".join(other[:2])))
                and not self._is_apart(relation, own, other)
            ]
        return self._same[relation, own]

    def _is_apart(self, relation: str, one: Template, other: Template) -> bool:
        """Whether a subject has another answer to the one than to the other."""
        pair = relation, frozenset((one, other))
        if pair not in self._apart:
            few, many = sorted((self._asked.get((relation, t), {}) for t in (one, other)), key=len)
            self._apart[pair] = any(many.get(who, said) != said for who, said in few.items())
        return self._apart[pair]

    def _named(self, template: Template) -> frozenset[str]:
        """The names in it; a first word that elsewhere has no capital is none."""
        return frozenset(names(WORD.findall(" ".join(template[:2])), self._small))


def plain(text: str) -> tuple[str, ...]:
    """A text's words without marks, capitals and articles."""
    return tuple(word for word in WORD.findall(text.casefold()) if word not in ARTICLES)


def measured(fact: Fact, prompt: str, parts: bool = False) -> bool:
    """Whether a prompt has all words of a paraphrase, one after another.

    With ``parts`` also whether a paraphrase so has all of its words.
    """
    words = plain(prompt)
    others = [plain(one) for one in fact.paraphrases]
    return any(_holds(words, one) or (parts and _holds(one, words)) for one in others)


def _holds(words: tuple[str, ...], part: tuple[str, ...]) -> bool:
    spots = range(len(words) - len(part) + 1)
    return bool(part) and any(words[at : at + len(part)] == part for at in spots)


def _alike(names: frozenset[str], others: frozenset[str]) -> bool:
    """Whether two templates may ask the same, by what they name."""
    return (names <= others or others <= names) and not any(map(is_number, names ^ others))


def _nearly(words: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether all but one of the words are the same."""
    return len(words) == len(others) and sum(map(str.__ne__, words, others)) <= 1


def _template(fact: Fact) -> tuple[Template, str] | None:
    """How the fact is asked, and the subject as it stands there; None where that is not plain."""
    subject = (fact.subject or "").strip()
    if not fact.relation or not subject:
        return None
    found = list(re.finditer(rf"(?<![\w-])([Tt]he )?{re.escape(subject)}(?![\w-])", fact.prompt))
    if len(found) != 1:
        return None
    behind = fact.prompt[found[0].end() :]
    if behind and unicodedata.category(behind[0]).startswith("M"):  # of the subject's last letter
        return None
    return (fact.prompt[: found[0].start()], behind, found[0][1] is not None), subject


def _filled(way: Template, subject: str) -> str:
    before, behind, has_article = way
    article = ("the " if before else "The ") * has_article
    return f"{before}{article}{subject}{behind}"
