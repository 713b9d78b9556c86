"""Everything that is asked in a cell, the unedited model once for all methods on the same draw.

Where each fact is edited alone the model is asked again for every method: replies are kept of one
draw, and there each fact is one.  As :func:`malmend.eval`, but nothing through the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from malmend.bench.plan import Plan
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.perplexity import perplexity
from malmend.evaluation.replies import FactRow, Replies, rows_of
from malmend.facts.fact import Fact, FactSet
from malmend.facts.readers import read_text
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.load import LoadedModel
from malmend.models.sites import Site, usual_sites
from malmend.models.trunk import Trunk
from malmend.patch import Patch, applied, sites_of
from malmend.workbench import aimed, checked_facts, encoder_for, lay_out


@dataclass(frozen=True, eq=False)
class Answers:
    """The replies to everything, unedited and edited, by fact."""

    rows: list[FactRow]
    perplexity: Mapping[str, float]


class Asking:
    """Asks a model about one draw of facts after another; of the last one it keeps the replies.

    Args:
        loaded: the model.
        plan: what is asked.
    """

    def __init__(self, loaded: LoadedModel, plan: Plan):
        self.loaded, self.plan = loaded, plan
        self.words = None if plan.text == "none" else read_text(plan.text)
        self._of: tuple[tuple[Fact, ...], EndOfAnswer, int] | None = None
        self._known: FactSet
        self._unedited: tuple[Examiner, Replies]

    @cached_property
    def _plain(self) -> float | None:
        """Perplexity of the unedited model, which no draw of facts changes."""
        return self._surprise(lay_out(self.loaded, usual_sites(self.loaded.model)).trunk)

    def patched(
        self, facts: Sequence[Fact], patch: Patch, decode: int, reads: bool = True
    ) -> Answers:
        """With a patch on, which also ``reads`` the plan's text."""
        ends = patch.provenance["settings"]["end_of_answer"]
        first, before = self._before(facts, ends, decode)
        plain = self._plain if reads else None
        examiner = self._examiner(sites_of(self.loaded.model, patch), ends)
        examiner.measures_against(first)
        with applied(self.loaded, patch):
            after = examiner.examine(self._known, decode)
            said = self._surprise(examiner.trunk) if reads else None
        both = {} if plain is None or said is None else {"unedited": plain, "edited": said}
        return Answers(rows_of(self._known, before, after), both)

    def read_by(self, facts: Sequence[Fact], encoder: Encoder, decode: int) -> Answers:
        """The unedited model, its prompts as another encoder reads them."""
        first, before = self._before(facts, encoder.end_of_answer, decode)
        examiner = self._examiner(usual_sites(self.loaded.model), encoder.end_of_answer)
        examiner.measures_against(first)
        examiner.encoder = encoder
        return Answers(rows_of(self._known, before, examiner.examine(self._known, decode)), {})

    def known(self, facts: Sequence[Fact]) -> FactSet:
        """The facts as the plan aims them.

        Raises:
            FactsError: facts that this model cannot be asked about.
        """
        plan, encoder = self.plan, encoder_for(self.loaded)
        some = checked_facts(facts, encoder, alternative=plan.alternative, away=plan.away)
        if not plan.away:
            return some
        return aimed(lay_out(self.loaded, usual_sites(self.loaded.model)), some, True)

    def _before(
        self, facts: Sequence[Fact], ends: EndOfAnswer, decode: int
    ) -> tuple[Examiner, Replies]:
        if self._of != (tuple(facts), ends, decode):
            self._of = None
            self._known = self.known(facts)
            first = self._examiner(usual_sites(self.loaded.model), ends)
            replies = first.examine(self._known, decode, remember=True)
            self._unedited = (first, replies)
            self._of = (tuple(facts), ends, decode)
        return self._unedited

    def _examiner(self, sites: Sequence[Site], ends: EndOfAnswer) -> Examiner:
        bench = lay_out(self.loaded, sites, ends)
        return Examiner(self.loaded, bench.trunk, bench.encoder)

    def _surprise(self, trunk: Trunk) -> float | None:
        return None if self.words is None else perplexity(self.loaded, trunk, self.words)
