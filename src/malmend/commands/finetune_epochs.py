"""The epochs of a fine-tuning and the checkpoint after each, from which another run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from malmend.editors.resuming import moments_of, state_with
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded
from malmend.files import reason, written_beside
from malmend.models.finetune import EpochRecord, Finetuner, FinetuneSettings
from malmend.models.load import LoadedModel
from malmend.progress import Progress

CHECKPOINT = "finetuning.safetensors"


class Epochs:
    """The epochs of both phases, with a checkpoint after each."""

    def __init__(
        self,
        folder: Path,
        settings: FinetuneSettings,
        data: str,
        progress: Progress,
        stepped: Callable[[EpochRecord], None],
    ):
        self.path, self.settings, self.progress = folder / CHECKPOINT, settings, progress
        self.stepped, self.records = stepped, list[EpochRecord]()
        # More epochs may be asked for later.
        self.about = {"settings": {**asdict(settings), "epochs": None}, "data": data}
        if self.path.is_file():
            self._read()

    def train(
        self,
        loaded: LoadedModel,
        questions: list[Encoded],
        judged: list[Encoded],
        phase: str,
        epochs: int,
    ) -> None:
        """Runs one phase to its end, from where the checkpoint left it."""
        stage = {"choice": "choosing the epochs", "all": "fine-tuning on everything"}[phase]
        trainer = Finetuner(
            loaded.model, questions, judged, self.settings, phase, lambda s: self.progress(stage, s)
        )
        done = [record for record in self.records if record.phase == phase]
        if done and self.records[-1].phase == phase:
            self._restore(trainer, done[-1].epoch)
        while not self._ends(done, phase, epochs):
            record = trainer.take_epoch()
            done.append(record)
            self.records.append(record)
            self._save(trainer)
            self.stepped(record)
        loaded.model.requires_grad_(False)

    def _ends(self, done: list[EpochRecord], phase: str, epochs: int) -> bool:
        if len(done) >= epochs:
            return True
        if phase == "choice":
            over = any(record.phase == "all" for record in self.records)  # it stays made
            return over or (bool(done) and len(done) - best_epoch(done) >= self.settings.patience)
        return (
            not self.settings.validation and bool(done) and done[-1].accuracy >= self.settings.until
        )

    def _save(self, trainer: Finetuner) -> None:
        tensors = {f"model.{name}": t for name, t in trainer.model.state_dict().items()}
        tensors |= moments_of(trainer.optimiser)
        # Copies, for tied weights are one tensor under two names, which the format refuses.
        tensors = {name: one.to("cpu", copy=True).contiguous() for name, one in tensors.items()}
        what = {**self.about, "records": [asdict(record) for record in self.records]}
        with written_beside(self.path) as beside:
            save_file(tensors, beside, {"finetuning": json.dumps(what)})

    def _read(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                what = json.loads(file.metadata()["finetuning"])
            self.records = [EpochRecord(**row) for row in what["records"]]
        except Exception as error:
            raise self._damaged(error) from error
        for name, wanted in self.about.items():
            if what.get(name) != wanted:
                raise MalmendError(
                    f"{self.path} is of other {name}; give the same, or another --out."
                )
        taken = max((record.epoch for record in self.records), default=0)
        if taken > self.settings.epochs:
            raise MalmendError(
                f"{self.path} took {taken} epochs, {self.settings.epochs} "
                f"{'is' if self.settings.epochs == 1 else 'are'} asked for; ask for as many or "
                "more, or give another --out."
            )

    def _damaged(self, error: Exception) -> MalmendError:
        return MalmendError(f"{self.path} is damaged ({reason(error)}); remove it to start again.")

    def _restore(self, trainer: Finetuner, epoch: int) -> None:
        try:
            tensors = load_file(self.path)
            # A parameter that no gradient reaches has no moments; the file does not say which.
            state = state_with(trainer.optimiser, tensors, None)
            weights = {name.removeprefix("model."): one for name, one in tensors.items()}
            trainer.model.load_state_dict(weights)
            trainer.optimiser.load_state_dict(state)
        except Exception as error:
            raise self._damaged(error) from error
        trainer.epoch = epoch


def best_epoch(records: Sequence[EpochRecord]) -> int:
    """The epoch of highest accuracy, the first of several."""
    chosen = [record for record in records if record.phase == "choice"]
    return max(chosen, key=lambda record: (record.accuracy, -record.epoch)).epoch
