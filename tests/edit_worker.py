"""An edit of seven facts, by one process or by one of several; see test_processes_command.py.

python edit_worker.py FOLDER METHOD

In float64: descents stop at thresholds, so that in float32 a rounding that differs between
micro-batches, of seven facts or of four, may be one step more, and further passes make it grow.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from unittest import mock

import command_support
import helpers
import malmend
import tiny
from malmend import material
from malmend.commands import edit as edit_module
from malmend.commands.edit import EditResult
from malmend.editors import draws, settle
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import training_free
from malmend.models.load import prepared
from malmend.processes import ALONE, Processes, joined


def edited(method: str, folder: Path, processes: Processes = ALONE) -> EditResult:
    """Of four facts and three, where there are two processes; malmen's further passes too."""
    tokenizer = helpers.byte_level()
    model = command_support.make_model(tokenizer).double()
    model.__class__ = tiny.in_float64(type(model))
    text = " ".join(command_support.name_of(random.Random(2)) for _ in range(400))
    (folder / f"text-{processes.rank}.txt").write_text(text)
    asked = command_support.as_lines(command_support.make_facts(12, seed=1))
    (folder / f"calibrate-{processes.rank}.jsonl").write_text(asked)
    few = mock.patch.multiple(draws, READINGS=5, HELD_EACH=3, FEWEST=2)  # steps by all readings
    whole = mock.patch.object(settle, "START", 1.0)  # so few do not bring back the other half
    with few, whole:
        return _edited(prepared(model, tokenizer, "tiny"), method, folder, processes)


def _edited(loaded, method: str, folder: Path, processes: Processes) -> EditResult:
    return malmend.edit(
        loaded,
        command_support.make_facts(7),
        folder / "patch",
        settings=training_free(method),
        calibrate=folder / f"calibrate-{processes.rank}.jsonl",
        text=folder / f"text-{processes.rank}.txt",
        calibration=command_support.CALIBRATION,
        # more passes make rounding grow
        refine=RefineSettings(passes=2, frames=("Say {prompt}",), rounds=1.0),
        processes=processes,
    )


def noted(what, name):
    """The function, which says each time that it is called."""

    def noting(*given):
        print(name, file=sys.stderr)
        return what(*given)

    return noting


if __name__ == "__main__":
    place = Path(sys.argv[1])
    os.environ["MALMEND_CACHE"] = str(place / "cache")
    material.calibrate = noted(material.calibrate, "CALIBRATES")
    edit_module.save_patch = noted(edit_module.save_patch, "WRITES")
    with joined() as among:
        edited(sys.argv[2], place, among)
