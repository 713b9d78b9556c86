"""Correct thousands of facts in a language model at once, and take any correction back.

The commands of the command line, but for bench, finetune and continuations, are functions with the
same words::

    import malmend

    result = malmend.edit("smollm2-135m", "facts.jsonl", out="patch.safetensors")
    report = malmend.eval("smollm2-135m", "facts.jsonl", patch="patch.safetensors")
    malmend.export("patch.safetensors", "adapter", to="lora")

    loaded = malmend.load_model("smollm2-135m")
    with malmend.applied(loaded, malmend.load_patch("patch.safetensors")) as model:
        ...  # the edited model; afterwards the weights are bit for bit what they were
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from malmend import ledger as ledger
    from malmend.commands.ask import AskResult as AskResult
    from malmend.commands.ask import ask as ask
    from malmend.commands.cache import CacheResult as CacheResult
    from malmend.commands.cache import cache as cache
    from malmend.commands.conflicts import ConflictsResult as ConflictsResult
    from malmend.commands.conflicts import conflicts as conflicts
    from malmend.commands.demo import DemoResult as DemoResult
    from malmend.commands.demo import demo as demo
    from malmend.commands.diff import DiffResult as DiffResult
    from malmend.commands.diff import diff as diff
    from malmend.commands.edit import EditResult as EditResult
    from malmend.commands.edit import edit as edit
    from malmend.commands.evaluate import evaluate as evaluate
    from malmend.commands.export import ExportResult as ExportResult
    from malmend.commands.export import export as export
    from malmend.commands.inspect import Inspection as Inspection
    from malmend.commands.inspect import inspect as inspect
    from malmend.commands.push import push as push
    from malmend.commands.train import TrainResult as TrainResult
    from malmend.commands.train import train as train
    from malmend.editors.network import NetworkSettings as NetworkSettings
    from malmend.editors.settings import EditorSettings as EditorSettings
    from malmend.editors.settings import published as published
    from malmend.editors.settings import training_free as training_free
    from malmend.editors.train_settings import TrainSettings as TrainSettings
    from malmend.editors.train_settings import published_training as published_training
    from malmend.errors import EditorError as EditorError
    from malmend.errors import FactsError as FactsError
    from malmend.errors import LedgerError as LedgerError
    from malmend.errors import MalmendError as MalmendError
    from malmend.errors import ModelError as ModelError
    from malmend.errors import PatchError as PatchError
    from malmend.evaluation.report import Report as Report
    from malmend.facts.fact import Fact as Fact
    from malmend.facts.fact import FactSet as FactSet
    from malmend.facts.fact import Question as Question
    from malmend.facts.readers import read_facts as read_facts
    from malmend.models.descent import Descent as Descent
    from malmend.models.load import LoadedModel as LoadedModel
    from malmend.models.load import load_model as load_model
    from malmend.models.load import prepared as prepared
    from malmend.patch import Patch as Patch
    from malmend.patch import applied as applied
    from malmend.patch_file import load_patch as load_patch
    from malmend.patch_file import save_patch as save_patch

# Loaded on first use, so that `malmend --help` does not wait for torch.
_HOME = {
    "commands.ask": ("AskResult", "ask"),
    "commands.cache": ("CacheResult", "cache"),
    "commands.conflicts": ("ConflictsResult", "conflicts"),
    "commands.demo": ("DemoResult", "demo"),
    "commands.diff": ("DiffResult", "diff"),
    "commands.edit": ("EditResult", "edit"),
    "commands.evaluate": ("evaluate",),
    "commands.export": ("ExportResult", "export"),
    "commands.inspect": ("Inspection", "inspect"),
    "commands.push": ("push",),
    "commands.train": ("TrainResult", "train"),
    "editors.settings": ("EditorSettings", "published", "training_free"),
    "editors.network": ("NetworkSettings",),
    "editors.train_settings": ("TrainSettings", "published_training"),
    "errors": (
        "EditorError",
        "FactsError",
        "LedgerError",
        "MalmendError",
        "ModelError",
        "PatchError",
    ),
    "evaluation.report": ("Report",),
    "facts.fact": ("Fact", "FactSet", "Question"),
    "facts.readers": ("read_facts",),
    "models.descent": ("Descent",),
    "models.load": ("LoadedModel", "load_model", "prepared"),
    "patch": ("Patch", "applied"),
    "patch_file": ("load_patch", "save_patch"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

# A module whose functions are the words of one command: malmend.ledger.add(...)
__all__ = ["__version__", "eval", "ledger", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("malmend")
    if name == "ledger":
        return importlib.import_module("malmend.ledger")
    known = "evaluate" if name == "eval" else name  # the command line's word
    if known not in _MODULES:
        raise AttributeError(f"module 'malmend' has no attribute {name!r}")
    return getattr(importlib.import_module(f"malmend.{_MODULES[known]}"), known)


def __dir__() -> list[str]:
    return sorted(__all__)
