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

What may stand under a method's name: planned_method.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from malmend.bench.planned_method import planned_method
from malmend.errors import MalmendError, nearest
from malmend.facts.entry import short
from malmend.files import reason
from malmend.given import faults as type_faults
from malmend.yaml_file import Fault, read_yaml, refused

Protocol = Literal["together", "alone"]
NEEDED = ("models", "facts", "methods")
EXPECTED = {
    "models": "a list of models' names, folders or GGUF files",
    "facts": "a facts file",
    "methods": "methods by name, each with its settings, or a list of names, each once",
    "sizes": "a list of numbers of facts",
    "seeds": "a list of whole numbers",
    "protocols": "a list of 'together' and 'alone'",
}
LEAST = {"sizes": 1, "decode": 0}


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
        if faults := [what for _, what in _faults(vars(self))]:
            raise MalmendError("\n".join(["The plan cannot be used:", *faults]))

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
        MalmendError: no such file, no YAML, or with every field that is missing, unknown, empty or
            of another kind.
    """
    path = Path(path)
    try:
        given, lines = read_yaml(path)
    except OSError as error:
        why = f" ({reason(error)})" if path.exists() else ""
        raise MalmendError(f"There is no plan {path} to be read{why}; give a YAML file.") from error
    if not isinstance(given, dict):
        raise MalmendError(
            f"The plan {path} holds no fields, expected {', '.join(NEEDED)}; give these at least."
        )
    given = {str(name): value for name, value in given.items()}
    if isinstance(methods := given.get("methods"), dict):  # "malmen:" without settings is None
        given["methods"] = {str(k): {} if v is None else v for k, v in methods.items()}
    elif isinstance(methods, list) and len(set(map(str, methods))) == len(methods):  # names alone
        given["methods"] = {str(name): {} for name in methods}
    if faults := list(_faults(given)):
        raise refused(f"The plan {path} cannot be used", path, lines, faults)
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in given.items()
    }
    return Plan(**values)


def _faults(given: Mapping[str, Any]) -> Iterator[Fault]:
    """Everything that is wrong with a plan's fields, and where; each says at its end what to do."""
    hints = get_type_hints(Plan)
    for name in (one for one in given if one not in hints):
        hint = nearest(name, hints) or f"; valid are {', '.join(hints)}"
        yield (name,), f"unknown field {name!r}{hint}"
    for name, hint in hints.items():
        value = given.get(name)
        if name not in given and name in NEEDED:
            yield (name,), f"{name} is missing; give {EXPECTED[name]}"
        elif name in given and value is None:
            yield (name,), f"{name} is left empty; give a value{_or_none(name)}"
        elif name in given and name == "methods":
            yield from _method_faults(value)
        elif name in given and get_origin(hint) is tuple:
            yield from _list_faults(name, value, get_args(hint)[0])
        elif name in given:
            yield from (((name,), what) for what in _kind(name, value, hint))


def _list_faults(name: str, values: object, hint: Any) -> Iterator[Fault]:
    if not isinstance(values, list | tuple) or not values:
        said = short(values) if values else "empty"
        yield (name,), f"{name} is {said}; give {EXPECTED[name]}{_or_none(name)}"
        return
    for index, value in enumerate(values):
        at = f"{name}[{index + 1}]"
        wrong = list(_kind(at, value, hint))
        if not wrong and (first := list(values).index(value)) < index:
            wrong = [f"{at} is {short(value)}, as {name}[{first + 1}] is; leave one out"]
        yield from (((name, index), what) for what in wrong)


def _kind(name: str, value: object, hint: Any) -> Iterator[str]:
    """What is wrong with one value, in words."""
    least = LEAST.get(name.partition("[")[0])
    wrong = type_faults({name: value}, {name: hint})
    if not wrong and least is not None and cast(int, value) < least:
        wrong = [f"{name} is {value}, expected a whole number"]
    if value == "":
        wrong = [f"{name} is an empty text"]
    more = "" if least is None else f" of at least {least}"
    yield from (f"{what}{more}; give one{_or_none(name)}" for what in wrong)


def _or_none(name: str) -> str:
    """What else can be done with a field, or an item of one, that is wrong."""
    if "[" in name:
        return ", or leave it out"
    return "" if name in NEEDED else ", or leave the field out"


def _method_faults(methods: object) -> Iterator[Fault]:
    if not isinstance(methods, Mapping) or not methods:
        said = short(methods) if methods else "empty"
        yield ("methods",), f"methods is {said}; give {EXPECTED['methods']}"
        return
    for name, given in methods.items():
        while (refusal := _refused(name, given)) is not None:
            # The setting without which that is not said is wrong; what else is, is seen without it.
            known = given if isinstance(given, Mapping) else {}
            rests = {key: {k: v for k, v in given.items() if k != key} for key in known}
            wrong = next((key for key in rests if _refused(name, rests[key]) != refusal), None)
            yield ("methods", name, *([] if wrong is None else [str(wrong)])), refusal
            if wrong is None or wrong in ("method", "class", "editor") or not rests[wrong]:
                break
            given = rests[wrong]


def _refused(name: str, given: Any) -> str | None:
    """Why a method cannot be made, as a line of faults, and what to do."""
    try:
        planned_method(name, given)
    except MalmendError as error:
        said = str(error).removesuffix(".")
    else:
        return None
    if said.startswith("The plan's "):
        said = said.removeprefix("The plan's ")
    else:  # a class of settings says nothing of the plan
        said = f"method {name!r}: {said}"
    # Valid names at the end, in a sentence of their own, are an advice too.
    return said if re.search("; |[.?] ", said) else f"{said}; correct it, or leave it out"
