"""Facts in, trained editor out; stops and goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import SavedEditor, load_editor, save_editor
from malmend.editors.editor import Editor
from malmend.editors.resuming import check_run, rounds_otherwise, run_of
from malmend.editors.settings import EditorSettings
from malmend.editors.train_settings import TrainSettings
from malmend.editors.training import StepRecord, Trainer, estimate_seconds, rehearse, step_bytes
from malmend.editors.training_facts import check_trainable
from malmend.editors.training_folder import (
    check_folder,
    check_steps,
    is_begun,
    is_due,
    is_whole,
)
from malmend.errors import EditorError
from malmend.facts.encoded import resolved
from malmend.facts.fact import Fact, FactSet, Question
from malmend.facts.lint import leaks, skipped_said, unseen, unseen_said
from malmend.facts.readers import given_questions
from malmend.files import reason
from malmend.given import checked
from malmend.material import calibrated
from malmend.models.budget import MemoryPlan, Work, check_memory, plan_memory, watched
from malmend.models.load import LoadedModel
from malmend.models.store import ActivationStore
from malmend.models.trunk import TrunkSettings
from malmend.one_writer import only_writer
from malmend.patch import by_one_thread
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
    trunk_folder,
)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained editor.

    Attributes:
        saved: the editor and what its folder says.
        folder: where it lies.
        records: every step, those of interrupted runs included.
        leaks: questions beside facts that are also edited, or answered otherwise elsewhere.
        peak: bytes of anonymous memory that the process held at most, where a budget was given.
    """

    saved: SavedEditor
    folder: Path
    records: tuple[StepRecord, ...] = field(repr=False)
    leaks: tuple[str, ...] = field(repr=False)
    peak: int | None = None


@by_one_thread
@checked("facts")
def train(
    model: str | LoadedModel,
    facts: str | Path | Sequence[Fact],
    out: str | Path,
    locality: str | Path | Sequence[Question] | None = None,
    settings: EditorSettings = EditorSettings(),
    training: TrainSettings = TrainSettings(),
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
    calibrate: str | Path | None = None,
    text: str | Path | None = None,
    calibration: CalibrationSettings = CalibrationSettings(prior_facts=1536),
    trunk: TrunkSettings = TrunkSettings(),
    memory: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    processes: Processes = ALONE,
    progress: Progress = silent,
    starting: Callable[[Trainer, float], None] = lambda trainer, seconds: None,
    stepped: Callable[[StepRecord], None] = lambda record: None,
    told: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Trains an editor, or goes on with the one that ``out`` holds.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        facts: a facts file, or facts, with paraphrases.
        out: the editor's folder.
        locality: unrelated questions; None takes each fact's own.
        settings: what the editor is.
        training: how it is trained.
        limit: take only the first so many facts.
        strict: refuse duplicates and contradictions in place of skipping the later ones.
        alternative: train on each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: train on what it does not say of each fact.
        calibrate: calibration facts in place of those that are trained on.
        text: calibration text in place of the project's own.
        calibration: how the model is calibrated.
        trunk: grouping of questions and the disk budget.
        memory: what the process may hold, as "4GB"; see :func:`malmend.edit`.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        processes: that the facts of each step are spread over; see :mod:`malmend.processes`.
        progress: called with stage and share done, before training starts.
        starting: called with the trainer and the expected seconds, before the first step.
        stepped: called after every step.
        told: called before the first step, with what the user should know: the memory's plan, facts
            that were skipped, and that the run that is gone on with had other threads.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    if memory is not None:
        check_memory(memory)
    folder = Path(out)
    encoder = encoder_for(model, settings.end_of_answer)
    known = checked_facts(facts, encoder, limit, strict, alternative, away)
    check_calibration(encoder, calibrate, text)
    others = given_questions(locality)
    check_trainable(known.facts, others, training.facts_per_step, "--facts-per-step")
    check_folder(folder)  # before the model is loaded, but only once the facts are good
    with only_writer(folder) if processes.is_first else nullcontext():
        loaded = opened(model, dtype, device)
        # What "auto" stands for is said in the editor's folder, and may be given when resuming.
        settings = replace(settings, tokens=resolved(settings.tokens, loaded.reading.form))
        sites = settings.sites_in(loaded.model)
        bench = lay_out(loaded, sites, settings.end_of_answer, trunk=trunk)
        known = aimed(bench, known, away)
        own = known if any(fact.paraphrases for fact in known) else None
        with processes.first_then_others():  # who find it in the cache
            found = calibrated(
                bench, settings, calibrate or own, text, calibration, progress, others
            )
        start = found.editor(settings, bench.trunk, training.seed)
        bench, plan = _within(bench, start, training, known, memory)
        store = _pairs_store(bench, settings, trunk)
        trainer = Trainer(
            start, bench.trunk, bench.encoder, known, others, training, store, processes
        )
        about = _about(bench, known, others, training)
        about["calibration_sha256"] = found.digest
        for line in (*skipped_said(known.skipped), *unseen_said(unseen(known))):
            told(line)
        records = _resumed(trainer, folder, about, told)
        if processes.count > 1:
            processes.check_alike("The editor in training", trainer.step, start.checksum())
        with watched(plan, told) as peak:
            starting(trainer, _seconds_left(trainer, records))
            _trained(trainer, about, records, folder, stepped)
        with processes.first_then_others():  # once it is written
            saved = load_editor(folder)
        return TrainResult(saved, folder, tuple(records), tuple(leaks(known, others)), peak())


def _within(
    bench: Workbench,
    start: Editor,
    training: TrainSettings,
    facts: FactSet,
    memory: str | None,
) -> tuple[Workbench, MemoryPlan | None]:
    """The bench within a memory budget, where there is one, and how that is spent."""
    if memory is None:
        return bench, None
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    extra = step_bytes(start, bench.trunk, training, questions)
    work = Work(questions, start.settings.tokens, extra, partial(rehearse, bench.trunk))
    plan = plan_memory(bench.trunk, memory, work)
    return bench.within(plan), plan


def _trained(
    trainer: Trainer,
    about: dict[str, Any],
    records: list[StepRecord],
    folder: Path,
    stepped: Callable[[StepRecord], None],
) -> None:
    """Takes the steps that are left, adds their records, and saves; one of several processes."""
    settings, is_first = trainer.settings, trainer.processes.is_first
    for record in trainer.run():
        records.append(record)
        stepped(record)
        if is_due(record.step, settings.save_every, settings.steps) and is_first:
            _save(trainer, about, records, folder)
    if is_first and not is_whole(folder, trainer.step):  # killed at the last step
        _save(trainer, about, records, folder)


def _save(
    trainer: Trainer, about: dict[str, Any], records: Sequence[StepRecord], folder: Path
) -> None:
    """Both of a folder's files; what resuming needs first."""
    about = {**about, "curve": [asdict(one) for one in records]}
    trainer.save(folder, about)
    save_editor(trainer.editor, {**about, "step": trainer.step}, folder)


def _resumed(
    trainer: Trainer, folder: Path, about: dict[str, Any], told: Callable[[str], None]
) -> list[StepRecord]:
    """Goes on from the folder's checkpoint, if it has one of the same model and facts."""
    if not is_begun(folder):
        return []
    said: dict[str, Any] = dict(trainer.resume(folder))
    check_run(said, about, folder)
    check_steps(folder, trainer.step, trainer.settings.steps)
    for line in rounds_otherwise(said, about["device"]):
        told(line)
    try:
        return _curve(said["curve"], trainer.step)
    except (TypeError, KeyError, ValueError) as error:
        raise EditorError(
            f"{folder} holds a damaged training.safetensors ({reason(error)}); give another --out "
            "to train from the start."
        ) from error


def _curve(rows: Any, steps: int) -> list[StepRecord]:
    """The record of every step; ValueError, TypeError or KeyError where they are none."""
    # JSON knows no tuple.
    records = [StepRecord(**{**row, "weights": tuple(row["weights"])}) for row in rows]
    for record in records:
        numbers = [value for name, value in vars(record).items() if name != "weights"]
        if not all(type(one) in (int, float) for one in (*numbers, *record.weights)):
            raise ValueError("its curve holds what is no number")
    if [record.step for record in records] != list(range(1, steps + 1)):
        raise ValueError("its curve is not that of its steps")
    return records


def _seconds_left(trainer: Trainer, records: Sequence[StepRecord]) -> float:
    """From the steps taken, else from a rehearsal.

    A resumed run must not rehearse: what that leaves in the stores was not there when the run that
    is gone on with came to this step, and other batches round otherwise.
    """
    left = trainer.settings.steps - trainer.step
    if records:
        return left * sum(record.seconds for record in records) / len(records)
    return estimate_seconds(trainer)


def _about(
    bench: Workbench, facts: FactSet, others: Sequence[Question], training: TrainSettings
) -> dict[str, Any]:
    return {
        **run_of(bench.loaded, facts, others),
        "facts_source": facts.source,
        "training": asdict(training),
    }


def _pairs_store(
    bench: Workbench, settings: EditorSettings, trunk: TrunkSettings
) -> ActivationStore:
    """Captured pairs on disk, apart by everything that they depend on."""
    what = repr(
        (
            settings.tokens,
            settings.end_of_answer,
            settings.descent,
            sorted(s.name for s in bench.trunk.sites),
        )
    )
    tag = hashlib.sha256(what.encode()).hexdigest()[:12]
    folder = trunk_folder(bench.loaded) / f"pairs-packed-{tag}"
    return ActivationStore(folder, 1, bench.trunk.wide, trunk.store_bytes)
