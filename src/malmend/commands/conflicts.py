"""What patches do to one another on one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from malmend.errors import MalmendError
from malmend.facts.fact import FactSet
from malmend.facts.lint import skipped_said
from malmend.facts.tokens import EndOfAnswer
from malmend.given import checked
from malmend.models.load import LoadedModel
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch, by_one_thread
from malmend.progress import Progress, silent
from malmend.shipping.adapter import based_on, read_patch
from malmend.shipping.conflict import Meeting, meetings, stacked
from malmend.shipping.layers import check_exportable
from malmend.shipping.measure import Asking, Measured, bench_for, check_decoded, measured
from malmend.workbench import aimed, checked_facts, encoder_for, opened, others_asked


@dataclass(frozen=True, eq=False)
class ConflictsResult:
    """What several patches have in common.

    Attributes:
        model: the base's name.
        patches: names of the patches, in order.
        meetings: layers that two of them shift; empty where no two meet.
        metrics: of each patch whose facts were given, by its name: scores of the unedited model,
            of the patch ``alone`` and of all ``stacked``, on these facts.
        asked: of the same patches, what was asked.
    """

    model: str
    patches: tuple[str, ...]
    meetings: tuple[Meeting, ...] = field(repr=False)
    metrics: Mapping[str, Measured] = field(repr=False)
    asked: Mapping[str, Asking] = field(repr=False)


@by_one_thread
@checked()
def conflicts(
    model: str | LoadedModel,
    patches: Sequence[str | Path],
    facts: Sequence[str | Path] = (),
    limit: int | None = None,
    decode_facts: int | None = 0,
    force: bool = False,
    trunk: TrunkSettings = TrunkSettings(),
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> ConflictsResult:
    """Says where patches meet, and what stacking them does to each one's facts.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        patches: two or more patches; a PEFT LoRA adapter's folder counts as one.
        facts: a facts file for each patch, in their order, or none.
        limit: take only the first so many facts of each file.
        decode_facts: for how many of them the model also answers free-running; null for all.
        force: accept patches that were made for another base.
        trunk: grouping of questions and the disk budget for trunk activations.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        progress: called with stage and share done.
        told: called about facts that were skipped, and where those that are asked do not begin with
            a patch's own.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    if len(patches) < 2:
        raise MalmendError(f"{len(patches)} patch was given, expected two or more to compare.")
    if facts and len(facts) != len(patches):
        raise MalmendError(
            f"--facts names {len(facts)} for {len(patches)} patches, expected one facts file for "
            "each, in their order, or none."
        )
    check_decoded(decode_facts)
    if limit is not None and not facts:
        raise MalmendError("--limit is of the facts that are asked; give --facts, or leave it out.")
    read = {name: read_patch(path) for name, path in _named(patches).items()}
    asked = [
        _asked(model, patch, path, limit) for patch, path in zip(read.values(), facts, strict=False)
    ]
    for _, chosen in asked:
        for line in skipped_said(chosen.skipped, strict=False):
            told(line)
    loaded = opened(model, dtype, device)
    known = {name: based_on(patch, loaded) for name, patch in read.items()}
    for patch in known.values():
        check_exportable(loaded, patch, force)
    met, forms = meetings(known), {"stacked": stacked(known, loaded.fingerprint)}
    found, asking = {}, dict[str, Asking]()
    for (name, patch), (end, chosen) in zip(known.items(), asked, strict=False):
        bench = bench_for(loaded, list(known.values()), end, trunk)
        asking[name] = Asking(aimed(bench, chosen, patch.aims["away"]), decode_facts)
        for line in others_asked(patch.provenance, asking[name].facts.facts, name):
            told(line)
        found[name] = measured(bench, asking[name], {"alone": patch, **forms}, progress)
    return ConflictsResult(loaded.name, tuple(known), met, found, asking)


def _asked(
    model: str | LoadedModel, patch: Patch, facts: str | Path, limit: int | None
) -> tuple[EndOfAnswer, FactSet]:
    """A patch's facts as they were edited, checked, with the end that their answers have."""
    encoder = encoder_for(model, patch.end_of_answer)
    return encoder.end_of_answer, checked_facts(facts, encoder, limit, **patch.aims)


def _named(patches: Sequence[str | Path]) -> dict[str, str | Path]:
    """Paths by what they are called: the last part, or the whole where two are alike."""
    lasts = [Path(path).name for path in patches]
    if len(set(map(_place, patches))) < len(patches):
        raise MalmendError("The same patch was given twice; give two different ones.")
    alike = len(set(lasts)) < len(lasts)
    return {str(path) if alike else last: path for path, last in zip(patches, lasts, strict=True)}


def _place(path: str | Path) -> str:
    """Where a path leads, through links; one that is none as it is, which its reading refuses."""
    try:
        return os.path.realpath(path)
    except ValueError:  # a NUL in it
        return str(path)
