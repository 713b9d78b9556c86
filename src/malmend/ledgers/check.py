"""Facts against a ledger that holds some: which are new, which contradict, which replace."""

from __future__ import annotations

from collections.abc import Sequence

from malmend.errors import FactsError, counted, nearest
from malmend.facts.entry import short
from malmend.facts.fact import Fact, FactSet, same_answer
from malmend.facts.lint import prompt_key
from malmend.ledgers.entries import Entry

HINTED = 3  # faults that name a nearest prompt, which all active ones are searched for


def unlike(active: Sequence[Entry], known: FactSet, strict: bool) -> tuple[list[Fact], list[Fact]]:
    """The facts that the ledger lacks, and those that it holds as they are.

    Raises:
        FactsError: with every fact that contradicts an active one, or has its id.
    """
    by_prompt = {prompt_key(entry.prompt): entry for entry in active}
    by_id = {entry.id: entry for entry in active}
    fresh, duplicates, faults = [], [], []
    for fact in known:
        other = by_prompt.get(prompt_key(fact.prompt))
        if other is not None and same_answer(fact.answer, other.answer):
            duplicates.append(fact)
            if strict:
                faults.append(f"{fact.where}: the ledger holds it already as {other.id!r}")
        elif other is not None:
            faults.append(
                f"{fact.where}: prompt {short(fact.prompt)} has answer "
                f"{short(fact.answer)} here and {short(other.answer)} in the ledger "
                f"({other.id!r}, generation {other.generation}); take it out, or give it to "
                "`malmend ledger replace`"
            )
        elif fact.id in by_id:
            faults.append(
                f"{fact.where}: its id is that of an active fact with the prompt "
                f"{short(by_id[fact.id].prompt)}; give it another"
            )
        else:
            fresh.append(fact)
    _raise(known, faults)
    return fresh, duplicates


def paired(
    active: Sequence[Entry], known: FactSet, strict: bool
) -> tuple[list[tuple[Fact, Entry]], list[Fact]]:
    """Facts with the active ones that they replace, and those that change nothing.

    Raises:
        FactsError: with every fact whose prompt no active one has, or whose id another one has.
    """
    by_prompt = {prompt_key(entry.prompt): entry for entry in active}
    by_id = {entry.id: entry for entry in active}
    pairs, duplicates, faults = [], [], list[str]()
    for fact in known:
        prompt = prompt_key(fact.prompt)
        other = by_prompt.get(prompt)
        if other is None:
            near = nearest(prompt, by_prompt) if len(faults) < HINTED else ""
            faults.append(
                f"{fact.where}: no active fact has the prompt {short(fact.prompt)}"
                f"{f'{near} Or' if near else ';'} give it to `malmend ledger add`"
            )
        elif same_answer(fact.answer, other.answer):
            duplicates.append(fact)
            if strict:
                faults.append(f"{fact.where}: the ledger holds it already as {other.id!r}")
        elif by_id.get(fact.id, other) is not other:
            faults.append(
                f"{fact.where}: its id is that of an active fact with the prompt "
                f"{short(by_id[fact.id].prompt)}; give it another"
            )
        else:
            pairs.append((fact, other))
    _raise(known, faults)
    return pairs, duplicates


def _raise(known: FactSet, faults: Sequence[str]) -> None:
    if faults:
        count = "1 fact does" if len(faults) == 1 else f"{len(faults)} facts do"
        raise FactsError(f"{known.source}: {count} not fit the ledger, which is unchanged:", faults)


def named(facts: Sequence[Fact]) -> str:
    """How many facts, and the first of their ids."""
    ids = ", ".join(fact.id for fact in facts[:5])
    more = f" and {len(facts) - 5:,} more" if len(facts) > 5 else ""
    return f"{counted(len(facts), 'fact')} ({ids}{more})"
