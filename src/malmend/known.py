"""What a model surely says of other subjects: an edit moves the same of another subject first.

Asked are the training facts of the project's own.  The unedited model says something surely where
its first choice for the answer's first token has :data:`SURE` of the probability, and is right or
begins a name: of many a county it says that it lies in Texas, and is right of some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from malmend.facts.apart import apart
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.readers import read_facts
from malmend.files import written_beside
from malmend.kept import kept
from malmend.material import MOST_KEPT, can_be_asked, without_end
from malmend.models.source import cached
from malmend.models.trunk import Trunk
from malmend.workbench import Workbench, shipped

SURE = 0.1  # probability of the first choice


def known_facts(bench: Workbench, facts: Sequence[Fact]) -> list[Encoded]:
    """What the unedited model surely says of subjects that are none of the facts' own.

    Where it is right up to the answer's end, else up to its first token.  No subject has all words
    of one that is edited (:func:`malmend.facts.apart.apart`), and no prompt is a neighbour's, by
    which an edit is measured.  Call while the weights are the unedited ones.

    Args:
        bench: a decoder's.
        facts: that are edited.
    """
    encoder, known = bench.encoder, read_facts(shipped("facts.jsonl"))
    asked = [f for f in known if "train" in f.tags and can_be_asked(encoder, f.question)]
    questions = [without_end(encoder.encode(one.question)) for one in asked]
    words = hashlib.sha256(f"{SURE} {questions!r}".encode()).hexdigest()
    path = cached("calibrations") / f"{bench.loaded.digest[:16]}-{words[:16]}.json"
    found: dict[int, bool] = kept(
        path, _read_said, partial(_said, bench, questions), _write_said, MOST_KEPT
    )
    free = apart([asked[index].subject or asked[index].prompt for index in found], facts, few=0)
    measured = {other.prompt for fact in facts for other in fact.neighbours}
    return [
        questions[index] if is_right else _first_token(questions[index])
        for (index, is_right), is_free in zip(found.items(), free, strict=True)
        if is_free and asked[index].prompt not in measured
    ]


@torch.no_grad()
def _said(bench: Workbench, questions: Sequence[Encoded]) -> dict[int, bool]:
    """Which questions the model surely answers, and whether the answer's first token is right."""
    settings = replace(bench.trunk.settings, store_bytes=0)
    trunk = Trunk(bench.loaded.model, bench.trunk.sites, settings)
    found = dict[int, bool]()
    for indices, batch in trunk.batches([_first_token(one) for one in questions]):
        best = trunk.logits(batch).float().softmax(-1).max(-1)
        chances, choices = best.values.tolist(), best.indices.tolist()
        for index, chance, choice in zip(indices, chances, choices, strict=True):
            is_right = choice == questions[index].labels[0]
            name = bench.encoder.said((choice,)).strip()[:1].isupper()
            if chance >= SURE and (is_right or name):
                found[index] = is_right
    return dict(sorted(found.items()))


def _first_token(question: Encoded) -> Encoded:
    end = question.answer_start + 1
    return replace(question, ids=question.ids[:end], answer_end=end)


def _read_said(path: Path) -> dict[int, bool]:
    return {
        int(index): bool(right) for index, right in json.loads(path.read_text(encoding="utf-8"))
    }


def _write_said(found: dict[int, bool], path: Path) -> None:
    with written_beside(path) as beside:
        beside.write_text(json.dumps(list(found.items())), encoding="utf-8")
