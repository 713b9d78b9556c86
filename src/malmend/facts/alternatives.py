"""Facts turned into counterfactuals: the answer to edit in is a false one of the same relation."""

from __future__ import annotations

from dataclasses import replace

from malmend.errors import FactsError
from malmend.facts.fact import Fact, FactSet

SHOWN = 5  # places in the message of an error; its .faults holds all


def towards_alternatives(facts: FactSet) -> FactSet:
    """The same facts, each with its alternative for an answer.

    Paraphrases are then asked with the alternative too.  Unrelated questions and neighbours keep
    their true answers.  The reversed prompt is dropped: what it should say is no longer defined.
    So is the alternative, which is now the answer.

    Raises:
        FactsError: facts without an alternative, with the place of each.
    """
    lacking = [_place(fact) for fact in facts if fact.alternative is None]
    if lacking:
        named = ", ".join(lacking[:SHOWN])
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        one = len(lacking) == 1
        error = FactsError(
            f"{facts.source}: {len(lacking)} of {len(facts)} facts {'has' if one else 'have'} no "
            f"alternative ({named}{more}); give {'it' if one else 'each'} the field 'alternative', "
            "a false answer of the same relation, or leave out --alternative."
        )
        error.faults = tuple(
            f"{facts.source}: {place}: field 'alternative': is missing" for place in lacking
        )
        raise error
    turned = tuple(
        replace(fact, answer=fact.alternative or "", alternative=None, reversed=None)
        for fact in facts
    )
    return replace(facts, facts=turned)


def _place(fact: Fact) -> str:
    return f"line {fact.line}" if fact.line else f"fact {fact.id!r}"
