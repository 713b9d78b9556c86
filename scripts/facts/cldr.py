"""Unicode CLDR's data about one language or all countries, as Babel ships it."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

from babel.localedata import locale_identifiers, resolve_locale_filename


@cache
def own_data(language: str) -> dict[str, Any]:
    """What CLDR says of a language itself, nothing inherited.

    Read from Babel's file, not through ``babel.Locale``: Babel 2.18 resolves what a locale
    inherits inside data that locales share, so that the Somali word for Saturday becomes the
    Swahili one when Swahili was asked for before.
    """
    with open(resolve_locale_filename(language), "rb") as file:
        data: dict[str, Any] = pickle.load(file)
    return data


@cache
def languages_with_data() -> frozenset[str]:
    """The codes of the languages that have a file of their own."""
    return frozenset(name for name in locale_identifiers() if "_" not in name)


def calendar_words(language: str, kind: str) -> dict[int, str]:
    """Number to word, for ``days`` (0 is Monday) or ``months``, as they stand alone."""
    forms = own_data(language)[kind]
    alone = forms.get("stand-alone", {})
    # Without words of its own the stand-alone form is the one inside a date.
    words = alone.get("wide") if isinstance(alone, dict) else None
    return dict(words if isinstance(words, dict) else forms["format"]["wide"])
