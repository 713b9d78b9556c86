"""A fact asked in other words: of its prompt alone, or as its batch asks others (borrowing.py).

An edit that holds for its prompt, and for the prompt in frames, still leans on the words between:
asked otherwise, it may not be there.  With some of them left out, others each time, what is left to
answer by is what a rewording has too, above all the subject.

And an edit of a sentence to complete is not there in a question, whose answer follows a question
mark, nor one of a question in a sentence.  So one wording turns the one into the other.  It knows
a few English words and no grammar: what it makes is often clumsy ("What is Lyon located in?"), and
of a prompt in another language mostly a sentence with "what?" at its end.  Where facts have a
relation, the others of it lend better ones.  None is read that the batch asks with another answer,
as its own prompt or as a wording of another fact.  Not in the papers.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from malmend.editors.borrowing import OPENERS, Borrowing, measured, plain
from malmend.facts.fact import Fact, Question

Words = tuple[str, ...]
LEFT_OUT = 0.3  # share of a prompt's other words
MARKS = ".,;:!?'\"()"
TURNED = 1  # which of a fact's wordings is the turned one; later ones are borrowed, or turned too
BE, CALLED = "is|was|are|were", " called| named| known as"
SETTINGS = re.compile(r"((?:In|On|At|By|To|For|Of|From) [^,]+), (.+)")  # "In French, "
ENDS_IN_BE = re.compile(rf"(.+?),? ({BE})((?:{CALLED})?)(?: the| an?)?")
HOLDS_BE = re.compile(rf"([^,]+) ({BE})( [^,]+)")
SEVERAL = re.compile(r"\n|[.?!:;…]['\")]*(?:\s|\Z)")  # sentences, or a label before one
ASKS = re.compile(r"(?:Who|Whom|Whose|What|Which|Where|When|Why|How)\b|.*\?$", re.I)
ASKS_WHAT = re.compile(rf"(?:What|Who|Where|When) ({BE}) (.+?)((?:{CALLED})?)\??", re.I)
TELLS = re.compile(  # without it another thing is asked
    r"not?|never|none|nor|neither|nobody|nothing|without|cannot|.+n['’]t|unless|except|only|but|"
    r"first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|next|previous|former|"
    r"formerly|current|currently|other|another|opposite|before|after|until|since|under|over|above|"
    r"below|more|less|most|least|fewer|fewest|best|worst|\w{3,}est",
    re.I,
)
WITHOUT_NAME = re.compile("(?:The|An?|In|On|At|By|To|For|Of|From|Its?|This|That) ", re.I)


def in_other_words(facts: Sequence[Fact], count: int) -> list[list[Question]]:
    """Of each fact its question in other wordings, none twice and none the prompt itself.

    Args:
        facts: all that are edited at once.
        count: of wordings, at most.
    """
    batch, made = Borrowing(facts), list[tuple[Fact, dict[str, Words], set[Words]]]()
    in_whole, in_all = defaultdict[Words, set[str]](set), defaultdict[Words, set[str]](set)
    for fact in facts:
        lent = batch.prompts(fact, count - TURNED - 1)
        prompts = dict.fromkeys(wording(fact, which, lent) for which in range(count))
        asked = {one: plain(one) for one in prompts}
        whole = {plain(one) for one in (fact.prompt, turned(fact.prompt), *lent) if one}
        made.append((fact, asked, whole))
        for words in whole:
            in_whole[words].add(fact.answer)
        for words in (plain(fact.prompt), *asked.values()):
            in_all[words].add(fact.answer)
    return [
        [
            Question(one, fact.answer)
            for one, words in asked.items()
            # What has lost a word gives way to what is asked so in whole.
            if one != fact.prompt and len((in_whole if words in whole else in_all)[words]) == 1
        ]
        for fact, asked, whole in made
    ]


def wording(fact: Fact, which: int, lent: Sequence[str] = ()) -> str:
    """The prompt in other words, others for each ``which``; the same for the same.

    The first is in fewer words, that of :data:`TURNED` is turned, where that can be, and then come
    those that are ``lent``, one after another.  Behind them it is turned and then in fewer words.
    None has the words of one of the fact's paraphrases in their order: by these an edit is
    measured, so it never reads them.
    """
    if 0 <= which - TURNED - 1 < len(lent):
        return lent[which - TURNED - 1]
    found = turned(fact.prompt) if which >= TURNED else None
    subject = fact.subject or ""
    loses_subject = subject in fact.prompt and subject not in (found or "")
    if found is None or loses_subject or measured(fact, found):
        found = fewer_words(fact, which)
    elif which > TURNED:
        found = fewer_words(replace(fact, prompt=found), which)
    return fact.prompt if measured(fact, found) else found


def turned(prompt: str) -> str | None:
    """A sentence to complete as a question, or a question as such a sentence.

    None for a question that does not begin with "What is", "Who was" or the like, and for a prompt
    of several sentences or with a mark at its end.
    """
    said = prompt.strip(" ,")
    if SEVERAL.search(said.removesuffix("?")):
        return None
    if ASKS.match(said):
        asks = ASKS_WHAT.fullmatch(said)
        return asks and f"{_large(asks[2])} {asks[1]}{asks[3]}"
    setting, where = SETTINGS.fullmatch(said), ""
    if setting:
        where, said = f", {_small(setting[1])}", setting[2]
    found = ENDS_IN_BE.fullmatch(said) or HOLDS_BE.fullmatch(said)
    if found:
        return f"What {found[2]} {_small(found[1])}{found[3]}{where}?"
    return f"{said} what{where}?"


def _small(text: str) -> str:
    """The first letter small, unless a name may begin with it."""
    return text[0].lower() + text[1:] if WITHOUT_NAME.match(text) else text


def _large(text: str) -> str:
    return text[0].upper() + text[1:] if WITHOUT_NAME.match(text) else text


def fewer_words(fact: Fact, which: int) -> str:
    """The prompt with some words left out, others for each ``which``; the same for the same.

    Words of the subject stay, and others with a capital letter or a digit: without "German" or
    "Monday" it would be another question, as it would without "not", "former" or "largest".
    Where the subject is given, a first word may go that opens many a sentence.
    """
    prompt, subject = fact.prompt, fact.subject or ""
    about = {one.strip(MARKS) for one in subject.split()}
    spans = [one.span() for one in re.finditer(re.escape(subject), prompt)] if subject else []
    draw = random.Random(f"{which} {prompt}")

    def stays(word: re.Match[str]) -> bool:
        bare = word[0].strip(MARKS)
        opens = bool(subject) and not prompt[: word.start()].strip() and bare.lower() in OPENERS
        is_about = bare in about or any(a < word.end() and word.start() < b for a, b in spans)
        named = any(one.isupper() or one.isdigit() for one in word[0]) and not opens
        tells = TELLS.fullmatch(bare) is not None
        return draw.random() >= LEFT_OUT or named or is_about or tells

    return " ".join(one[0] for one in re.finditer(r"\S+", prompt) if stays(one)) or prompt
