"""What the page shows of single facts and questions: plain values, no HTML.

Which facts failed, what moved, and the rows that the page's script reads are decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from malmend.evaluation.replies import HELD, FactRow, Kind, Reply
from malmend.evaluation.report import Report

# Each kind of question: its name and what it is.
QUESTIONS: dict[Kind, tuple[str, str]] = {
    "ES": ("Edit prompts", "each fact's own prompt, word for word"),
    "GS": ("Paraphrases", "the same facts in other words, which an edit never sees"),
    "NS": ("Neighbours", "the same question about other subjects, whose answers must not move"),
    "LS": ("Unrelated", "questions about something else, whose answers must not move"),
    "RS": ("Reversed", "the facts asked from the other side; reported only"),
}

# Each filter of the facts: its name and what it keeps.
FILTERS = {
    "all": ("All", ""),
    "failure": ("Failures", "Wrong under any protocol: the edit prompt or a paraphrase."),
    "edit": ("Edit prompt", "The edit prompt's answer is not right in every token."),
    "paraphrase": ("Paraphrase", "The answer to a paraphrase is not right in every token."),
    "generated": (
        "Free-running",
        "The free-running answer to the edit prompt or to a paraphrase is not the gold answer.",
    ),
    "chat": (
        "In chat",
        "The answer to the edit prompt or to a paraphrase in chat is not the gold answer.",
    ),
    "regression": ("Regressions", "The unedited model had an answer right, the edited one not."),
    "moved": ("Others moved", "A neighbour's or an unrelated answer is another one than before."),
}


@dataclass(frozen=True)
class Moved:
    """A neighbour or unrelated question whose top answer is another one after the edit."""

    kind: Kind
    prompt: str
    gold: str | None
    before: str | None
    after: str | None
    kl: float | None
    beside: str  # id of the first fact that it stands beside


def pairs(row: FactRow) -> Iterator[tuple[Reply, Reply | None]]:
    """Every question of a fact: the unedited model's reply and the edited one's."""
    after: Sequence[Reply | None] = row.edited or [None] * len(row.unedited)
    yield from zip(row.unedited, after, strict=True)


def flags(row: FactRow) -> list[str]:
    """The names of the filters, beside ``all``, that keep a fact."""
    found = set()
    for before, after in pairs(row):
        last = before if after is None else after
        if last.kind in ("ES", "GS"):
            if last.exact == 0:
                found |= {"failure", "edit" if last.kind == "ES" else "paraphrase"}
            if last.generated == 0:
                found |= {"failure", "generated"}
            if last.generated_chat == 0:
                found |= {"failure", "chat"}
        if last.moved:
            found.add("moved")
        if after is not None and _lost(before, after):
            found.add("regression")
    return [name for name in FILTERS if name in found]


def _lost(before: Reply, after: Reply) -> bool:
    """Whether an answer was right under some protocol and is not any more."""
    return any(
        getattr(before, protocol) == 1 and getattr(after, protocol) == 0
        for protocol in ("exact", "generated", "generated_chat")
    )


def any_cut(report: Report) -> bool:
    """Whether any free-running answer is shown only as far as it was decoded."""
    return any(
        one.cut or one.cut_chat for row in report.rows for one in (*row.unedited, *row.edited)
    )


def held(report: Report, kind: Kind) -> list[tuple[FactRow, Reply, Reply]]:
    """The distinct questions of a kind that should stay, each with the first fact it is beside."""
    found: dict[object, tuple[FactRow, Reply, Reply]] = {}
    for row in report.rows:
        for before, after in pairs(row):
            if before.kind == kind and after is not None:
                found.setdefault(before.question, (row, before, after))
    return list(found.values())


def moved(report: Report) -> list[Moved]:
    """What moved although it should have stayed, farthest first."""
    found = [
        Moved(
            kind=kind,
            prompt=before.question.prompt,
            gold=before.question.answer,
            before=before.top,
            after=after.top,
            kl=after.mean_kl,
            beside=row.id,
        )
        for kind in HELD
        for row, before, after in held(report, kind)
        if after.moved
    ]
    return sorted(found, key=lambda one: -(one.kl or 0.0))


def filters(report: Report) -> list[dict[str, Any]]:
    """The filters that could keep a fact, with how many each keeps."""
    kept = [flags(row) for row in report.rows]
    last = [one for row in report.rows for one in row.edited or row.unedited]
    could = {
        "paraphrase": any(one.kind == "GS" for one in last),
        "generated": any(one.generated is not None for one in last),
        "chat": any(one.generated_chat is not None for one in last),
        "regression": any(row.edited for row in report.rows),
        "moved": any(one.moved is not None for one in last),
    }
    return [
        {
            "key": key,
            "name": name,
            "meaning": meaning,
            "facts": len(kept) if key == "all" else sum(key in one for one in kept),
        }
        for key, (name, meaning) in FILTERS.items()
        if could.get(key, True)
    ]


def relations(report: Report) -> dict[str, int]:
    """The relations that facts have, by name, each with the place of the first fact that has it."""
    first: dict[str, int] = {}
    for place, row in enumerate(report.rows):
        if row.relation is not None:
            first.setdefault(row.relation, place)
    return dict(sorted(first.items()))


def entries(report: Report) -> list[dict[str, Any]]:
    """The facts as the page's script reads them; None is left out."""
    return [_entry(row) for row in report.rows]


def _entry(row: FactRow) -> dict[str, Any]:
    questions = [
        {
            "kind": before.kind,
            "prompt": before.question.prompt,
            "gold": before.question.answer,
            "before": _reply(before),
            "after": None if after is None else _reply(after),
            "moved": None if after is None else after.moved,
            "kl": None if after is None else after.mean_kl,
        }
        for before, after in pairs(row)
    ]
    return _without_none(
        {
            "id": row.id,
            "prompt": row.prompt,
            "answer": row.answer,
            "relation": row.relation,
            "subject": row.subject,
            "length": row.answer_tokens,
            "flags": flags(row),
            "asked": [_without_none(one) for one in questions],
        }
    )


def _reply(one: Reply) -> dict[str, Any]:
    share = None if one.token_ratio is None else round(one.token_ratio * len(one.predicted))
    return _without_none(
        {
            "text": one.text,
            "cut": one.cut or None,
            "said": _right(one.generated),
            "chat": one.text_chat,
            "chat_cut": one.cut_chat or None,
            "chat_said": _right(one.generated_chat),
            "top": one.top,
            "exact": _right(one.exact),
            "right": share,
            "tokens": None if share is None else len(one.predicted),
        }
    )


def _right(value: float | None) -> bool | None:
    return None if value is None else value == 1


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
