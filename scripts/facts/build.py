"""Draws facts and neighbours from the entries and puts them into words."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from facts import wording_places, wording_words
from facts.airports import airport_entries
from facts.cities import city_entries, county_entries, state_entries
from facts.countries import country_entries, country_name_entries
from facts.elements import element_entries
from facts.entry import SPLITS, Entry, folded, rank
from facts.languages import (
    calendar_entries,
    currency_entries,
    language_entries,
    script_entries,
)

CLOZE = wording_places.CLOZE | wording_words.CLOZE
QUESTIONS = wording_places.QUESTIONS | wording_words.QUESTIONS
REVERSED = wording_places.REVERSED | wording_words.REVERSED
REVERSED_TO_EXTRA = wording_words.REVERSED_TO_EXTRA

# At most so many facts of a relation in train and in test; the rest have what the sources give.
MOST = {
    "country_of_city": (650, 190),
    "state_of_city": (300, 90),
    "state_of_county": (300, 90),
    "county_code": (160, 50),
    "time_zone_of_city": (330, 90),
    "airport_city": (330, 100),
    "airport_code": (330, 100),
    "airport_country": (330, 100),
    "country_name": (560, 180),
    "month_name": (300, 110),
}
NO_LIMIT = (10_000, 10_000)
# Subjects kept out of every fact of a relation, in train and in test, so that questions about
# them are safe: an eighth of the subjects and a fifth, and at least so many. Where there are few
# subjects, or each has many facts, the number is given.
NEIGHBOUR_PART = (8, 5)
FEWEST_NEIGHBOURS = (14, 9)
FEW_SUBJECTS = {"weekday_name": (8, 5), "month_name": (9, 5), "state_abbreviation": (8, 4)}
NEIGHBOURS = 2
# Codes and numbers: one may be part of another, or stand in a word of the prompt.
CODES = frozenset(relation for relation in CLOZE if "code" in relation) | {
    "internet_domain",
    "state_abbreviation",
    "element_symbol",
    "atomic_number",
    "element_group",
    "element_period",
    "element_block",
}


def all_entries() -> list[Entry]:
    """Every statement of the sources, whether it will be a fact, a neighbour or nothing."""
    return (
        country_entries()
        + country_name_entries()
        + city_entries()
        + county_entries()
        + state_entries()
        + airport_entries()
        + element_entries()
        + language_entries()
        + calendar_entries()
        + script_entries()
        + currency_entries()
    )


def held_out(relation: str, split: int, entries: list[Entry]) -> tuple[set[str], set[str]]:
    """The subjects kept for neighbours: well-known ones, and any others.

    Of the best known only every second is kept, so that facts are about well-known subjects too.
    """
    fame = {entry.subject: entry.fame for entry in entries}
    few = FEW_SUBJECTS.get(relation, FEWEST_NEIGHBOURS)[split]
    wanted = few if relation in FEW_SUBJECTS else max(few, len(fame) // NEIGHBOUR_PART[split])
    known = sorted(fame, key=lambda subject: (-fame[subject], subject))[: 2 * (wanted // 2)]
    mixed = sorted(known, key=lambda subject: rank("known", relation, subject))
    famous = set(mixed[: wanted // 2])
    rest = sorted(set(fame) - famous, key=lambda subject: rank("held", relation, subject))
    return famous, set(rest[: wanted - len(famous)])


def alternative(
    fact: Entry, facts: Iterable[Entry], stated: dict[tuple[str, str], set[str]]
) -> str:
    """Another subject's answer that is false for this one, each answer as likely as another."""
    true = stated[fact.subject, fact.extra] | {folded(other) for other in fact.others}

    def false(answer: str) -> bool:
        other = folded(answer)
        if fact.relation in CODES:
            return other not in true
        return not any(other in known or known in other for known in true)

    answers = {f.answer for f in facts if f.extra == fact.extra and false(f.answer)}
    return min(answers, key=lambda answer: rank("alternative", identity(fact), answer))


def identity(entry: Entry) -> str:
    """The id of the fact."""
    return f"{entry.relation}-{entry.key}"


def neighbours(fact: Entry, false: str, famous: list[Entry], others: list[Entry]) -> list[Entry]:
    """A well-known subject and another one, whose answers are neither the fact's nor the false.

    Fewer where the sources have no two: "April" has a word of its own in few languages.
    """
    taken: list[Entry] = []
    for pool in (famous, others, famous + others):
        turned = sorted(pool, key=lambda entry: rank("near", identity(fact), identity(entry)))
        usable = [
            entry
            for entry in turned
            if entry.extra == fact.extra
            and entry.answer not in (fact.answer, false)
            and entry not in taken
        ]
        if usable and len(taken) < NEIGHBOURS:
            taken.append(usable[0])
    return taken


def gives_away(fact: Entry) -> bool:
    """Whether a prompt would hold the answer ("Malay" in "Malaysia"); codes are no names."""
    texts = (*CLOZE[fact.relation], *QUESTIONS[fact.relation])
    prompts = [text.format(s=fact.inside, x=fact.extra) for text in texts]
    return fact.relation not in CODES and any(fact.answer in prompt for prompt in prompts)


def templates(fact: Entry) -> tuple[str, list[str]]:
    """Edit prompt and three paraphrases. Two facts in three have a cloze prompt, one a question.

    A matter of the fact alone, so that leaving one out changes no other.
    """
    clozes, questions = CLOZE[fact.relation], QUESTIONS[fact.relation]
    turn, kind = divmod(int(rank("words", identity(fact))[:8], 16), 3)
    asked = [questions[(turn + step) % len(questions)] for step in range(len(questions))]
    filled = [clozes[(turn + step) % len(clozes)] for step in range(len(clozes))]
    if kind == 2:
        return asked[0], [filled[0], asked[1], filled[1]]
    return filled[0], [filled[1], asked[0], asked[1] if turn % 2 else filled[2]]


def reversed_prompt(entry: Entry) -> dict[str, str] | None:
    """The reversed prompt and its answer, for relations that have one."""
    template = REVERSED.get(entry.relation)
    if template is None or not entry.reversible:
        return None
    prompt = template.format(a=entry.answer, s=entry.subject, x=entry.extra)
    answer = entry.extra if entry.relation in REVERSED_TO_EXTRA else entry.inside
    return {"prompt": prompt, "answer": answer}


def record(fact: Entry, false: str, near: list[Entry], unique: bool) -> dict[str, Any]:
    """One line of the file."""
    first, rest = templates(fact)
    line: dict[str, Any] = {
        "id": identity(fact),
        "subject": fact.subject,
        "relation": fact.relation,
        "prompt": first.format(s=fact.inside, x=fact.extra),
        "answer": fact.answer,
        "alternative": false,
        "paraphrases": [template.format(s=fact.inside, x=fact.extra) for template in rest],
        "neighbours": [
            {"prompt": first.format(s=other.inside, x=other.extra), "answer": other.answer}
            for other in near
        ],
    }
    turned = reversed_prompt(fact)
    if turned is not None and unique:
        line["reversed"] = turned
    return line | {"tags": [fact.split]}


def relation_records(relation: str, split: int, entries: list[Entry]) -> list[dict[str, Any]]:
    """The facts of one relation in one split."""
    mine = [entry for entry in entries if entry.split == SPLITS[split]]
    famous, others = held_out(relation, split, mine)
    pools = [[e for e in mine if e.subject in subjects] for subjects in (famous, others)]
    free = [e for e in mine if e.subject not in famous | others]
    free.sort(key=lambda entry: rank("drawn", identity(entry)))
    stated: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in entries:
        stated[entry.subject, entry.extra].add(folded(entry.answer))
    asked = Counter(folded(turned["prompt"]) for e in entries if (turned := reversed_prompt(e)))
    lines: list[dict[str, Any]] = []
    for fact in free:
        false = alternative(fact, mine, stated)
        near = neighbours(fact, false, *pools)
        full = len(lines) == MOST.get(relation, NO_LIMIT)[split]
        if full or len(near) < NEIGHBOURS or gives_away(fact):
            continue
        turned = reversed_prompt(fact)
        unique = turned is not None and asked[folded(turned["prompt"])] == 1
        lines.append(record(fact, false, near, unique))
    return lines


def records() -> list[dict[str, Any]]:
    """Every fact, train first, the relations of a split mixed."""
    entries = all_entries()
    made: list[dict[str, Any]] = []
    for split in range(len(SPLITS)):
        lines = []
        for relation in CLOZE:
            lines += relation_records(
                relation, split, [e for e in entries if e.relation == relation]
            )
        made += sorted(lines, key=lambda line: rank("line", line["id"]))
    return made


def file_text() -> str:
    """The text of facts.jsonl."""
    lines = (json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in records())
    return "".join(line + "\n" for line in lines)
