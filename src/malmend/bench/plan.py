"""A plan: which methods edit how many facts of a model, in which draws; and the cells it makes.

One YAML file::

    models: [smollm2-135m]
    facts: dev.json
    sizes: [16, 64, 256]
    seeds: [0, 1, 2]
    methods:
      malmen: {}                          # the shipped editor, where there is one
      paper: {editor: runs/paper}         # an editor that malmend train wrote
      one solve: {passes: 1}
      sum: {method: mend}
      ft: {}
      ft, 20 epochs: {method: ft, epochs: 20}
      memit: {most: 256}
      mine: {class: "mymodule:MyMethod", share: 0.3}

What may stand under a method's name: way.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from malmend.bench.way import made, way_of
from malmend.errors import MalmendError, nearest

Protocol = Literal["together", "alone"]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        models: names, folders or GGUF files.
        facts: a facts file.
        methods: by the name that tables give it, each with its settings.
        sizes: m, the facts edited.
        seeds: draws of the facts; those of a seed and a smaller m are among those of a larger.
        single_above: sizes above this take the first seed only.
        protocols: "together" for all facts at once, "alone" for each from the unedited model.
        alternative: edit towards false answers.
        away: of a classifier: edit away from what it says.
        decode: of so many facts of a cell the answers are free-running too.
        text: a text file for perplexity, or "none".
    """

    models: tuple[str, ...]
    facts: str
    methods: dict[str, dict[str, Any]]
    sizes: tuple[int, ...] = (16, 64, 256)
    seeds: tuple[int, ...] = (0,)
    single_above: int = 256
    protocols: tuple[Protocol, ...] = ("together",)
    alternative: bool = False
    away: bool = False
    decode: int = 0
    text: str = "none"

    def __post_init__(self) -> None:
        for name in ("models", "methods", "sizes", "seeds", "protocols"):
            if not getattr(self, name):
                raise MalmendError(f"The plan's {name} are empty, expected at least one.")
        if min(self.sizes) < 1:
            raise MalmendError(f"The plan's sizes hold {min(self.sizes)}, expected 1 or more.")
        if self.decode < 0:
            raise MalmendError(f"The plan's decode is {self.decode}, expected 0 or more.")
        for name, given in self.methods.items():
            way_of(name, given)

    def cells(self) -> Iterator[Cell]:
        """Every cell, small ones first, so that all methods are soon seen."""
        for model in self.models:
            for size in sorted(self.sizes):
                for seed in self.seeds if size <= self.single_above else self.seeds[:1]:
                    for protocol in self.protocols:
                        for name, given in self.methods.items():
                            if size <= given.get("most", size):
                                yield Cell(model, name, protocol, size, seed, given)


@dataclass(frozen=True)
class Cell:
    """One method on one draw."""

    model: str
    name: str
    protocol: Protocol
    size: int
    seed: int
    given: Mapping[str, Any] = field(hash=False)

    def key(self, *inputs: object) -> str:
        """Names the cell by all that its figures depend on; ``inputs`` are what it reads."""
        given = {name: value for name, value in self.given.items() if name != "most"}
        what = [self.model, self.name, self.protocol, self.size, self.seed, given, *inputs]
        said = json.dumps(what, sort_keys=True, default=str)
        return hashlib.sha256(said.encode()).hexdigest()[:24]


def read_plan(path: str | Path) -> Plan:
    """Reads a plan.

    Raises:
        MalmendError: no such file, no YAML, or a field that is missing, unknown or of another kind.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MalmendError(f"There is no plan {path} to be read; give a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise MalmendError(f"The plan {path} is no YAML ({said[:300]}).") from error
    if not isinstance(given, dict):
        raise MalmendError(f"The plan {path} holds no fields, expected models, facts and methods.")
    valid = [one.name for one in fields(Plan)]
    for key in given:
        if key not in valid:
            raise MalmendError(
                f"The plan {path} has a field {key!r}{nearest(str(key), valid) or '.'} "
                f"Expected {', '.join(valid)}."
            )
    return _checked(path, given)


def _checked(path: Path, given: dict[str, Any]) -> Plan:
    """The plan with every field of its kind, by jsonargparse."""
    methods = given.get("methods")
    if isinstance(methods, list):  # names alone
        given["methods"] = {str(name): {} for name in methods}
    if isinstance(given.get("methods"), dict):  # "malmen:" without settings is None
        given["methods"] = {str(k): {} if v is None else v for k, v in given["methods"].items()}
    if empty := [str(key) for key, value in given.items() if value is None]:
        raise MalmendError(f"The plan {path} cannot be used: {', '.join(empty)} is left empty.")
    plan: Plan = made(Plan, given, f"The plan {path} cannot be used")
    return plan
