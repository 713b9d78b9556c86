"""Facts in, a trained method out: the methods that are no editors but are trained too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from malmend.editors.resuming import rounds_otherwise
from malmend.editors.training_folder import (
    check_folder,
    check_steps,
    is_begun,
    is_due,
)
from malmend.errors import MalmendError
from malmend.facts.fact import Fact, Question
from malmend.facts.lint import leaks, skipped_said, unseen, unseen_said
from malmend.facts.readers import given_questions
from malmend.given import checked
from malmend.methods.trained import TRAINED
from malmend.models.device import places_of
from malmend.models.load import LoadedModel
from malmend.models.trunk import TrunkSettings
from malmend.one_writer import only_writer
from malmend.patch import by_one_thread
from malmend.workbench import aimed, checked_facts, encoder_for, lay_out, opened


@dataclass(frozen=True, eq=False)
class LearnResult:
    """A method that is trained.

    Attributes:
        folder: of it.
        records: of every step of this run.
        leaks: questions beside facts that are also edited, or answered otherwise elsewhere.
    """

    folder: Path
    records: tuple[Any, ...] = field(repr=False)
    leaks: tuple[str, ...] = field(default=(), repr=False)


@by_one_thread
@checked("facts", "locality")
def learn(
    model: str | LoadedModel,
    facts: str | Path | Sequence[Fact],
    out: str | Path,
    method: str,
    settings: Any = None,
    locality: str | Path | Sequence[Question] | None = None,
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
    trunk: TrunkSettings = TrunkSettings(),
    dtype: str = "float32",
    device: str = "cpu",
    stepped: Callable[[Any], None] = lambda record: None,
    told: Callable[[str], None] = lambda line: None,
) -> LearnResult:
    """Trains a method on facts, or goes on with what ``out`` holds.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        facts: a facts file, or facts, with paraphrases.
        out: the folder; :func:`malmend.edit` takes it as its editor.
        method: "enn" or "ke".
        settings: of the method, from its file under ``malmend.methods``; None for the usual ones.
        locality: unrelated questions; None takes each fact's own.
        limit: take only the first so many facts.
        strict: refuse duplicates and contradictions in place of skipping the later ones.
        alternative: train on each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: train on what it does not say of each fact.
        trunk: grouping of questions and the disk budget.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        stepped: called after every step.
        told: called about facts that were skipped, characters that nobody sees, and what makes a
            resumed run's numbers differ.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    if method not in TRAINED:
        raise MalmendError(
            f"The method {method!r} is not trained, expected one of {', '.join(TRAINED)}."
        )
    kind, folder = TRAINED[method], Path(out)
    settings = kind.settings() if settings is None else settings
    encoder = encoder_for(model, settings.end_of_answer)
    known = checked_facts(facts, encoder, limit, strict, alternative, away)
    others = given_questions(locality)
    check_folder(folder)
    with only_writer(folder):
        loaded = opened(model, dtype, device)
        sites = settings.sites_in(loaded.model)
        bench = lay_out(loaded, sites, settings.end_of_answer, trunk=trunk)
        for line in (*skipped_said(known.skipped), *unseen_said(unseen(known))):
            told(line)
        trainer = kind.trainer(settings, bench, list(aimed(bench, known, away)), others)
        if is_begun(folder, method):
            said = trainer.resume(folder)
            for line in rounds_otherwise(said, places_of(loaded.model)):
                told(line)
        check_steps(folder, trainer.step, settings.steps)
        records = []
        for record in trainer.run():
            records.append(record)
            stepped(record)
            if is_due(record.step, settings.save_every, settings.steps):
                trainer.save(folder)
        if not records:  # killed between the files of the last step, it may lack some
            trainer.save(folder)
        return LearnResult(folder, tuple(records), tuple(leaks(known, others)))
