"""What an evaluation says: a typed report, and the JSON that ``--json`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from malmend.errors import MalmendError, counted
from malmend.evaluation.protocols import PROTOCOLS, Group, Scores
from malmend.evaluation.replies import CHATTED, HELD, SPOKEN, FactRow, Reply
from malmend.files import written_beside


@dataclass(frozen=True)
class Report:
    """The whole evaluation.

    Attributes:
        facts: how many were asked about.
        about: what was asked of what, by name.
        unedited: ES, GS, NS, LS and RS to their scores; all five, whether asked or not.
        edited: the same of the edited model; empty where no patch was given.
        perplexity: the two models' figures on the text that ``about`` names; empty without one.
        rows: the facts with their replies, in order.
        groups: ``relation`` and ``answer_tokens`` to groups of facts by name.
        leaks: a warning for each neighbour or unrelated question that is also edited, and so meant
            to move, and for each paraphrase that is edited or has another answer elsewhere.
        unseen: a warning for each field with a character that nobody sees and that changes tokens.
    """

    facts: int
    about: Mapping[str, Any]
    unedited: Mapping[str, Scores]
    edited: Mapping[str, Scores]
    perplexity: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[FactRow] = ()
    groups: Mapping[str, Mapping[str, Group]] = field(default_factory=dict)
    leaks: Sequence[str] = ()
    unseen: Sequence[str] = ()

    def __repr__(self) -> str:
        figures = [
            f", {name}: {', '.join(_ratios(model))}"
            for name, model in (("unedited", self.unedited), ("edited", self.edited))
            if model
        ]
        return (
            f"Report({counted(self.facts, 'fact')}, {self.about.get('model')!r}{''.join(figures)})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; None says that nothing of the kind was asked."""
        return {
            "facts": self.facts,
            "unedited": {kind: _shown(kind, s, False) for kind, s in self.unedited.items()},
            "edited": {kind: _shown(kind, s, True) for kind, s in self.edited.items()},
            **({"perplexity": dict(self.perplexity)} if self.perplexity else {}),
            "about": dict(self.about),
            "leaks": list(self.leaks),
            "unseen": list(self.unseen),
            "protocols": PROTOCOLS,
            "groups": {
                by: {name: _group(group) for name, group in groups.items()}
                for by, groups in self.groups.items()
            },
            "rows": [_row(row) for row in self.rows],
        }

    def text(self, path: str | Path) -> str:
        """The JSON that is to be written there.

        Raises:
            MalmendError: a figure is not finite.
        """
        try:
            return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise MalmendError(
                f"The report holds NaN or infinity, so {path} was not written; check the patch and "
                "the model's weights."
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all.

        Raises:
            MalmendError: it cannot be written, or a figure is not finite.
        """
        text = self.text(path)
        with written_beside(path) as beside:
            # A path may be no UTF-8; what Python puts in place of its bytes is escaped, as in JSON.
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def _ratios(model: Mapping[str, Scores]) -> Iterator[str]:
    """Of each kind that was asked, with its name."""
    for kind, one in model.items():
        if one.token_ratio is not None:
            yield f"{kind} {one.token_ratio:.3f}"


def _shown(kind: str, scores: Scores, edited: bool) -> dict[str, float | None]:
    shown = asdict(scores)
    if kind not in SPOKEN:
        del shown["generated"]
    if kind not in CHATTED or scores.generated_chat is None:  # the model may have no template
        del shown["generated_chat"]
    if kind not in HELD or not edited:
        del shown["retention"], shown["kl"], shown["kept"], shown["kept_of"]
    return shown


def _group(group: Group) -> dict[str, Any]:
    """As the report, but without the kinds that nothing was asked of."""
    models = (("unedited", group.unedited, False), ("edited", group.edited, True))
    return {"facts": group.facts} | {
        name: {kind: _shown(kind, s, edited) for kind, s in model.items() if s.questions}
        for name, model, edited in models
    }


def _row(row: FactRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt": row.prompt,
        "answer": row.answer,
        "relation": row.relation,
        "subject": row.subject,
        "answer_tokens": row.answer_tokens,
        "unedited": [_asked(one) for one in row.unedited],
        "edited": [_asked(one) for one in row.edited],
    }


def _asked(one: Reply) -> dict[str, Any]:
    shown = {
        "kind": one.kind,
        "prompt": one.question.prompt,
        "gold": one.question.answer,
        "token_ratio": one.token_ratio,
        "exact": one.exact,
        "generated": one.generated,
        "text": one.text,
        "cut": one.cut,
        "generated_chat": one.generated_chat,
        "text_chat": one.text_chat,
        "cut_chat": one.cut_chat,
        "top": one.top,
        "moved": one.moved,
        "kl": one.mean_kl,
    }
    return {name: value for name, value in shown.items() if value is not None}
