"""Facts in, patch out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malmend.commands.evaluate import chat_encoder, evaluate
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.editor import Editor
from malmend.editors.halfway import resumable
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.page import PAGE, check_apart, page_folder
from malmend.facts.fact import Fact, FactSet, facts_digest
from malmend.facts.lint import skipped_said, unseen, unseen_said
from malmend.facts.readers import facts_of
from malmend.files import writable
from malmend.given import checked
from malmend.memory import size_of
from malmend.methods.method import Found, Method, settings_of
from malmend.methods.method_choice import method_for
from malmend.models.budget import watched
from malmend.models.device import places_of
from malmend.models.identity import configuration_of
from malmend.models.load import LoadedModel
from malmend.models.source import lasting
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch, applied, by_one_thread, make_patch, now, versions
from malmend.patch_file import load_patch, replaced, save_patch
from malmend.processes import ALONE, Processes
from malmend.progress import Progress, silent
from malmend.workbench import (
    Workbench,
    aimed,
    check_calibration,
    checked_facts,
    encoder_for,
    lay_out,
    opened,
    trained_on,
)

DISCARDED = (
    "Settling gave NaN, or did worse than the last solve, and was discarded; the patch is that "
    "solve."
)
DECODED = 200  # facts of a report that are also answered free-running, the slow part


@dataclass(frozen=True, eq=False)
class EditResult:
    """A finished edit.

    Attributes:
        patch: as it was read back from the file, where one was written.
        facts: what was edited, and what was skipped.
        path: where the patch lies, or None.
        unedited: share of answer tokens right before, teacher forced (ES, token ratio).
        edited: the same after.
        seconds: capture, transform and aggregation; loading and calibration aside.
        page: where the report lies, or None.
        peak: bytes of anonymous memory that the process held at most, where a budget was given.
    """

    patch: Patch
    facts: FactSet
    path: Path | None
    unedited: float
    edited: float
    seconds: float
    page: Path | None = None
    peak: int | None = None


@by_one_thread
@checked("facts")
def edit(
    model: str | LoadedModel,
    facts: str | Path | Sequence[Fact],
    out: str | Path | None = None,
    editor: str | Path | Editor = "auto",
    settings: EditorSettings | None = None,
    method: Method | None = None,
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
    calibrate: str | Path | None = None,
    text: str | Path | None = None,
    report: str | Path | None = None,
    calibration: CalibrationSettings = CalibrationSettings(),
    refine: RefineSettings = RefineSettings(),
    trunk: TrunkSettings = TrunkSettings(),
    memory: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    processes: Processes = ALONE,
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> EditResult:
    """Edits all facts at once and writes the patch.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        facts: a facts file, or facts.
        out: where the patch goes, in place of the file that lies there; None keeps it in memory.
        editor: a folder that ``malmend train`` wrote, of an editor or another trained method;
            "none" for the editor without a network; "auto" for the editor that the package carries
            for this model, and where it carries none, or settings or calibration data are given,
            "none".
        settings: of the editor without a network; a trained editor brings its own.
        method: another way than by an editor, with its settings (malmend.methods).
        limit: take only the first so many facts.
        strict: refuse duplicates and contradictions in place of skipping the later ones.
        alternative: edit in each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: edit each fact away from what the model says of it, in its answer or
            its alternative, or of two classes in the other one.
        calibrate: calibration facts in place of the project's own.
        text: calibration text in place of the project's own.
        report: a folder for a report as an HTML page; asks everything about the facts before and
            after, 200 of them free-running too.
        calibration: how the model is calibrated; as facts and text only without a trained editor.
        refine: how the edit is solved and in which frames, and how it settles afterwards; an editor
            that sums, or takes plain gradients, solves once.
        trunk: grouping of questions and the disk budget for trunk activations.
        memory: what the process may hold, as "4GB": micro-batches are chosen by it, and captured
            tensors go to disk beyond it; null for micro-batches of ``trunk`` and no bound.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        processes: that the facts are spread over, of an editor; the first one writes.
        progress: called with stage and share done.
        told: called with lines about the editor, about what was given and is not read, about a
            file that the patch will replace, and about facts that were skipped and characters that
            nobody sees, once they are known and before the work, with the memory's plan, and after
            the work where settling was discarded.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    if memory is not None:
        size_of(memory)
    if out is not None:
        place = model if isinstance(model, str) else model.name
        writable(out, facts, calibrate, text, place, editor)
        if report is not None:
            check_apart(out, report)
    given = (calibrate, text, calibration, refine, memory, processes)
    by = method_for(editor, settings, method, *given)
    encoder = encoder_for(model, by.method.end_of_answer)
    read = facts_of(facts, limit, strict)  # once: a file may change meanwhile, an iterator ends
    known = checked_facts(read, encoder, strict=strict, alternative=alternative, away=away)
    check_calibration(encoder, calibrate, text)
    processes.check_enough(len(known))
    by = by.ready(encoder, len(known))
    if report is not None:  # whatever would stop it is found before the work
        chat_encoder(encoder, known, DECODED)
        page_folder(report, facts, calibrate, text, out, model)
    loaded = opened(model, dtype, device)
    by = by.on(loaded)
    for line in (*by.said(), *skipped_said(known.skipped), *unseen_said(unseen(known))):
        told(line)
    sites = by.method.sites_in(loaded.model)
    bench = lay_out(loaded, sites, by.method.end_of_answer, trunk=trunk)
    known = aimed(bench, known, away)
    aims = {"alternative": alternative, "away": away, "created": now()}
    bench, plan = by.within(bench, known.facts, memory)
    for line in () if out is None else replaced(out):
        told(line)
    with watched(plan, told) as peak:
        done = _edited(bench, by.method, known, aims, out, progress, processes)
    done = replace(done, peak=peak())
    header = done.patch.provenance
    if header.get("steps") and header.get("rounds") == 0:
        told(DISCARDED)
    if report is None or not processes.is_first:
        return done
    asked = (loaded, read, done.patch, None, strict, alternative, away)
    evaluate(*asked, decode_facts=DECODED, report=report, trunk=trunk, progress=progress)
    return replace(done, page=Path(report) / PAGE)


def _edited(
    bench: Workbench,
    method: Method,
    facts: FactSet,
    said: Mapping[str, Any],
    out: str | Path | None,
    progress: Progress,
    processes: Processes,
) -> EditResult:
    """Makes the patch, measures the edit prompts with it on, writes it, and reads it back."""
    start = time.perf_counter()
    found = method.find(bench, facts, progress)
    own = {site.name for site in bench.trunk.sites}
    for name, shift_VK in found.shifts.items():
        if name not in own:
            raise EditorError(
                f"The method {method.name} shifts {name}, which is none of the layers that its "
                "sites_in names, so nothing was written; name every layer there."
            )
        if not shift_VK.isfinite().all():
            raise EditorError(
                f"The shift of {name} holds NaN or infinity, so nothing was written; lower "
                f"the rate of {method.name}, and check that the weights of {bench.loaded.name} are "
                "whole."
            )
    patch = make_patch(found.shifts, found.rank, _header(bench, method, facts, said, found))
    seconds = time.perf_counter() - start - found.once
    prompts = [fact.alone for fact in processes.share(facts)]
    with resumable(found.leftover):
        progress("edit prompts before and after", 0.0)
        before = _success(bench, prompts, processes)
        progress("edit prompts before and after", 0.5)
        with applied(bench.loaded, patch):
            after = _success(bench, prompts, processes)
        progress("edit prompts before and after", 1.0)
        metrics = {"ES": {"token_ratio": {"unedited": before, "edited": after}}}
        patch = Patch(patch.factors, {**patch.provenance, "metrics": metrics})
        patch = _written(patch, out, processes)  # last, so that what fails leaves no patch
    if found.leftover is not None:
        with suppress(OSError):
            found.leftover.unlink(missing_ok=True)
    return EditResult(patch, facts, None if out is None else Path(out), before, after, seconds)


def _header(
    bench: Workbench, method: Method, facts: FactSet, said: Mapping[str, Any], found: Found
) -> dict[str, Any]:
    """What the patch says of itself."""
    known = found.said.get("settings", settings_of(method))
    seen = trained_on(found.said, facts.facts)
    return {
        **versions(),
        "model": lasting(bench.loaded.name),
        "base": bench.loaded.fingerprint,
        "dtype": bench.loaded.dtype,
        "device": places_of(bench.loaded.model),
        "method": method.name,
        "facts": len(facts),
        "skipped": len(facts.skipped),
        "facts_source": facts.source,
        "facts_sha256": facts_digest(facts),
        **said,
        **found.said,
        **({} if seen is None else {"trained_on": seen}),
        "settings": {"end_of_answer": method.end_of_answer, **known},
        "configuration": configuration_of(bench.loaded.model),
    }


def _written(patch: Patch, out: str | Path | None, processes: Processes) -> Patch:
    """The patch as it is read back, where it is written; the first process writes it."""
    if out is None:
        return patch
    with processes.first_then_others():
        return save_patch(patch, out) if processes.is_first else load_patch(out)


def _success(bench: Workbench, prompts: Sequence[Fact], processes: Processes) -> float:
    """ES, token ratio, over the prompts of all processes."""
    examiner = Examiner(bench.loaded, bench.trunk, bench.encoder)
    mean = examiner.examine(prompts, decode_facts=0).mean("ES", "token_ratio") or 0.0
    total, count = processes.total(mean * len(prompts), len(prompts))
    return total / count
