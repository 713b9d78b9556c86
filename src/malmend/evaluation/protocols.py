"""What success means: every metric, by name, of one kind of question.

**token ratio** (MALMEN): share of answer tokens that the model would output, teacher forced.
**exact** (MEND): whether all of them are right.
**generated**: whether the free-running greedy answer is the gold answer (see generate.py).
**retention**: share of answer tokens that must not move whose top prediction the edit left as it
was; **kl**: KL(unedited || edited) at those tokens, nats per token; **kept**: of the questions
that the unedited model has exactly right, the share that the edited one has too.

Token ratio, exact and generated are means over a fact's questions of the kind, then over facts.
Retention, kl and kept are of NS and LS, over all tokens or questions.  The end-of-answer token is
never counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from malmend.evaluation.replies import HELD, KINDS, SPOKEN, FactRow, Kind, Replies, Reply

PROTOCOLS = {
    "token_ratio": "share of answer tokens right, teacher forced (MALMEN)",
    "exact": "all answer tokens right, teacher forced (MEND)",
    "generated": "free-running greedy answer equals the gold answer after normalisation",
    "generated_chat": "generated, asked through the model's chat template",
    "retention": "share of answer tokens that must not move whose top prediction the edit left",
    "kl": "KL(unedited || edited) at answer tokens that must not move, nats per token",
    "kept": "share of answers exactly right before the edit that are exactly right after it",
    "interval": "half width of a 95% interval of token_ratio; NS and LS by distinct question",
}


@dataclass(frozen=True)
class Scores:
    """Metrics of one kind of question; None where there was nothing to take the mean of.

    ``questions`` is how many were asked, a question beside several facts each time; ``kept_of`` how
    many of them the unedited model had exactly right, of which ``kept`` is a share.
    """

    token_ratio: float | None
    exact: float | None
    interval: float | None
    generated: float | None = None
    generated_chat: float | None = None
    retention: float | None = None
    kl: float | None = None
    kept: float | None = None
    kept_of: int | None = None
    questions: int = 0

    @property
    def kept_count(self) -> str:
        """``kept`` as a count, "13 of 33", so that a share of few questions is seen to be one."""
        if not self.kept_of:
            return "" if self.kept_of is None else "none was right before"
        return f"{round((self.kept or 0.0) * self.kept_of):,} of {self.kept_of:,}"


@dataclass(frozen=True)
class Group:
    """The scores of some of the facts; ``unedited`` and ``edited`` as in a report."""

    facts: int
    unedited: Mapping[str, Scores] = field(default_factory=dict)
    edited: Mapping[str, Scores] = field(default_factory=dict)


def scores(replies: Replies, unedited: Replies | None = None) -> dict[str, Scores]:
    """All metrics of one model's replies, by kind.

    Args:
        replies: of the model.
        unedited: the unedited model's replies to the same questions, where ``replies`` are an
            edited model's.
    """
    asked = Counter(row.kind for row in replies.rows)
    out: dict[str, Scores] = {}
    for kind in KINDS:
        spoken = kind in SPOKEN
        found = Scores(
            token_ratio=replies.mean(kind, "token_ratio"),
            exact=replies.mean(kind, "exact"),
            interval=_interval(replies, kind),
            generated=replies.mean(kind, "generated") if spoken else None,
            generated_chat=replies.mean(kind, "generated_chat") if spoken else None,
            questions=asked[kind],
        )
        if unedited is not None and kind in HELD:
            found = _with_stayed(found, unedited, replies, kind)
        out[kind] = found
    return out


def _with_stayed(found: Scores, unedited: Replies, edited: Replies, kind: Kind) -> Scores:
    """And how well an edit left questions of a kind alone, over all tokens or questions of it.

        retention = sum of [top before = top after] / number of counted tokens
        kl        = sum of KL(unedited || edited) / number of counted tokens
        kept      = sum of before * after / sum of before;  kept_of = sum of before

    with before and after 1 for a question that is exactly right, else 0.
    """
    same: list[bool] = []
    moved: list[float] = []
    kept: list[bool] = []
    judged = False  # whether any question has an answer to be right by
    for before, after in zip(unedited.rows, edited.rows, strict=True):
        if after.kind == kind:
            pairs = zip(before.predicted, after.predicted, strict=True)
            same += [one == other for one, other in pairs]
            moved += after.kl
            judged = judged or before.exact is not None
            if before.exact == 1.0:
                kept.append(after.exact == 1.0)
    return replace(
        found,
        retention=sum(same) / len(same) if same else None,
        # Rounding can leave the KL of two equal distributions a hair below zero.
        kl=max(math.fsum(moved) / len(moved), 0.0) if moved else None,
        kept=sum(kept) / len(kept) if kept else None,
        kept_of=len(kept) if judged else None,
    )


def groups_of(rows: Sequence[FactRow]) -> dict[str, dict[str, Group]]:
    """Scores by relation (facts with one), and by the answer's length in tokens.

    The names of groups are in order: relations by name, lengths by size.
    """
    by_relation: dict[str, list[FactRow]] = {}
    by_length: dict[int, list[FactRow]] = {}
    for row in rows:
        if row.relation is not None:
            by_relation.setdefault(row.relation, []).append(row)
        by_length.setdefault(row.answer_tokens, []).append(row)
    return {
        "relation": {name: _group(by_relation[name]) for name in sorted(by_relation)},
        "answer_tokens": {str(size): _group(by_length[size]) for size in sorted(by_length)},
    }


def _group(rows: Sequence[FactRow]) -> Group:
    before = _joined(row.unedited for row in rows)
    after = _joined(row.edited for row in rows)
    return Group(len(rows), scores(before), scores(after, before) if after.rows else {})


def _joined(rows: Iterable[Sequence[Reply]]) -> Replies:
    return Replies([one for row in rows for one in row])


def between(share: float | None, interval: float | None) -> tuple[float, float] | None:
    """A share's 95% interval, which lies inside 0 to 1 where share and interval added need not.

    Wilson's, of as many questions as would have the share's standard error by themselves.  None
    where no interval is known, or where all are alike.
    """
    if share is None or not interval or not 0 < share < 1:
        return None
    over = interval**2 / (share * (1 - share))  # 1.96² over n, by the interval of n
    middle = (share + over / 2) / (1 + over)
    half = math.sqrt(over * share * (1 - share) + over**2 / 4) / (1 + over)
    return middle - half, middle + half


def _interval(replies: Replies, kind: Kind) -> float | None:
    """1.96 standard errors of the mean token ratio, which is over facts.

    Clusters are facts, and distinct questions for NS and LS, where the same question may stand
    beside many facts and would otherwise be counted as many.
    """
    rows = [row for row in replies.rows if row.kind == kind and row.token_ratio is not None]
    per_fact = Counter(row.fact for row in rows)
    mean = replies.mean(kind, "token_ratio") or 0.0
    sums: dict[object, float] = {}
    for row in rows:
        cluster = row.question if kind in HELD else row.fact
        weight = 1 / (per_fact[row.fact] * len(per_fact))
        sums[cluster] = sums.get(cluster, 0.0) + weight * ((row.token_ratio or 0.0) - mean)
    if len(sums) < 2:
        return None
    spread = math.fsum(value**2 for value in sums.values())
    return 1.96 * math.sqrt(spread * len(sums) / (len(sums) - 1))
