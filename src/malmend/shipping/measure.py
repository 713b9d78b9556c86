"""The same facts asked of one base and of edited forms of it: patches on it, or whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from malmend.errors import MalmendError, counted
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.protocols import Scores, scores
from malmend.facts.fact import FactSet
from malmend.models.load import LoadedModel
from malmend.models.sites import Site
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch, applied, sites_of
from malmend.progress import Progress, silent
from malmend.shipping.layers import placed
from malmend.workbench import Workbench, lay_out

UNEDITED = "unedited"
Measured = Mapping[str, Mapping[str, Scores]]  # by form, then by kind of question


@dataclass(frozen=True)
class Asking:
    """What is asked.

    Attributes:
        facts: checked, and aimed where they are to be.
        decode_facts: for how many the model also answers free-running; None for all.
    """

    facts: FactSet
    decode_facts: int | None = None

    @property
    def decoded(self) -> int:
        """How many facts ``generated`` is of: the first so many."""
        count = len(self.facts)
        return count if self.decode_facts is None else min(self.decode_facts, count)


def check_decoded(decode_facts: int | None) -> None:
    """Raises MalmendError where fewer facts than none are to be answered free-running."""
    if decode_facts is not None and decode_facts < 0:
        raise MalmendError(f"decode_facts is {decode_facts}, expected 0 or more.")


def of_facts(asked: int, decoded: int) -> str:
    """Of how many facts figures are, in words."""
    said = f"of {counted(asked, 'fact')}"
    if decoded == 0:
        return f"{said}, none answered free-running"
    return said if decoded == asked else f"{said}; generated is of the first {decoded:,}"


def bench_for(
    loaded: LoadedModel, patches: Sequence[Patch], end_of_answer: Any, trunk: TrunkSettings
) -> Workbench:
    """The model cut where any of the patches shifts it."""
    sites: dict[str, Site] = {}
    for patch in patches:
        sites |= {one.name: placed(loaded, one) for one in sites_of(loaded.model, patch)}
    return lay_out(loaded, list(sites.values()), end_of_answer, trunk=trunk)


def measured(
    bench: Workbench,
    asking: Asking,
    forms: Mapping[str, Patch | LoadedModel],
    progress: Progress = silent,
) -> dict[str, dict[str, Scores]]:
    """Scores of the unedited model and of each form, by its name.

    Args:
        bench: the base, cut at or below every edited layer.
        asking: the questions.
        forms: patches to be put on the base, or models that differ from it above the cut.
        progress: called with stage and share done.

    Raises:
        MalmendError: logits are NaN.
    """
    examiner = Examiner(bench.loaded, bench.trunk, bench.encoder)
    facts, decoded = asking.facts, asking.decode_facts
    stage, count = "asking", len(forms) + 1
    progress(stage, 0.0)
    before = examiner.examine(facts, decoded, remember=True)
    out = {UNEDITED: scores(before)}
    for index, (name, form) in enumerate(forms.items()):
        progress(stage, (index + 1) / count)
        if isinstance(form, Patch):
            with applied(bench.loaded, form, force=True):  # its base was checked where it was read
                after = examiner.examine(facts, decoded)
        else:
            other = _examiner_of(form, bench)
            other.measures_against(examiner)
            after = other.examine(facts, decoded)
        out[name] = scores(after, before)
    progress(stage, 1.0)
    return out


def _examiner_of(form: LoadedModel, bench: Workbench) -> Examiner:
    """Of a model that is asked once, so that nothing of it is kept on disk."""
    sites = [
        Site(s.name, form.model.get_submodule(s.name), s.in_encoder) for s in bench.trunk.sites
    ]
    settings = TrunkSettings(bench.trunk.settings.batch_tokens, store_bytes=0)
    its = lay_out(form, sites, bench.encoder.end_of_answer, trunk=settings)
    return Examiner(form, its.trunk, bench.encoder)


def plain(found: Measured) -> dict[str, Any]:
    """As JSON: what was asked, without what was not."""
    return {
        form: {
            kind: {name: value for name, value in asdict(one).items() if value is not None}
            for kind, one in kinds.items()
            if one.questions
        }
        for form, kinds in found.items()
    }
