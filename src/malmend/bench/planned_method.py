"""How a cell is edited: what stands under a method's name in a plan, put together.

These are settings of the method, or of an editor without a network (``malmend.EditorSettings``), or
of its solves and what follows them (``editors/refine.py``), beside what OF_CELL names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from malmend.bench.context import InContext
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorMethod, EditorSettings
from malmend.errors import MalmendError, bad_value, nearest
from malmend.files import reason
from malmend.methods.method import Method
from malmend.methods.table import METHODS
from malmend.methods.trained import TRAINED, check_trained

EDITORS = get_args(EditorMethod)
OF_CELL = ("method", "class", "editor", "most")  # beside a method's own settings


@dataclass(frozen=True)
class PlannedMethod:
    """How a cell is edited: the words of :func:`malmend.edit`; or facts in prompts instead."""

    editor: str = "auto"
    settings: EditorSettings | None = None
    method: Method | None = None
    refine: RefineSettings = RefineSettings()
    context: InContext | None = None


def planned_method(name: str, given: Mapping[str, Any]) -> PlannedMethod:
    """A method's settings put together.

    Raises:
        MalmendError: no such method, class or setting, or a value that makes no sense.
    """
    _check_kinds(name, given)
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
        return PlannedMethod(method=_made(name, _imported(name, given["class"]), own))
    if method in METHODS:
        return PlannedMethod(method=_made(name, METHODS[method], own))
    if method == "context":
        return PlannedMethod(context=_made(name, InContext, own))
    if "editor" not in given:
        check_trained(method)
    if method not in EDITORS:
        raise MalmendError(
            f"The plan's method {name!r} is {method!r}, expected one of {', '.join(known)}, or a "
            f"class of your own{nearest(str(method), known) or '.'}"
        )
    return _by_editor(name, given, own, method)


def _check_kinds(name: str, given: Mapping[str, Any]) -> None:
    """What a file may hold in place of settings."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise MalmendError(f"The plan's method {name!r} is {given!r}, expected settings by name.")
    if not isinstance(given.get("most", 1), int) or given.get("most", 1) < 1:
        raise MalmendError(
            f"The plan's method {name!r} has most {given['most']!r}, expected a number of facts."
        )


def _by_editor(
    name: str, given: Mapping[str, Any], own: Mapping[str, Any], method: str
) -> PlannedMethod:
    """A trained editor, or one without a network by its settings, and how it solves."""
    solves = {one.name for one in fields(RefineSettings)}
    refine = _made(name, RefineSettings, {k: v for k, v in own.items() if k in solves})
    rest = {key: value for key, value in own.items() if key not in solves}
    editor = str(given.get("editor") or "auto")
    if not rest and method == "malmen":
        return PlannedMethod(editor=editor, refine=refine)
    if editor not in ("auto", "none"):
        raise MalmendError(
            f"The plan's method {name!r} names an editor, which brings its own settings; leave out "
            f"{', '.join(sorted(rest))}."
        )
    settings = _made(name, EditorSettings, {"method": method, **rest}, {"network"}, solves)
    return PlannedMethod(editor="none", settings=settings, refine=refine)


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
    """A method's settings class with these values.

    ``skip`` names what cannot be given, ``also`` what can be given beside.
    """
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
    return made(kind, values, f"The plan's method {name!r} cannot be made", skip)


def made(kind: Any, values: Mapping[str, Any], refusal: str, skip: Collection[str] = ()) -> Any:
    """A settings class with these values, each of its kind, by jsonargparse.

    Raises:
        MalmendError: a value of another kind; begins with ``refusal``.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "given", skip=set(skip), fail_untyped=False)
    try:
        return parser.instantiate(parser.parse_object({"given": dict(values)})).given
    except MalmendError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError, RecursionError) as error:
        said = " ".join(str(error).split())
        said = bad_value(said, lambda name: name.removeprefix("given.")) or said[:300].rstrip(".")
        raise MalmendError(f"{refusal}: {said}.") from error


def _imported(name: str, path: object) -> Any:
    """A class by ``module:Name``, the working folder's modules included."""
    attribute = str(path).partition(":")[2]
    try:
        found = getattr(_module(path), attribute)
        if not is_dataclass(found) or not isinstance(found, type):
            raise ValueError(f"{attribute} is no dataclass")
        return found
    except Exception as error:  # whatever a person's own module raises
        raise MalmendError(
            f"The plan's method {name!r} has the class {path!r}, which cannot be imported "
            f"({reason(error)}); give module:Name, the module in this folder or installed."
        ) from error


def _module(path: object) -> ModuleType:
    """The module of a ``module:Name``."""
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(str(path).partition(":")[0])
    finally:
        if added:
            sys.path.remove("")


def source_of(path: object) -> Path | None:
    """The file that a class by ``module:Name`` stands in."""
    file = getattr(_module(path), "__file__", None)
    return None if file is None else Path(file)
