"""A small report that a page is made of: six facts with known faults, the last of them hostile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from malmend.evaluation.protocols import groups_of, scores
from malmend.evaluation.replies import FactRow, Kind, Replies, Reply
from malmend.evaluation.report import Report
from malmend.facts.fact import Question

HOSTILE = (
    "<script>window.hacked = 1</script></SCRIPT><!--<script>"
    "<img src=x onerror='window.hacked = 1'>\" ' & &lt; {{ 7 * 7 }} {% raw %} "
    "\\u003c \u2028 \x00 🦊 שלום \u202e abc " + "w" * 300
)
# Which facts each filter keeps, by id.
KEPT = {
    "all": ["good", "edit", "paraphrase", "spoken", "moved", HOSTILE],
    "failure": ["edit", "paraphrase", "spoken"],
    "edit": ["edit"],
    "paraphrase": ["paraphrase"],
    "generated": ["spoken"],
    "chat": ["spoken"],
    "regression": ["moved"],
    "moved": ["moved", HOSTILE],
}


def pair(
    kind: Kind, fact: int, before: float | None, after: float | None, prompt: str, **more: Any
) -> tuple[Reply, Reply]:
    """One question of two answer tokens, unedited and edited; ``more`` is of both replies."""
    kl, moved = more.pop("kl", ()), more.pop("moved", None)
    gold = more.pop("gold", "Lima")
    said = {"generated_before": "generated", "generated_after": "generated"}
    spoken = {side: more.pop(side) for side in said if side in more}
    ids = {1.0: (5, 6), 0.5: (5, 0), 0.0: (0, 0), None: (7,)}

    def reply(value: float | None, **its: Any) -> Reply:
        exact = None if value is None else float(value == 1)
        return Reply(kind, fact, Question(prompt, gold), value, exact, predicted=ids[value], **its)

    one = reply(before, **more, generated=spoken.get("generated_before"))
    return one, reply(after, **more, generated=spoken.get("generated_after"), kl=kl, moved=moved)


def facts() -> list[tuple[str, list[tuple[Reply, Reply]]]]:
    """Ids, and the replies to what is asked beside each fact."""
    return [
        (
            "good",
            [
                pair("ES", 0, 0.0, 1.0, "In Mars is", generated_before=0.0, generated_after=1.0),
                pair("GS", 0, 0.5, 1.0, "Mars?"),
                pair("NS", 0, 1.0, 1.0, "In Moon is", kl=(1e-9, 3e-9), moved=False, top="Lima"),
                pair("LS", 0, None, None, "Who?", gold=None, kl=(0.02,), moved=False, top="I"),
            ],
        ),
        ("edit", [pair("ES", 1, 0.0, 0.5, "In Ora is")]),
        (
            "paraphrase",
            [pair("ES", 2, 0.0, 1.0, "In Una is"), pair("GS", 2, 0.0, 0.0, "Una?")],
        ),
        (
            "spoken",
            [
                pair(
                    "ES", 3, 0.0, 1.0, "In Ina is", generated_before=0.0, generated_after=0.0,
                    text="the", cut=True, text_chat="I am", generated_chat=0.0, cut_chat=True,
                ),
                pair("RS", 3, 0.0, 0.0, "Lima lies in"),
            ],
        ),
        (
            "moved",
            [
                pair("ES", 4, 0.0, 1.0, "In Tal is"),
                pair("NS", 4, 1.0, 0.0, "In Wal is", kl=(2.0, 4.0), moved=True, top="Peru"),
                pair("LS", 4, None, None, "Who?", gold=None, kl=(0.02,), moved=False, top="I"),
            ],
        ),
        (
            HOSTILE,
            [
                pair(
                    "ES", 5, 0.0, 1.0, HOSTILE, gold=HOSTILE, text=HOSTILE, text_chat=HOSTILE,
                    generated_before=0.0, generated_after=1.0,
                ),
                pair("GS", 5, 0.0, 1.0, HOSTILE, gold=HOSTILE),
                pair("LS", 5, 0.0, 0.5, HOSTILE, gold=HOSTILE, kl=(0.5,), moved=True, top=HOSTILE),
            ],
        ),
    ]  # fmt: skip


def row(name: str, asked: Sequence[tuple[Reply, Reply]], edited: bool = True) -> FactRow:
    hostile = name == HOSTILE
    return FactRow(
        id=name,
        prompt=asked[0][0].question.prompt,
        answer=asked[0][0].question.answer or "",
        unedited=tuple(before for before, _ in asked),
        edited=tuple(after for _, after in asked) if edited else (),
        relation=HOSTILE if hostile else "capital" if asked[0][0].fact < 3 else None,
        subject=HOSTILE if hostile else None,
        answer_tokens=2,
    )


def report(edited: bool = True, kinds: Sequence[Kind] = ("ES", "GS", "NS", "LS", "RS")) -> Report:
    """Of all six facts; with fewer kinds, only those questions were asked."""
    chosen = [(name, [one for one in asked if one[0].kind in kinds]) for name, asked in facts()]
    rows = [row(name, asked, edited) for name, asked in chosen]
    before = Replies([one for _, asked in chosen for one, _ in asked])
    after = Replies([one for _, asked in chosen for _, one in asked])
    patch = {"malmend": "0.1.0", "method": "malmen", "editor": HOSTILE, HOSTILE: [HOSTILE]}
    return Report(
        facts=len(rows),
        about={
            "model": HOSTILE,
            "facts_source": HOSTILE,
            "skipped": 2,
            "chat": False,
            "decoded_facts": 4,
            "text": HOSTILE,
            "patch": patch if edited else None,
        },
        unedited=scores(before),
        edited=scores(after, before) if edited else {},
        perplexity={"unedited": 9.5, "edited": 10.25} if edited else {"unedited": 9.5},
        rows=rows,
        groups=groups_of(rows),
        leaks=[HOSTILE] if edited else (),
    )


def many(count: int) -> Report:
    """Of so many facts, of which every tenth fails."""
    rows = []
    for index in range(count):
        value = 0.0 if index % 10 == 0 else 1.0
        asked = [pair("ES", index, 0.0, value, f"In {index} is", text="the answer that it gives")]
        asked += [pair("GS", index, 0.0, 1.0, f"{index}{mark}") for mark in "?!"]
        asked += [pair("NS", index, 1.0, 1.0, f"In {-index} is", kl=(0.1,), moved=False, top="I")]
        rows.append(replace(row(f"f{index}", asked), relation=f"r{index % 7}"))
    before = Replies([one for fact in rows for one in fact.unedited])
    after = Replies([one for fact in rows for one in fact.edited])
    about = {"model": "tiny", "patch": {"method": "mend"}}
    return Report(count, about, scores(before), scores(after, before), {}, rows, groups_of(rows))
