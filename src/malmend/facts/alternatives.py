"""Facts turned into others: towards a false answer, or away from what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from malmend.errors import FactsError, counted
from malmend.facts.fact import Fact, FactSet, same_class


def towards_alternatives(facts: FactSet) -> FactSet:
    """The same facts, each with its alternative for an answer.

    Paraphrases are then asked with the alternative too.  Unrelated questions and neighbours keep
    their true answers.  The reversed prompt is dropped: what it should say is no longer defined.
    So is the alternative, which is now the answer.

    Raises:
        FactsError: facts without an alternative, with the place of each.
    """
    lacking = [fact for fact in facts if fact.alternative is None]
    if lacking:
        one = len(lacking) == 1
        raise _lacking(
            facts,
            lacking,
            f"{len(lacking):,} of {counted(len(facts), 'fact')} {'has' if one else 'have'} no "
            "alternative",
            f"give {'it' if one else 'each'} the field 'alternative', a false answer of the same "
            "relation, for --alternative asks for it, or a patch that was made with it",
        )
    turned = tuple(
        replace(fact, answer=fact.alternative or "", alternative=None, reversed=None)
        for fact in facts
    )
    return replace(facts, facts=turned)


def away_from(facts: FactSet, said: Sequence[str], classes: Sequence[str]) -> FactSet:
    """The same facts, each aiming at a class that the model does not say of its prompt.

    Where the model says the answer, that is the alternative, or of two classes the other one;
    elsewhere it is the answer.

    Args:
        facts: whose answers are classes.
        said: the model's class of each.
        classes: all of them.

    Raises:
        FactsError: facts that need an alternative and have none, with the place of each.
    """
    turned, lacking = [], []
    for fact, label in zip(facts, said, strict=True):
        target = fact.answer
        if same_class(label, target):
            others = [name for name in classes if not same_class(name, label)]
            target = fact.alternative or (others[0] if len(others) == 1 else "")
        if not target or same_class(label, target):
            lacking.append(fact)
        turned.append(replace(fact, answer=target, alternative=None, reversed=None))
    if lacking:
        raise _lacking(
            facts,
            lacking,
            f"of {len(lacking):,} of {counted(len(facts), 'fact')} the model already says the "
            "answer, and no other class is named",
            "give each the field 'alternative', for --away asks for another class, or a patch that "
            "was made with it",
        )
    return replace(facts, facts=tuple(turned))


def _lacking(facts: FactSet, lacking: Sequence[Fact], what: str, otherwise: str) -> FactsError:
    """The error of facts that lack an alternative, with the place of the first; .faults has all."""
    first = "" if len(lacking) == 1 else "the first: "
    error = FactsError(f"{facts.source}: {what} ({first}{lacking[0].where}); {otherwise}.")
    error.faults = tuple(f"{one.where}: field 'alternative': is missing" for one in lacking)
    return error
