"""Facts about the chemical elements: names and numbers from periodictable, the rest is counting."""

from __future__ import annotations

import periodictable

from facts.entry import Entry

NOBLE_GASES = (2, 10, 18, 36, 54, 86, 118)
# In group 3 or in none, in the d-block or the f-block: textbooks differ.
DISPUTED = frozenset({57, 71, 89, 103})


def period(number: int) -> int:
    """The row of the periodic table."""
    return 1 + sum(gas < number for gas in NOBLE_GASES)


def group(number: int) -> int | None:
    """The column of the periodic table, counted from 1 to 18; none in the f-block."""
    if number == 2:
        return 18
    before = (0, *NOBLE_GASES)[period(number) - 1]
    place, length = number - before, NOBLE_GASES[period(number) - 1] - before
    if place <= 2:
        return place
    column = place + 18 - length
    return column if column > 3 or length == 18 else None


def block(number: int) -> str:
    """The block of the periodic table: the kind of orbital that is being filled."""
    column = group(number)
    if column is None:
        return "f"
    if number == 2 or column <= 2:
        return "s"
    return "d" if column <= 12 else "p"


def element_entries() -> list[Entry]:
    """Symbol, atomic number, group, period and block of the 118 elements."""
    entries = []
    for element in periodictable.elements:
        number = element.number
        if number == 0:  # the neutron
            continue
        answers = {
            "element_symbol": element.symbol,
            "atomic_number": str(number),
            "element_period": str(period(number)),
        }
        if number not in DISPUTED:
            answers["element_block"] = block(number)
            if group(number) is not None:
                answers["element_group"] = str(group(number))
        for relation, answer in answers.items():
            alone = relation in ("element_symbol", "atomic_number")
            entries.append(
                Entry(
                    relation,
                    element.symbol,
                    element.name,
                    answer,
                    fame=-float(number),
                    reversible=alone,
                )
            )
    return entries
