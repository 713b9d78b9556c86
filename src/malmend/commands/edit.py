"""Facts in, patch out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from malmend.commands.choice import choose
from malmend.commands.evaluate import chat_encoder, evaluate
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.editor import Aggregation, Editor
from malmend.editors.refine import RefineSettings, framed, framing, further, missed
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.page import PAGE, page_folder
from malmend.facts.fact import Fact, FactSet
from malmend.files import writable
from malmend.models.capture import Captured, capture
from malmend.models.load import LoadedModel
from malmend.models.trunk import TrunkSettings
from malmend.numerics.ridge import mean_residual
from malmend.patch import Patch, applied, load_patch, make_patch, save_patch
from malmend.workbench import (
    Progress,
    Workbench,
    aimed,
    checked_facts,
    encoder_for,
    lay_out,
    opened,
    silent,
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
        seconds: capture, transform, aggregation and writing; loading and calibration aside.
        page: where the report lies, or None.
    """

    patch: Patch
    facts: FactSet
    path: Path | None
    unedited: float
    edited: float
    seconds: float
    page: Path | None = None


def edit(
    model: str | LoadedModel,
    facts: str | Path | Sequence[Fact],
    out: str | Path | None = None,
    editor: str | Path | Editor = "auto",
    settings: EditorSettings | None = None,
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
    dtype: str = "float32",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> EditResult:
    """Edits all facts at once and writes the patch.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        facts: a facts file, or facts.
        out: where the patch goes; None keeps it in memory.
        editor: a folder that ``malmend train`` wrote; "none" for the editor without a network;
            "auto" for the editor that the package carries for this model, and where it carries
            none, or settings or calibration data are given, "none".
        settings: of the editor without a network; a trained editor brings its own.
        limit: the first so many facts.
        strict: refuse duplicates and contradictions in place of skipping the later ones.
        alternative: edit in each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: edit each fact away from what the model says of it, in its answer or
            its alternative, or of two classes in the other one.
        calibrate: calibration facts in place of the project's own.
        text: calibration text in place of the project's own.
        report: a folder for a report as an HTML page; asks everything about the facts before and
            after, 200 of them free-running too.
        calibration: how the model is calibrated; as facts and text only without a trained editor.
        refine: how often the edit is solved, and in which frames; an editor that sums, or takes
            plain gradients, solves once.
        trunk: grouping of questions and the disk budget for trunk activations.
        dtype: the model is loaded in.
        progress: called with stage and share done.
        told: called with a line about the editor, once it is known and before the work.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    if out is not None:
        writable(out, facts, calibrate, text, model)
    own_data = (calibrate, text, calibration) != (None, None, CalibrationSettings())
    choice = choose(editor, settings, own_data)
    encoder = encoder_for(model, choice.settings.end_of_answer)
    known = checked_facts(facts, encoder, limit, strict, alternative, away)
    for frame in refine.frames_for(encoder):
        framing(encoder, frame)
    if report is not None:  # whatever would stop it is found before the work
        chat_encoder(encoder, known, DECODED)
        page_folder(report, facts, calibrate, text, out)
    loaded = opened(model, dtype)
    choice = choice.on(loaded)
    told(choice.said())
    sites = choice.settings.sites_in(loaded.model)
    bench = lay_out(loaded, sites, choice.settings.end_of_answer, trunk=trunk)
    known = aimed(bench, known, away)
    ready = choice.editor(bench, calibrate, text, calibration, progress)
    aims = {"alternative": alternative, "away": away}
    said = {**choice.provenance(known), **aims, "created": now()}
    done = _edited(bench, ready, known, said, out, refine, progress)
    if report is None:
        return done
    evaluate(
        loaded,
        facts,
        done.patch,
        limit,
        strict,
        alternative,
        away,
        decode_facts=DECODED,
        report=report,
        trunk=trunk,
        progress=progress,
    )
    return replace(done, page=Path(report) / PAGE)


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make_edit(
    bench: Workbench,
    editor: Editor,
    facts: FactSet,
    said: Mapping[str, Any],
    refine: RefineSettings = RefineSettings(),
    progress: Progress = silent,
) -> Patch:
    """Algorithm 1: capture, transform, aggregate; then the further passes of equation (18).

    Args:
        bench: the model.
        editor: with everything it needs.
        facts: to be edited.
        said: entries of the patch's header that the editing does not know.
        refine: further passes.
        progress: called with stage and share done.

    Raises:
        EditorError: a shift holds NaN or infinity, or a frame does not suit the model.
    """
    settings, trunk = editor.settings, bench.trunk
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    refinable = settings.method == "malmen" and settings.descent is not None
    again = refinable and refine.goes_on(bench.encoder, 1, 1.0)
    frames = refine.frames_for(bench.encoder) if again else ()
    others = framed(bench.encoder, [fact.question for fact in facts], frames)
    count = _counter(progress, "keys and value gradients", len(questions))
    captured = capture(trunk, questions, settings.tokens, settings.descent, count)
    solved = _Solved.of(editor, captured, editor.aggregate(captured), progress)
    if solved.broken is not None:
        raise EditorError(
            f"The shift of {solved.broken} holds NaN or infinity, so nothing was written; check "
            f"--eta and that the weights of {bench.loaded.name} are whole."
        )
    kept, left = 1, missed(trunk, questions, solved.shifts) if again else 0.0
    while again and refine.goes_on(bench.encoder, kept, left):
        stage = f", pass {kept + 1}"
        count = _counter(progress, f"keys and value gradients{stage}", len(questions) + len(others))
        found = further(editor, trunk, solved.shifts, questions, others, refine.gain, count)
        later = _Solved.of(editor, *found, progress, stage)
        if later.broken or (now_left := missed(trunk, questions, later.shifts)) > left:
            break
        solved, kept, left = later, kept + 1, now_left
    tokens = max(len(pair.keys_NK) for pair in solved.captured)
    made = {"passes": kept, "frames": list(frames) if kept > 1 else []}
    provenance = {**_provenance(bench, editor, facts), **made, **said, "tokens": tokens}
    if settings.method == "malmen":
        provenance["mean_residual"] = solved.mean_residual()
    return make_patch(solved.shifts, tokens, provenance)


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Reports the share of questions done."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done / total)

    return count


@dataclass(frozen=True, eq=False)
class _Solved:
    """One solve: what it read, what it asked for, and one shift per site."""

    captured: Sequence[Captured]
    aggregations: Sequence[Aggregation]
    shifts: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        editor: Editor,
        captured: Sequence[Captured],
        aggregations: Sequence[Aggregation],
        progress: Progress,
        which: str = "",
    ) -> _Solved:
        """Solves at every site; ``which`` is said after the stage's name."""
        stage = "least squares" if editor.settings.method == "malmen" else "sum of shifts"
        progress(stage + which, 0.0)
        shifts = {name: one.shift() for name, one in zip(editor.names, aggregations, strict=True)}
        progress(stage + which, 1.0)
        return cls(captured, aggregations, shifts)

    @property
    def broken(self) -> str | None:
        """A site whose shift holds NaN or infinity."""
        return next(
            (n for n, shift_VK in self.shifts.items() if not shift_VK.isfinite().all()), None
        )

    def mean_residual(self) -> float:
        """MALMEN, section 5.2."""
        residuals = [
            mean_residual(shift_VK, pair.keys_NK, one.diffs_NV)  # type: ignore[attr-defined]
            for shift_VK, pair, one in zip(
                self.shifts.values(), self.captured, self.aggregations, strict=True
            )
        ]
        return sum(residuals) / len(residuals)


def _provenance(bench: Workbench, editor: Editor, facts: FactSet) -> dict[str, Any]:
    """What a patch's header says of model, editor and facts."""
    settings = editor.settings
    return {
        "malmend": version("malmend"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "model": bench.loaded.name,
        "base": bench.loaded.fingerprint,
        "method": settings.method,
        "settings": asdict(settings),
        "eta": editor.log_eta_S.exp().tolist(),
        "prior": {
            term: editor.log_weights_SP[:, index].exp().tolist()
            for index, term in enumerate(editor.terms)
        },
        "lambda": editor.log_ridge_S.exp().tolist(),
        "end_weight": editor.log_end_weight_S.exp().tolist(),
        "facts": len(facts),
        "skipped": len(facts.skipped),
        "facts_source": facts.source,
        "facts_sha256": _digest(facts),
    }


def _edited(
    bench: Workbench,
    editor: Editor,
    facts: FactSet,
    said: Mapping[str, Any],
    out: str | Path | None,
    refine: RefineSettings,
    progress: Progress,
) -> EditResult:
    """Makes the patch, writes it, reads it back, and measures the edit prompts on what was read."""
    start = time.perf_counter()
    patch = make_edit(bench, editor, facts, said, refine, progress)
    if out is not None:
        save_patch(patch, out)
        patch = load_patch(out)
    seconds = time.perf_counter() - start
    prompts = [_alone(fact) for fact in facts]
    examiner = Examiner(bench.loaded, bench.trunk, bench.encoder)
    progress("edit prompts before and after", 0.0)
    before = examiner.examine(prompts, decode_facts=0).mean("ES", "token_ratio") or 0.0
    progress("edit prompts before and after", 0.5)
    with applied(bench.loaded, patch):
        after = examiner.examine(prompts, decode_facts=0).mean("ES", "token_ratio") or 0.0
    progress("edit prompts before and after", 1.0)
    metrics = {"ES": {"token_ratio": {"unedited": before, "edited": after}}}
    patch = Patch(patch.factors, {**patch.provenance, "metrics": metrics})
    if out is not None:
        save_patch(patch, out)
    return EditResult(patch, facts, None if out is None else Path(out), before, after, seconds)


def _alone(fact: Fact) -> Fact:
    """The fact with its edit prompt only."""
    return replace(fact, paraphrases=(), unrelated=(), neighbours=(), reversed=None)


def _digest(facts: FactSet) -> str:
    """SHA-256 over prompts and answers, in order: what the shift depends on."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact.prompt}\x1f{fact.answer}\x1e".encode())
    return digest.hexdigest()
