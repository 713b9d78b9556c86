"""Facts in, a fine-tuned model out; stops and goes on where it was.

The number of epochs is first chosen on held-out subjects; then the model starts again and learns
everything for so many (MALMEN, appendix A.4).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from malmend.commands.finetune_epochs import CHECKPOINT, Epochs, best_epoch
from malmend.editors.training_folder import check_unlike
from malmend.errors import MalmendError, counted
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, FactSet, Question, class_key, subject_hash
from malmend.facts.lint import skipped_said, unseen, unseen_said
from malmend.facts.readers import given_facts, read_facts
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.files import part_of, reason, synced, writable_folder
from malmend.given import checked
from malmend.models.finetune import EpochRecord, FinetuneSettings
from malmend.models.identity import bits, tokens_digest
from malmend.models.load import LoadedModel, load_base, prepared, save_model
from malmend.one_writer import only_writer
from malmend.progress import Progress, silent
from malmend.workbench import check_encodes, encoder_for

Asked = Literal["prompts", "all"]


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A fine-tuned model's folder and every epoch, those of interrupted runs included."""

    folder: Path
    records: tuple[EpochRecord, ...] = field(repr=False)
    questions: int


@checked()
def finetune(
    model: str,
    facts: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: FinetuneSettings = FinetuneSettings(),
    asked: Asked = "prompts",
    end_of_answer: EndOfAnswer = "eos",
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    stepped: Callable[[EpochRecord], None] = lambda record: None,
    told: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    """Fine-tunes all parameters of a model on facts, or goes on with what ``out`` holds.

    An encoder learns to choose among the classes that the answers name, by a new head; a decoder
    or an encoder-decoder learns to say the answers.

    Args:
        model: a name, a folder or a GGUF file.
        facts: facts files, of claims for an encoder.
        out: the fine-tuned model's folder.
        settings: how to train.
        asked: "prompts", or "all" for paraphrases and answered unrelated questions too.
        end_of_answer: what a decoder learns to say after the answer: "eos", "newline" or "none".
        limit: take only the first so many facts of each file.
        device: that it is trained on: "cpu", "cuda" or another accelerator that torch finds, one of
            several as "cuda:1".
        progress: called with stage and share done.
        stepped: called after every epoch.
        told: called with a classifier's classes, and how often the facts name each, and about
            facts that were skipped and characters that nobody sees, before the work.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    folder = Path(out)
    _check_new(folder)
    files = [facts] if isinstance(facts, str | Path) else list(facts)
    sets = [read_facts(file, limit) for file in files]
    together = _together(sets)
    known = list(together)
    learned, held = _split(known, settings)
    labels = _labels(known)

    def fresh() -> LoadedModel:
        with torch.random.fork_rng(devices=[]):  # a head that is made up is, on the CPU
            torch.default_generator.manual_seed(settings.seed)
            return prepared(*load_base(model, sorted(labels), device), name=model)

    first = fresh()
    encoder = encoder_for(first, end_of_answer)
    for one in sets:
        check_encodes(one, encoder)
    writable_folder(folder)  # only once the facts are good
    with only_writer(folder):
        _check_new(folder)  # another run may have ended meanwhile
        if classes := encoder.reading.classes:  # a misspelt label would be one of them
            told(f"Classes: {', '.join(_counted(classes, labels))}.")

        for one in (*sets, together):
            for line in skipped_said(one.skipped, strict=False):
                told(line)
        for line in unseen_said(unseen(known)):
            told(line)

        def encoded(some: Sequence[Fact]) -> list[Encoded]:
            return encoder.encode_all(dict.fromkeys(q for f in some for q in _questions(f, asked)))

        run = Epochs(folder, settings, _digest(known, asked, first, encoder), progress, stepped)
        epochs = settings.epochs
        if held:
            run.train(first, encoded(learned), encoded(held), "choice", settings.epochs)
            epochs = best_epoch(run.records)
            del first  # before another is loaded
            first = fresh()
        everything = encoded(known)
        run.train(first, everything, everything, "all", epochs)
        about = {"settings": asdict(settings), "base": model, "facts": len(known), "asked": asked}
        _put(first, folder, {**about, "epochs": [asdict(record) for record in run.records]})
        return FinetuneResult(folder, tuple(run.records), len(everything))


def _check_new(folder: Path) -> None:
    """Raises MalmendError where the folder holds a model, or what is none of a run's own files."""
    check_unlike(folder)
    # A run that was killed while it moved its model in goes on, and is written over.
    if not (folder / CHECKPOINT).is_file():
        for path in folder.glob("[!.]*"):
            raise MalmendError(f"{folder} is not empty (it holds {path.name}); give another --out.")


def _labels(facts: Sequence[Fact]) -> Counter[str]:
    """How often the facts name each answer: the classes of an encoder."""
    named = (name for fact in facts for name in (fact.answer, fact.alternative) if name)
    return Counter(name.strip() for name in named)


def _counted(classes: Sequence[str], labels: Counter[str]) -> list[str]:
    """Each class and how often the labels name it, as answers are read: whatever their case."""
    counts: Counter[str] = Counter()
    for label, count in labels.items():
        counts[class_key(label)] += count
    return [f"{name} ({counts[class_key(name)]:,})" for name in classes]


def _together(sets: Sequence[FactSet]) -> FactSet:
    """The facts of all files; of one prompt the first answer counts."""
    # Files may give the same id to unlike facts, and have them at the same line.
    return given_facts(
        [replace(f, id=f"{one.source}:{f.line}", line=0) for one in sets for f in one]
    )


def _questions(fact: Fact, asked: Asked) -> list[Question]:
    if asked == "prompts":
        return [fact.question]
    others = [one for one in (*fact.unrelated, *fact.neighbours) if one.answer is not None]
    return [fact.question, *fact.equivalents, *others]


def _split(facts: list[Fact], settings: FinetuneSettings) -> tuple[list[Fact], list[Fact]]:
    """Training and held-out facts: a subject is in one of them."""
    share = int(settings.validation * 10_000)
    held = [
        int(subject_hash(f"{settings.seed} {fact.subject or fact.prompt}"), 16) % 10_000 < share
        for fact in facts
    ]
    if settings.validation and (all(held) or not any(held)):
        raise MalmendError(
            f"{counted(len(facts), 'fact')} cannot be split to hold some out for validation; give "
            "more, or --validation 0."
        )
    return (
        [fact for fact, is_held in zip(facts, held, strict=True) if not is_held],
        [fact for fact, is_held in zip(facts, held, strict=True) if is_held],
    )


def _digest(facts: Sequence[Fact], asked: Asked, base: LoadedModel, encoder: Encoder) -> str:
    """Of all that labels, order and split depend on, and of the weights that are begun with."""
    rows = [
        (fact.subject, [(q.prompt, q.answer) for q in _questions(fact, asked)]) for fact in facts
    ]
    read_as = (encoder.end_of_answer, encoder.reading, tokens_digest(base.tokenizer))
    return hashlib.sha256(repr((base.name, bits(base.model), read_as, rows)).encode()).hexdigest()


def _put(loaded: LoadedModel, folder: Path, about: dict[str, Any]) -> None:
    """The model in its folder: written beside, moved in whole, its configuration last.

    Raises:
        MalmendError: it cannot be written; the checkpoint is left.
    """
    beside = part_of(folder / "model")
    try:
        save_model(loaded, beside)
        (beside / "finetune.json").write_text(json.dumps(about, indent=2, allow_nan=False))
        synced(beside)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
            path.rename(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise MalmendError(
            f"The model in {folder} cannot be written ({reason(error)}); make room, and the same "
            "command goes on from its last epoch."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
