"""What an evaluation says: a typed report, and the JSON that ``--json`` writes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from malmend.evaluation.protocols import Asked, Examiner, Kind, Replies
from malmend.facts.fact import Fact
from malmend.files import written_beside

PROTOCOLS = {
    "token_ratio": "share of answer tokens right, teacher forced (MALMEN)",
    "exact": "all answer tokens right, teacher forced (MEND)",
    "generated": "free-running greedy answer equals the gold answer after normalisation",
    "retention": "share of unrelated answer tokens whose top prediction the edit left unchanged",
    "kl": "KL(unedited || edited) at unrelated answer tokens, nats per token",
    "interval": "half width of a 95% interval of token_ratio; LS clustered by distinct question",
}


@dataclass(frozen=True)
class Scores:
    """Metrics of one kind of question; None where nothing could be asked."""

    token_ratio: float | None
    exact: float | None
    interval: float | None
    generated: float | None = None
    retention: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class FactRow:
    """One fact, before and after."""

    id: str
    prompt: str
    answer: str
    unedited: tuple[Asked, ...]
    edited: tuple[Asked, ...]


@dataclass(frozen=True)
class Report:
    """The whole evaluation.

    ``unedited`` and ``edited`` map ES, GS and LS to their scores; ``edited`` is empty where no
    patch was given.  ``perplexity`` holds the two models' figures on a text, where one was given.
    """

    facts: int
    about: Mapping[str, Any]
    unedited: Mapping[str, Scores]
    edited: Mapping[str, Scores]
    perplexity: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[FactRow] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; None says that nothing of the kind was asked."""
        return {
            "facts": self.facts,
            "unedited": {kind: _shown(kind, s, False) for kind, s in self.unedited.items()},
            "edited": {kind: _shown(kind, s, True) for kind, s in self.edited.items()},
            **({"perplexity": dict(self.perplexity)} if self.perplexity else {}),
            "about": dict(self.about),
            "protocols": PROTOCOLS,
            "rows": [_row(row) for row in self.rows],
        }

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all."""
        with written_beside(path) as beside:
            beside.write_text(
                json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False),
                encoding="utf-8",
            )


def scores(examiner: Examiner, replies: Replies, edited: bool) -> dict[str, Scores]:
    """All metrics of one model's replies."""
    retention, kl = examiner.retention(replies) if edited else (None, None)
    out: dict[str, Scores] = {}
    kinds: tuple[Kind, ...] = ("ES", "GS", "LS")
    for kind in kinds:
        out[kind] = Scores(
            token_ratio=replies.mean(kind, "token_ratio"),
            exact=replies.mean(kind, "exact"),
            interval=_interval(replies, kind),
            generated=None if kind == "LS" else replies.mean(kind, "generated"),
            retention=retention if kind == "LS" else None,
            kl=kl if kind == "LS" else None,
        )
    return out


def rows_of(facts: Sequence[Fact], unedited: Replies, edited: Replies | None) -> list[FactRow]:
    """Replies by fact."""
    before: dict[int, list[Asked]] = {index: [] for index in range(len(facts))}
    after: dict[int, list[Asked]] = {index: [] for index in range(len(facts))}
    for row in unedited.rows:
        before[row.fact].append(row)
    for row in edited.rows if edited else ():
        after[row.fact].append(row)
    return [
        FactRow(fact.id, fact.prompt, fact.answer, tuple(before[i]), tuple(after[i]))
        for i, fact in enumerate(facts)
    ]


def _interval(replies: Replies, kind: Kind) -> float | None:
    """1.96 standard errors of the mean token ratio, which is over facts.

    Clusters are facts for ES and GS, and distinct questions for LS, where the same unrelated
    question may stand beside many facts and would otherwise be counted as many.
    """
    rows = [row for row in replies.rows if row.kind == kind and row.token_ratio is not None]
    per_fact = Counter(row.fact for row in rows)
    mean = replies.mean(kind, "token_ratio") or 0.0
    sums: dict[object, float] = {}
    for row in rows:
        cluster = row.question if kind == "LS" else row.fact
        weight = 1 / (per_fact[row.fact] * len(per_fact))
        sums[cluster] = sums.get(cluster, 0.0) + weight * ((row.token_ratio or 0.0) - mean)
    if len(sums) < 2:
        return None
    spread = math.fsum(value**2 for value in sums.values())
    return 1.96 * math.sqrt(spread * len(sums) / (len(sums) - 1))


def _shown(kind: str, scores: Scores, edited: bool) -> dict[str, float | None]:
    shown = asdict(scores)
    if kind == "LS":
        del shown["generated"]
    if kind != "LS" or not edited:
        del shown["retention"], shown["kl"]
    return shown


def _row(row: FactRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt": row.prompt,
        "answer": row.answer,
        "unedited": [_asked(one) for one in row.unedited],
        "edited": [_asked(one) for one in row.edited],
    }


def _asked(one: Asked) -> dict[str, Any]:
    shown = {
        "kind": one.kind,
        "prompt": one.question.prompt,
        "gold": one.question.answer,
        "token_ratio": one.token_ratio,
        "exact": one.exact,
        "generated": one.generated,
        "text": one.text,
        "kl": sum(one.kl) / len(one.kl) if one.kl else None,
    }
    return {name: value for name, value in shown.items() if value is not None}
