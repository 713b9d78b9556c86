"""What can be said of facts before any model is loaded: repeats, ids, leaks, unseen characters."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from malmend.errors import counted
from malmend.facts.entry import EXPECTED, Faults, FileEntry, short
from malmend.facts.fact import Fact, Question, Skipped, in_one_form, same_answer

# Soft hyphen, grapheme joiner, zero width space, marks of direction, fillers, separators of lines
# and vowels, word joiner with what follows it, byte order mark, annotations and tags; not U+200C
# and U+200D, which Persian, Hindi and emoji are written with.
UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def prompt_key(prompt: str) -> str:
    """What two prompts that are one have alike; case is kept: "us" and "US" are two to a model."""
    return in_one_form(prompt)


def default_id(prompt: str) -> str:
    """The id of a fact that was given none."""
    # From the prompt, so that it survives other lines coming and going; 48 bits, so that thousands
    # of facts do not collide; a letter in front, so that no parser takes it for a number.
    # Accents stay as they are: ledgers have kept ids.
    digest = hashlib.sha256(" ".join(prompt.split()).encode()).hexdigest()
    return f"f{digest[:12]}"


def skip_repeats(facts: Iterable[Fact]) -> tuple[tuple[Fact, ...], tuple[Skipped, ...]]:
    """The facts whose prompt is new, and the later ones that repeat or contradict an earlier one.

    A batch edit cannot hold two answers to one prompt, and a fact held twice would count double.
    """
    first: dict[str, Fact] = {}
    skipped = []
    for fact in facts:
        prompt = prompt_key(fact.prompt)
        if prompt in first:  # the same object given twice is a repeat too
            skipped.append(Skipped(fact, first[prompt]))
        else:
            first[prompt] = fact
    return tuple(first.values()), tuple(skipped)


def skipped_said(skipped: Sequence[Skipped], strict: bool = True) -> Iterator[str]:
    """Which facts were left out, and why, as lines for a person: how many, and the first ten.

    ``strict`` says whether the command has an option that refuses them.
    """
    if not skipped:
        return
    kinds = Counter(one.kind for one in skipped)
    words = [
        counted(number, what)
        for number, what in (
            (len(skipped), "fact"),
            (kinds["duplicate"], "duplicate"),
            (kinds["contradiction"], "contradiction"),
        )
    ]
    hint = " (--strict refuses them)" if strict else ""
    yield f"Skipped {words[0]}: {words[1]} and {words[2]} of earlier ones{hint}."
    yield from (f"  {one.fact.where}: {one.kind} of {one.earlier.where}" for one in skipped[:10])
    if len(skipped) > 10:
        yield f"  and {len(skipped) - 10:,} more"


def leaks(facts: Sequence[Fact], others: Sequence[Question] = ()) -> list[str]:
    """One warning per unrelated or neighbouring question that some fact edits or paraphrases.

    Such a question is meant to stay put while the edit is meant to move it, so it spoils training
    and makes locality look worse than it is.  ``others`` are questions that stand beside all facts
    (``--locality``).  Likewise a reversed prompt, of which no edit should ask.  Case is ignored
    here: a warning costs nothing.  Then one per paraphrase that is no other wording of its fact
    alone (:func:`wordings`).
    """
    edited: dict[str, tuple[str, Fact]] = {}
    for fact in facts:
        edited.setdefault(prompt_key(fact.prompt).casefold(), ("edit prompt", fact))
    for fact in facts:
        for prompt in fact.paraphrases:
            edited.setdefault(prompt_key(prompt).casefold(), ("paraphrase", fact))
    asked: list[tuple[str, Fact | None, Question]]
    asked = [(f"fact {f.id!r}: unrelated", f, question) for f in facts for question in f.unrelated]
    asked += [(f"fact {f.id!r}: neighbour", f, one) for f in facts for one in f.neighbours]
    asked += [(f"fact {f.id!r}: reversed", f, f.reversed) for f in facts if f.reversed]
    asked += [("locality", None, question) for question in others]
    warnings = []
    for where, asker, question in asked:
        found = edited.get(prompt_key(question.prompt).casefold())
        if found:
            role, other = found
            owner = "the same fact" if other is asker else f"fact {other.id!r}"
            so = "so it is meant to move; use another question"
            if asker is not None and question is asker.reversed:
                so = "so its answer is asked for, and does not follow; leave it out"
            warnings.append(f"{where} question {question.prompt!r} is the {role} of {owner}, {so}")
    return warnings + [f"fact {fact.id!r}: {what}" for fact, what in wordings(facts)]


def wordings(facts: Sequence[Fact]) -> Iterator[tuple[Fact, str]]:
    """Every paraphrase that an edit asks for itself, or that has another answer elsewhere.

    What it scores is not whether the fact is known in other words.  Prompts are the same where
    those of two facts would be.
    """
    edited = {prompt_key(fact.prompt): fact for fact in facts}
    first: dict[str, Fact] = {}
    for fact in facts:
        seen: set[str] = set()
        for text in fact.paraphrases:
            prompt = prompt_key(text)
            other = edited.get(prompt) or first.setdefault(prompt, fact)
            answers = f"whose answer is {short(other.answer)}, not {short(fact.answer)}"
            agrees = same_answer(other.answer, fact.answer)
            what = None
            if prompt in seen:
                what = "is there twice"
            elif prompt in edited:
                owner = "its own fact" if other is fact else f"fact {other.id!r}"
                what = f"is the edit prompt of {owner}" + ("" if agrees else f", {answers}")
            elif not agrees:
                what = f"is also one of fact {other.id!r}, {answers}"
            seen.add(prompt)
            if what:
                yield fact, f"paraphrase {short(text)} {what}; use another, or leave it out"


def unseen(facts: Iterable[Fact]) -> list[str]:
    """One warning per field with a character that nobody sees and that changes its tokens."""
    return [
        f"{fact.where}: field {name!r}: U+{ord(found[0]):04X}, "
        + unicodedata.name(found[0], "unnamed").lower()
        for fact in facts
        for name, text in _texts(fact)
        if (found := UNSEEN.search(text))
    ]


def unseen_said(warnings: Sequence[str]) -> Iterator[str]:
    """Warnings of :func:`unseen` as lines for a person: how many, and the first three."""
    if len(warnings) == 1:
        yield "1 field holds a character that nobody sees and that changes its tokens:"
    elif warnings:
        yield f"{len(warnings):,} fields hold characters that nobody sees and that change tokens:"
    yield from (f"  {one}" for one in warnings[:3])
    if len(warnings) > 3:
        yield f"  and {len(warnings) - 3:,} more"


def _texts(fact: Fact) -> Iterator[tuple[str, str]]:
    """Every text of a fact that a model reads, with the name of its field."""
    yield from (("prompt", fact.prompt), ("answer", fact.answer))
    yield from (("subject", fact.subject or ""), ("alternative", fact.alternative or ""))
    yield from ((f"paraphrases[{at}]", text) for at, text in enumerate(fact.paraphrases, 1))
    asked = [(f"unrelated[{at}]", one) for at, one in enumerate(fact.unrelated, 1)]
    asked += [(f"neighbours[{at}]", one) for at, one in enumerate(fact.neighbours, 1)]
    asked += [("reversed", fact.reversed)] if fact.reversed else []
    for name, question in asked:
        yield from ((name, question.prompt), (f"{name}.answer", question.answer or ""))


def taken_ids(facts: Iterable[Fact]) -> Iterator[tuple[Fact, Fact]]:
    """Every fact whose id an earlier fact has, with that one."""
    first: dict[str, Fact] = {}
    for fact in facts:
        other = first.setdefault(fact.id, fact)
        # a repeated prompt without ids has one default id twice: it is skipped, not refused
        repeats = prompt_key(fact.prompt) == prompt_key(other.prompt)
        if other is not fact and not (repeats and fact.id == default_id(fact.prompt)):
            yield fact, other


def repeated_ids(facts: Iterable[Fact], entries: dict[int, FileEntry]) -> Faults:
    """A fault per fact of :func:`taken_ids`; ``entries`` are found by ``Fact.line``."""
    faults: Faults = []
    for fact, other in taken_ids(facts):
        here, there = entries[fact.line], entries[other.line]
        what = f"field 'id': {short(fact.id)} is taken by {there.where}; {EXPECTED['id']}"
        faults.append((here.line, f"{here.where}: {what}"))
    return faults


def repeated_prompts(skipped: tuple[Skipped, ...], entries: dict[int, FileEntry]) -> Faults:
    """A fault per skipped fact, with both places; ``entries`` are found by ``Fact.line``."""
    faults: Faults = []
    for skip in skipped:
        here, there = entries[skip.fact.line], entries[skip.earlier.line]
        faults.append((here.line, repeat(skip, here.where, there.where)))
    return faults


def repeat(skip: Skipped, here: str, there: str) -> str:
    """The fault of a skipped fact, given the places of both."""
    what = f"{here}: {skip.kind} of {there}"
    what += f": prompt {short(skip.fact.prompt)}"
    if skip.kind == "contradiction":
        answers = f"{short(skip.fact.answer)} here and {short(skip.earlier.answer)} there"
        what += f" has answer {answers}"
    return f"{what}; keep one of the two"
