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

What stands under a method's name are its settings: of the method, or of an editor without a network
(``malmend.EditorSettings``), or of its solves and what follows them (``editors/refine.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from malmend.bench.context import InContext
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorMethod, EditorSettings
from malmend.errors import MalmendError, bad_value, nearest
from malmend.methods.method import Method
from malmend.methods.table import METHODS
from malmend.methods.trained import TRAINED, check_trained

Protocol = Literal["together", "alone"]
EDITORS = get_args(EditorMethod)
OF_CELL = ("method", "class", "editor", "most")  # beside a method's own settings


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


@dataclass(frozen=True)
class Way:
    """How a cell is edited: the words of :func:`malmend.edit`; or facts in prompts instead."""

    editor: str = "auto"
    settings: EditorSettings | None = None
    method: Method | None = None
    refine: RefineSettings = RefineSettings()
    context: InContext | None = None


def way_of(name: str, given: Mapping[str, Any]) -> Way:
    """A method's settings put together.

    Raises:
        MalmendError: no such method, class or setting, or a value that makes no sense.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise MalmendError(f"The plan's method {name!r} is {given!r}, expected settings by name.")
    if not isinstance(given.get("most", 1), int) or given.get("most", 1) < 1:
        raise MalmendError(
            f"The plan's method {name!r} has most {given['most']!r}, expected a number of facts."
        )
    own = {key: value for key, value in given.items() if key not in OF_CELL}
    known = [*EDITORS, *METHODS, *TRAINED, "context"]
    if name not in known and not own and not {"method", "class", "editor"} & set(given):
        raise MalmendError(
            f"The plan's method {name!r} is none of {', '.join(known)}"
            f"{nearest(name, known) or '.'} Under a name of your own say what it is: method, "
            "class, editor, or settings of an editor without a network or of its solves."
        )
    method = str(given.get("method", name if name in known else "malmen"))
    if named_method(name, given) and "class" not in given and _has_folder(given):
        method = "malmen"  # the folder says its own
    if method in TRAINED and "class" not in given:
        raise MalmendError(
            f"The plan's method {name!r} is trained before it edits; run `malmend train --method "
            f"{method}` and give the folder that it writes as its editor."
        )
    if "editor" in given and (method not in EDITORS or "class" in given):
        raise MalmendError(
            f"The plan's method {name!r} takes no editor; leave editor out, or leave out what "
            "names another method."
        )
    if "class" in given:
        return Way(method=_made(name, _imported(name, given["class"]), own))
    if method in METHODS:
        return Way(method=_made(name, METHODS[method], own))
    if method == "context":
        return Way(context=_made(name, InContext, own))
    if "editor" not in given:
        check_trained(method)
    if method not in EDITORS:
        raise MalmendError(
            f"The plan's method {name!r} is {method!r}, expected one of {', '.join(known)}, or a "
            f"class of your own{nearest(str(method), known) or '.'}"
        )
    solves = {one.name for one in fields(RefineSettings)}
    refine = _made(name, RefineSettings, {k: v for k, v in own.items() if k in solves})
    rest = {key: value for key, value in own.items() if key not in solves}
    editor = str(given.get("editor") or "auto")
    if not rest and method == "malmen":
        return Way(editor=editor, refine=refine)
    if editor not in ("auto", "none"):
        raise MalmendError(
            f"The plan's method {name!r} names an editor, which brings its own settings; leave out "
            f"{', '.join(sorted(rest))}."
        )
    settings = _made(name, EditorSettings, {"method": method, **rest}, {"network"}, solves)
    settings = replace(settings, network=NetworkSettings(blocks=0))
    return Way(editor="none", settings=settings, refine=refine)


def named_method(name: str, given: Mapping[str, Any]) -> str | None:
    """What the plan says an editor's folder holds; None where it does not say."""
    method = given.get("method", name)
    return method if method in (*EDITORS, *TRAINED) else None


def _has_folder(given: Mapping[str, Any]) -> bool:
    return str(given.get("editor") or "auto") not in ("auto", "none")


def _made(
    name: str,
    kind: Any,
    values: Mapping[str, Any],
    skip: Collection[str] = (),
    also: Collection[str] = (),
) -> Any:
    """A settings class with these values, each of its kind, by jsonargparse.

    ``skip`` names what cannot be given, ``also`` what can be given beside.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    valid = [one.name for one in fields(kind) if one.name not in skip]
    for key in values:
        if key not in valid:
            known = [*valid, *sorted(also)]
            raise MalmendError(
                f"The plan's method {name!r} has no setting {key!r}{nearest(key, known) or '.'} "
                f"It has {', '.join(known)}, and {', '.join(OF_CELL)}."
            )
    for one in fields(kind):  # which the parser would leave to the dataclass
        if one.name in values and values[one.name] is None and "None" not in str(one.type):
            raise MalmendError(f"The plan's method {name!r} cannot be made: {one.name} is empty.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "settings", skip=set(skip), fail_untyped=False)
    try:
        return parser.instantiate(parser.parse_object({"settings": dict(values)})).settings
    except MalmendError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError, RecursionError) as error:
        said = " ".join(str(error).split())[:300]
        raise MalmendError(f"The plan's method {name!r} cannot be made: {said}.") from error


def _imported(name: str, path: object) -> Any:
    """A class by ``module:Name``, the working folder's modules included."""
    module, _, attribute = str(path).partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not is_dataclass(found) or not isinstance(found, type):
            raise ValueError(f"{attribute} is no dataclass")
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise MalmendError(
            f"The plan's method {name!r} has the class {path!r}, which cannot be imported "
            f"({error}); give module:Name, the module in this folder or installed."
        ) from error


def source_of(path: object) -> Path | None:
    """The file that a class by ``module:Name`` stands in."""
    file = getattr(importlib.import_module(str(path).partition(":")[0]), "__file__", None)
    return None if file is None else Path(file)


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
    from jsonargparse import ArgumentError, ArgumentParser

    methods = given.get("methods")
    if isinstance(methods, list):  # names alone
        given["methods"] = {str(name): {} for name in methods}
    if isinstance(given.get("methods"), dict):  # "malmen:" without settings is None
        given["methods"] = {str(k): {} if v is None else v for k, v in given["methods"].items()}
    if empty := [str(key) for key, value in given.items() if value is None]:
        raise MalmendError(f"The plan {path} cannot be used: {', '.join(empty)} is left empty.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan, "plan", fail_untyped=False)
    try:
        plan: Plan = parser.instantiate(parser.parse_object({"plan": given})).plan
    except MalmendError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError, RecursionError) as error:
        said = " ".join(str(error).split())
        said = bad_value(said, lambda name: name.removeprefix("plan.")) or said[:300].rstrip(".")
        raise MalmendError(f"The plan {path} cannot be used: {said}.") from error
    return plan
