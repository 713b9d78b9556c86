"""When a free-running answer is the gold one.

Exact match is taken after the field's usual normalisation (case, punctuation, articles and blanks;
SQuAD's).  But by that 1.5 is 15 and C++ is C: what marks say of a number or a name stays, as does
an article that ends the text ("Vitamin A"), and characters are those of NFKC, which some tokenizers
write.
"""

from __future__ import annotations

import re
import string
import unicodedata

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ARTICLE_BEFORE = re.compile(r"\b(a|an|the)\b(?=\s+\S)")
_LAST_WORD = re.compile(r"\w*\Z")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MINUS = str.maketrans("\u2212", "-")
_SAYS_NOTHING = re.compile(
    r"(?<=\d),(?=\d{3}(?!\d))"  # of thousands
    r"|(?!(?<=\d)[.,/:-](?=\d)|(?<!\w)-(?=\d)|(?<=[\w+#])[+#])"  # 1.5, 10:30, -40, C++
    rf"[{re.escape(string.punctuation)}]"
)


def normalised(text: str) -> str:
    """NFKC, lower case, single blanks; no punctuation or article but as said above."""
    plain = unicodedata.normalize("NFKC", text).lower().translate(_MINUS)
    return " ".join(_ARTICLE_BEFORE.sub(" ", _SAYS_NOTHING.sub("", plain)).split())


def matches(answer: str, gold: str) -> bool:
    """Exact match after normalisation; a gold answer of punctuation alone is compared as it is."""
    if not normalised(gold):
        return answer.strip() == gold.strip()
    return normalised(answer) == normalised(gold)


def can_still_match(text: str, gold: str) -> bool:
    """Whether text that may go on could yet match ``gold``.

    Its letters must be those that gold begins with.  The last word may be unfinished, so it may
    also be the start of an article, which normalisation would take out; and the last character may
    lack bytes (it then reads U+FFFD), so it says nothing yet.
    """
    if not normalised(gold):
        return True
    wanted = " ".join(_ARTICLES.sub(" ", _letters(gold)).split())
    plain = _letters(text.rstrip("\ufffd"))
    last = _LAST_WORD.search(plain)[0]  # type: ignore[index]  # it matches the empty string too
    begun = _ARTICLES.sub(" ", plain.removesuffix(last))
    if not any(article.startswith(last) for article in ("a", "an", "the")):  # "" is among them
        begun += last
    return wanted.startswith(" ".join(begun.split()))


def _letters(text: str) -> str:
    """What of a text no later character changes: small letters without marks, and blanks.

    An accent may come after its letter, and Greek's small sigma is written otherwise at a word's
    end, which may yet move.
    """
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).lower())
    bare = "".join(one for one in parts if not unicodedata.combining(one))
    return bare.translate(_MINUS).translate(_PUNCTUATION).replace("ς", "σ")
