"""The file of a training run: what going on needs, written whole, and read back whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from malmend.errors import EditorError
from malmend.facts.fact import Fact, Question, subject_hashes, training_digests
from malmend.files import written_beside
from malmend.models.device import places_of
from malmend.models.identity import tokens_digest
from malmend.models.load import LoadedModel

FILE = "training.safetensors"
AGAIN = "give another --out to train from the start"  # where a file is damaged
FREE = ("steps", "save_every")  # settings that a run may be resumed under others of


def save_training(state: Mapping[str, Tensor], about: Mapping[str, Any], folder: Path) -> None:
    """Writes what resuming needs: optimiser state as tensors, the rest as JSON in the header."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {"threads": torch.get_num_threads(), **about}
    header = {"training": json.dumps(said, allow_nan=False)}
    with written_beside(folder / FILE) as beside:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in state.items()}, beside, header
        )


def read_training(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`save_training` wrote, the JSON first; what a bad file raises is not caught."""
    with safe_open(path, framework="pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["training"])
        return about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def moments_of(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as tensors, named ``optimiser.INDEX.NAME`` by parameter and kind."""
    found = optimiser.state_dict()["state"].items()
    return {
        f"optimiser.{index}.{name}": tensor
        for index, state in found
        for name, tensor in state.items()
    }


def state_with(
    optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], wanted: Sequence[int] | None
) -> dict[str, Any]:
    """What the optimiser loads to go on with the moments among the tensors, which are taken out.

    Args:
        optimiser: of the same parameters; stays as it is.
        tensors: with those of :func:`moments_of`.
        wanted: the parameters that have moments; None where a file does not say, but some do.

    Raises:
        ValueError: a part is missing, of another shape, or no moment's; without this check Adam
            would begin anew in silence.
    """
    state = dict[int, dict[str, Tensor]]()
    for key in [key for key in tensors if key.startswith("optimiser.")]:
        _, index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensors.pop(key)
    every = [one for group in optimiser.param_groups for one in group["params"]]
    _check_moments(state, every, wanted)
    return {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}


def run_of(
    loaded: LoadedModel, facts: Sequence[Fact], locality: Sequence[Question]
) -> dict[str, Any]:
    """What is said of a run: versions, its model, where that is, and what it is trained on."""
    return {
        "malmend": version("malmend"),
        "torch": version("torch"),
        "model": loaded.name,
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "device": places_of(loaded.model),
        "tokenizer": tokens_digest(loaded.tokenizer),
        "facts": len(facts),
        **training_digests(facts, locality),
        "subjects": subject_hashes(facts),
    }


def check_run(said: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises EditorError where a run was of another model or on other facts than :func:`run_of`."""
    parts: tuple[tuple[str, str], ...] = (
        ("base", "model"),
        ("dtype", "numbers (dtype)"),
        ("facts_sha256", "facts"),
        ("locality_sha256", "locality questions"),
    )
    later = (
        ("tokenizer", "tokenizer files"),
        ("calibration_sha256", "calibration facts, text or settings"),
    )
    parts += tuple(part for part in later if part[0] in said)  # older runs lack them
    for name, what in parts:
        if said.get(name) != now.get(name):
            raise EditorError(
                f"{folder} holds an editor in training on other {what}; give the same {what} "
                "to go on with it, or another --out."
            )


def rounds_otherwise(said: Mapping[str, Any], device: str) -> Iterator[str]:
    """Sentences on what makes the numbers differ, where a run goes on elsewhere."""
    threads = torch.get_num_threads()
    if said.get("threads", threads) != threads:
        yield (
            f"This run used {said['threads']} threads and resumes on {threads}: its "
            f"numbers will differ by rounding; set OMP_NUM_THREADS={said['threads']} for the same."
        )
    if said.get("device", device) != device:
        yield (
            f"This run was on {said['device']} and resumes on {device}: its "
            "numbers will differ by rounding."
        )


def check_same(about: Mapping[str, Any], mine: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raises EditorError where a run was of other settings than this."""
    for part, wanted in json.loads(json.dumps(mine)).items():
        for name, value in wanted.items():
            if name not in FREE and about[part].get(name) != value:
                raise EditorError(
                    f"{path} was trained with {name} = {about[part].get(name)!r}, now "
                    f"{value!r} is asked for; give the same settings, or another --out."
                )


def _check_moments(
    state: Mapping[int, Mapping[str, Tensor]], every: Sequence[Tensor], wanted: Sequence[int] | None
) -> None:
    """Raises ValueError unless Adam's state is one of these parameters, and all of it."""
    if not state if wanted is None else sorted(state) != list(wanted):
        raise ValueError("it lacks a part of the optimiser's state")
    for index, found in state.items():
        if set(found) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimiser's state {index} lacks a moment, or has others")
        for name, tensor in found.items():
            shape = torch.Size() if name == "step" else every[index].shape
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"the optimiser's {name} {index} is of another shape")
            if not tensor.isfinite().all() or (name != "exp_avg" and (tensor < 0).any()):
                raise ValueError(f"the optimiser's {name} {index} is negative, NaN or infinite")
