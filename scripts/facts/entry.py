"""One true statement before it is put into words, and the hash that every choice is made by."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cache

SEED = "malmend-facts-1"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Entry:
    """``subject`` has ``relation`` ``answer``.

    ``shown`` is the subject as it stands inside a sentence, article included. ``extra`` is what
    else the sentence names (a language, a day). ``fame`` orders the subjects of a relation, the
    best known highest. ``others`` are further true or nearly true answers, which may not become
    the false ``alternative``. ``reversible``: the source has this answer for this subject only.
    """

    relation: str
    key: str
    subject: str
    answer: str
    shown: str = ""
    extra: str = ""
    fame: float = 0.0
    others: tuple[str, ...] = ()
    reversible: bool = False

    @property
    def inside(self) -> str:
        """The subject as it stands inside a sentence."""
        return self.shown or self.subject

    @property
    def split(self) -> str:
        """A subject is in one split, whatever the relation."""
        return SPLITS[int(rank("split", folded(self.subject))[:8], 16) % 4 == 0]


def in_order(text: str) -> tuple[str, ...]:
    """Codes from lines of them."""
    return tuple(text.split())


def codes(text: str) -> frozenset[str]:
    """Codes from lines of them, where the order says nothing."""
    return frozenset(in_order(text))


def rank(*parts: str) -> str:
    """A fixed pseudo-random sort key."""
    return hashlib.sha256("\x1f".join((SEED, *parts)).encode()).hexdigest()


@cache
def folded(text: str) -> str:
    """Lower case, without accents: for telling whether two names are the same to a reader."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


def is_ascii_name(text: str) -> bool:
    """Words of plain letters, each with a capital, perhaps joined by '-' or blanks."""
    words = text.replace("-", " ").split(" ")
    return text.isascii() and all(word.isalpha() and word[0].isupper() for word in words)
