"""How a ledger's model is doing: which facts hold, what else moved, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmend.evaluation.examiner import Examiner
from malmend.evaluation.replies import Reply
from malmend.facts.fact import Fact
from malmend.given import check_fields, check_range
from malmend.material import KEPT_BACK, held_out_questions
from malmend.patch import shifted
from malmend.progress import Progress, counting, silent
from malmend.workbench import Workbench


@dataclass(frozen=True)
class StopRule:
    """When a ledger warns that its model degrades, fixed at the start.

    Retention is measured on general questions of the project's own that no prior has read, each
    time that a model is at hand: the share of their answer tokens whose first choice is the
    unedited model's.

    Attributes:
        retention: warn where general questions keep less than this share.
        questions: how many general questions are asked, 200 at most; 0 measures nothing.
        refuse: refuse facts that would bring the model there, in place of warning.
    """

    retention: float = 0.75
    questions: int = 200
    refuse: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("retention",), 0.0, 1.0, "--rule.")
        check_range(self, ("questions",), 0, KEPT_BACK, "--rule.")

    def warning(self, retention: float | None) -> str | None:
        """What is said where the rule is broken; None where it is not, or nothing was measured."""
        if retention is None or retention >= self.retention:
            return None
        return (
            f"the model keeps {retention:.1%} of what it said to general questions, below the "
            f"ledger's bound of {self.retention:.1%}"
        )


@dataclass(frozen=True)
class Watched:
    """What a model with a shift on says to some facts.

    Attributes:
        replies: to the facts' edit prompts, in order.
        retention: over the general questions; None where none are asked.
    """

    replies: Sequence[Reply]
    retention: float | None

    @property
    def held(self) -> list[bool]:
        """Which facts hold."""
        return [bool(reply.right) for reply in self.replies]


class Watch:
    """Asks the same of the unedited model, at once, and later of the model with a shift on.

    Args:
        bench: the model, unedited.
        facts: their edit prompts are asked.
        rule: says how many general questions.
        progress: called with stage and share done.
        in_chat: ask the facts through the model's chat template too.
    """

    def __init__(
        self,
        bench: Workbench,
        facts: Sequence[Fact],
        rule: StopRule,
        progress: Progress = silent,
        in_chat: bool = False,
    ):
        self._bench, self._facts, self._progress = bench, [fact.alone for fact in facts], progress
        chat = bench.encoder.in_chat() if in_chat else None
        self._examiner = Examiner(bench.loaded, bench.trunk, bench.encoder, chat=chat)
        questions = held_out_questions(bench.encoder, rule.questions)
        self._general = bench.encoder.encode_all(questions)
        total = self._examiner.count(self._facts)
        self._count = counting(progress, "asking before and after", total + 2 * len(questions))
        self._examiner.progress = self._count
        self._before = self._first_choices()

    def known(self) -> list[bool]:
        """Which facts the unedited model answers already, every token of them."""
        # A right answer is known teacher forced; nothing need be decoded.
        examiner = Examiner(self._bench.loaded, self._bench.trunk, self._bench.encoder)
        total = examiner.count(self._facts, 0)
        examiner.progress = counting(self._progress, "asking the unedited model", total)
        before = examiner.examine(self._facts, decode_facts=0)
        return [reply.exact == 1.0 for reply in before.rows]

    def with_shifts(self, shifts: Mapping[str, Tensor]) -> Watched:
        """What the model says with the shifts on, V x K by site."""
        with shifted(self._bench.trunk.sites, shifts):
            after = self._examiner.examine(self._facts)
            now = self._first_choices()
        same = [one == other for one, other in zip(self._before, now, strict=True)]
        return Watched(after.rows, sum(same) / len(same) if same else None)

    @torch.no_grad()
    def _first_choices(self) -> list[int]:
        """The model's, at the tokens of the general questions that count."""
        found: dict[int, list[int]] = {}
        for indices, batch in self._bench.trunk.batches(self._general):
            top = self._bench.trunk.logits(batch).argmax(-1).tolist()
            for index in indices:
                one = self._general[index]
                found[index] = top[: one.predictions]
                top = top[len(one.sources) :]
            self._count(len(indices))
        return [token for index in sorted(found) for token in found[index]]
