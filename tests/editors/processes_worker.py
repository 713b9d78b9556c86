"""One process of a run of several; started by test_processes.py.

python processes_worker.py FOLDER CASE [STEPS [DIES_AFTER]]
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_training import EDITOR, SETTINGS, trainer_of

from malmend.editors.settings import EditorSettings
from malmend.processes import ALONE, Processes, joined

# Seven facts among two processes are four and three; the prior, and the sum that has none.
CASES: dict[str, EditorSettings] = {
    "malmen": EDITOR,
    "identity": replace(EDITOR, prior="identity"),
    "mend": replace(EDITOR, method="mend"),
    "mend-single": replace(EDITOR, method="mend-single"),
}
STEPS = 3


def trained(case: str, processes: Processes = ALONE, folder: Path | None = None, dies: int = -1):
    """The trainer after its steps, and the losses that its records say."""
    settings = replace(SETTINGS, facts_per_step=7, steps=STEPS)
    trainer = trainer_of(settings, CASES[case], dtype=torch.float64, processes=processes)
    if folder is not None and (folder / "training.safetensors").is_file():
        trainer.resume(folder)
    losses = []
    for record in trainer.run():
        losses.append((record.step, record.loss, record.grad_norm))
        if folder is not None and processes.is_first:
            trainer.save(folder, {})
        if record.step == dies and not processes.is_first:
            os._exit(9)
    return trainer, losses


def main() -> None:
    """Trains, and leaves what each process ended with."""
    folder, case, *rest = sys.argv[1:]
    dies = int(rest[0]) if rest else -1
    with joined() as processes:
        keeps = Path(folder) if dies > 0 else None
        trainer, losses = trained(case, processes, keeps, dies)
        state = {name: tensor.contiguous() for name, tensor in trainer.editor.state_dict().items()}
        state["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_file(state, Path(folder) / f"{processes.rank}.safetensors")


if __name__ == "__main__":
    main()
