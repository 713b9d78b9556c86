"""How trainings look in a terminal; the rest is in show.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape

from malmend.cli.show import ERR, OUT, peak
from malmend.commands.finetune import FinetuneResult
from malmend.commands.train import TrainResult
from malmend.editors.training import StepRecord
from malmend.errors import counted
from malmend.models.finetune import EpochRecord


def step(record: StepRecord, steps: int) -> None:
    """One line per training step."""
    ERR.print(
        f"step {record.step:>4}/{steps}  loss {record.loss:.4f}  "
        f"generality {record.gen:.4f}  locality {record.loc:.4f}  "
        f"gradient {record.grad_norm:.3g}  eta {record.eta:.3g}  {record.seconds:.1f} s",
        soft_wrap=True,
    )


def already(steps: int) -> str:
    """That a run which is gone on with has nothing left to do."""
    return f"Trained already: {counted(steps, 'step')} were taken; ask for more to go on."


def learning(record: Any, steps: int) -> None:
    """One line per step of a method that is no editor: every figure of its record."""
    figures = {name: value for name, value in vars(record).items() if name != "step"}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    ERR.print(f"step {record.step:>4}/{steps}  {shown}", soft_wrap=True)


def leaking(leaks: Sequence[str]) -> None:
    """A warning where questions beside facts are edited too."""
    if leaks:
        verb = "is" if len(leaks) == 1 else "are"
        OUT.print(
            f"{counted(len(leaks), 'question')} beside facts {verb} edited or answered otherwise "
            "too; the first:"
        )
        OUT.print(f"  {escape(leaks[0])}")


def trained(result: TrainResult) -> None:
    """Where the editor lies and how the loss went."""
    leaking(result.leaks)
    first, last = result.records[0], result.records[-1]
    OUT.print(
        f"Trained {counted(last.step, 'step')}: meta-loss {first.loss:.3f} at the first, "
        f"{last.loss:.3f} at the last.  Editor: {escape(str(result.folder))}"
    )
    if result.peak is not None:
        peak(result.peak)


def epoch(record: EpochRecord) -> None:
    """One line per epoch of fine-tuning."""
    judged = "held out" if record.phase == "choice" else "learned"
    ERR.print(
        f"epoch {record.epoch:>3}  loss {record.loss:.4f}  right of what is {judged} "
        f"{record.accuracy:.3f}  {record.seconds:.0f} s",
        soft_wrap=True,
    )


def finetuned(result: FinetuneResult) -> None:
    """Where the model lies and how much it knows."""
    last = result.records[-1]
    epochs = counted(last.epoch, "epoch")
    OUT.print(
        f"Fine-tuned on {result.questions:,} questions in {epochs}, of which the model "
        f"now answers {last.accuracy:.1%}.  Model: {escape(str(result.folder))}",
        soft_wrap=True,
    )
