"""Correct thousands of facts in a language model at once, and take any correction back.

The commands of the command line are functions with the same words::

    import malmend

    result = malmend.edit("smollm2-135m", "facts.jsonl", out="patch.safetensors")
    report = malmend.eval("smollm2-135m", "facts.jsonl", patch="patch.safetensors")

    loaded = malmend.load_model("smollm2-135m")
    with malmend.applied(loaded, malmend.load_patch("patch.safetensors")) as model:
        ...  # the edited model; afterwards the weights are bit for bit what they were
"""

from importlib.metadata import version

from malmend.commands.ask import AskResult, ask
from malmend.commands.demo import DemoResult, demo
from malmend.commands.edit import EditResult, edit
from malmend.commands.evaluate import evaluate
from malmend.commands.evaluate import evaluate as eval
from malmend.commands.inspect import Inspection, inspect
from malmend.commands.train import TrainResult, train
from malmend.editors.editor import EditorSettings, published, training_free
from malmend.editors.network import NetworkSettings
from malmend.editors.training import TrainSettings, published_training
from malmend.errors import EditorError, FactsError, MalmendError, ModelError, PatchError
from malmend.evaluation.report import Report
from malmend.facts.fact import Fact, FactSet, Question
from malmend.facts.readers import read_facts
from malmend.models.capture import Descent
from malmend.models.load import LoadedModel, load_model, prepared
from malmend.patch import Patch, applied, load_patch, save_patch

__version__ = version("malmend")

__all__ = [
    "AskResult",
    "DemoResult",
    "Descent",
    "EditResult",
    "EditorError",
    "EditorSettings",
    "Fact",
    "FactSet",
    "FactsError",
    "Inspection",
    "LoadedModel",
    "MalmendError",
    "ModelError",
    "NetworkSettings",
    "Patch",
    "PatchError",
    "Question",
    "Report",
    "TrainResult",
    "TrainSettings",
    "applied",
    "ask",
    "demo",
    "edit",
    "eval",
    "evaluate",
    "inspect",
    "load_model",
    "load_patch",
    "prepared",
    "published",
    "published_training",
    "read_facts",
    "save_patch",
    "train",
    "training_free",
]
