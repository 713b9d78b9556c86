"""Options of commands: derived from functions and settings, parsed, and refused in one sentence.

Everything is by jsonargparse; here is only what it leaves: hyphens, switches that stand alone,
nested settings put together, and its errors in plain words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NoReturn, get_args

from malmend.errors import MalmendError, bad_value, nearest


def parser_of(command: str, what: str) -> Any:
    """A parser whose errors are ours and whose options are written with hyphens."""
    from jsonargparse import ArgumentParser
    from jsonargparse import DefaultHelpFormatter as Formatter

    class Hyphens(Formatter):
        def _format_action_invocation(self, action: Any) -> str:
            shown = super()._format_action_invocation(action)
            return re.sub(r"--[\w.]+", lambda found: found[0].replace("_", "-"), shown)

        def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
            usage = f"{self._prog} {_needed(actions)}[options]"
            return super()._format_usage(usage, actions, groups, prefix)

        def _expand_help(self, action: Any) -> str:
            said = re.sub(r"Union\[str, Path(, null)?\]", "path", super()._expand_help(action))
            said = re.sub(r"(?:Optional\[)?tuple\[(\w+), \.\.\.\]+", r"list of \1", said)
            # Choices stand before the help; what is null is not given, where no more is said of it.
            null = (
                [] if "null" in (action.help or "").lower() else [r" \| null", r", default: null"]
            )
            for left_out in (r"(, )?type: Literal\[.*?\]", *null):
                said = re.sub(left_out, "", said)
            return said.replace("(, ", "(")

    class Parser(ArgumentParser):
        def format_help(self, formatter: Any = None) -> str:
            # Docstrings are read in a terminal here: without roles, quotes and equations' numbers.
            plain = re.sub(
                r":(?:func|class|data|meth|attr):`~?(?:[\w.]+\.)?(\w+)`",
                r"\1",
                super().format_help(formatter),
            )
            plain = re.sub(r"\s+\((?:equations?\s)?\d\d?(?: (?:and|or) \d\d?)?\)", "", plain)
            return plain.replace("``", "")

        after_switches: dict[str, str]  # what follows switches that stand alone, with their names
        after_dashes: list[str]  # what follows a bare --, of which nothing is an option

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise MalmendError(_usage_error(command, message, self)) from ex

    parser = Parser(
        prog=f"malmend {command}",
        description=what,
        formatter_class=Hyphens,
        print_config=None,
        allow_abbrev=False,  # --limi would be taken for --limit, and never be mended
    )
    parser.after_switches, parser.after_dashes = {}, []
    return parser


def _needed(actions: Iterable[Any]) -> str:
    """What must be given, as a command line has it, each with a space behind it."""
    needed = ""
    for action in actions:
        if action.required:
            several = " ..." if action.nargs == "+" else ""
            needed += f"{' '.join([*action.option_strings, action.dest.upper()])}{several} "
    return needed


def derive(parser: Any, function: Callable[..., Any], skip: set[str]) -> None:
    """The function's own parameters as options, with its docstring as help."""
    parser.add_function_arguments(
        function, skip=skip | {"progress", "calibration"}, fail_untyped=False
    )


def add_editor(parser: Any) -> None:
    """``--editor``: which one edits."""
    parser.add_argument(
        "--editor",
        type=str,
        default="auto",
        help="an editor's folder; none; or auto, the one that is shipped for this model",
    )


def add_editor_settings(parser: Any, skip: Collection[str]) -> None:
    """The fields of EditorSettings as options."""
    from malmend.editors.settings import EditorSettings

    parser.add_class_arguments(EditorSettings, skip=set(skip))


def add_methods(parser: Any) -> None:
    """``--method``, and each method's settings under its name, as ``--ft.rate``."""
    from malmend.editors.settings import EditorMethod
    from malmend.methods.table import METHODS
    from malmend.methods.trained import TRAINED

    _add_method(parser, (*get_args(EditorMethod), *METHODS, *TRAINED), METHODS)


def add_trained(parser: Any) -> None:
    """The same for what can be trained."""
    from malmend.editors.settings import EditorMethod
    from malmend.methods.trained import TRAINED

    kinds = {name: kind.settings for name, kind in TRAINED.items()}
    _add_method(parser, (*get_args(EditorMethod), *kinds), kinds)


def _add_method(parser: Any, names: tuple[str, ...], kinds: Mapping[str, type]) -> None:
    parser.add_argument(
        "--method",
        type=Literal[names],
        default="malmen",
        help="what edits: least squares or the sum of an editor's shifts, or another method",
    )
    for name, kind in kinds.items():
        parser.add_class_arguments(kind, name.replace("-", "_"))


def take_method(given: dict[str, Any], kinds: Mapping[str, type]) -> Any:
    """Takes methods' settings out of the parsed options: the chosen one's, None for an editor.

    Raises:
        MalmendError: settings of a method that was not chosen.
    """
    chosen = None
    for name, kind in kinds.items():
        method = kind(**given.pop(name.replace("-", "_")))
        if name == given["method"]:
            chosen = method
        elif method != kind():
            raise MalmendError(
                f"--{name}.* are settings of the method {name}, and the method is "
                f"{given['method']}; give --method {name}, or leave them out."
            )
    if chosen is not None:
        given["method"] = "malmen"  # of the editor's settings, which then must be untouched
    return chosen


def take_editor_settings(given: dict[str, Any], network: bool) -> Any:
    """Takes the fields of EditorSettings out of the parsed options."""
    from malmend.editors.network import NetworkSettings
    from malmend.editors.settings import EditorSettings
    from malmend.methods.trained import check_trained
    from malmend.models.descent import Descent

    if not network:
        check_trained(given["method"])  # of which some are no editor's, whose settings refuse them
    names = [name for name in EditorSettings.__dataclass_fields__ if name != "network" or network]
    values = {name: given.pop(name) for name in names}
    if isinstance(values["descent"], dict):
        values["descent"] = Descent(**values["descent"])
    if network:
        values["network"] = NetworkSettings(**values["network"])
    return EditorSettings(**values)


def parse(parser: Any, arguments: list[str]) -> dict[str, Any]:
    """Options as plain values; ``--facts-per-step`` and ``--facts_per_step`` are the same."""
    from malmend.editors.refine import RefineSettings
    from malmend.models.trunk import TrunkSettings

    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, parser.after_dashes = arguments[:end], arguments[end:]
    spelt = [
        re.sub(r"^--[^=]*", lambda found: "--" + found[0][2:].replace("-", "_"), one)
        for one in arguments
    ]
    defaults = parser.get_defaults()  # by dotted names too
    for index, (one, following) in enumerate(zip(spelt, [*spelt, ""][1:], strict=True)):
        # A switch may stand alone: --strict is --strict=true; "A strict" is a prompt.
        switch = one.startswith("--") and isinstance(defaults.get(one[2:]), bool)
        if switch and following.lower() not in ("true", "false"):
            spelt[index] = f"{one}=true"
            parser.after_switches[following] = _spelt(one[2:])
    if "config" in defaults:
        from malmend.cli.config_file import check_config

        for one, following in zip(spelt, [*spelt[1:], ""], strict=True):
            name, _, value = one.partition("=")
            if name == "--config" and os.path.isfile(value or following):
                check_config(parser, value or following)
    try:
        parsed = parser.parse_args([*spelt, *parser.after_dashes])
        given = parsed.clone(with_meta=False).as_dict()  # without the paths of groups' files
    except UnicodeDecodeError as error:
        raise MalmendError(
            f"The --config file is not UTF-8 text ({error.reason} at {error.start}); "
            "give a YAML file."
        ) from error
    for name, kind in (("trunk", TrunkSettings), ("refine", RefineSettings)):
        if name in given:
            given[name] = kind(**given[name])
    return given


def _usage_error(command: str, message: str, parser: Any) -> str:
    """One sentence out of argparse's message, with the nearest option for a wrong one."""
    text = " ".join(message.split())
    options = [option for action in parser._actions for option in action.option_strings]
    options = [option.replace("_", "-") for option in options if option.startswith("--")]
    missing = re.match(r"the following arguments are required: (.*)", text)
    if missing is not None:  # the parser leaves the hyphens of options out
        names = [name.replace("_", "-") for name in missing[1].split(", ")]
        named = [f"--{name}" if f"--{name}" in options else name.upper() for name in names]
        return f"{', '.join(named)} must be given; see malmend {command} --help."
    alone = re.match(r"argument (--[\w.-]+): expected one argument", text)
    if alone is not None:
        name = alone[1].replace("_", "-")
        return f"{name} needs a value; one that begins with a hyphen is given as {name}=VALUE."
    file = re.match(r"Parser key \"config\": (.*)|Problems parsing config: (.*)", text)
    if file is not None:
        said = (file[1] or file[2]).rstrip(".").replace('"<unicode string>", ', "")
        return f"The --config file cannot be read ({said}); give a YAML file of options and values."
    unknown = re.match(r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.-]+)'", text)
    if unknown is not None:  # a file has names as settings have them, with underscores
        given = f"{unknown[1]}.{unknown[2]}" if unknown[1] else unknown[2]
        near = nearest(given, [option[2:].replace("-", "_") for option in options])
        return (
            f"The YAML file has {given!r}, which is no option of malmend {command}"
            f"{near or '.'} See malmend {command} --help."
        )
    group = re.match(r'Parser key "([\w.]+)": Unable to load config (\S+)', text)
    if group is not None:
        name = "--" + group[1].replace("_", "-")
        return f"{name} is {group[2]}, expected its own options, {name}.*, or a YAML file of them."
    wrong = re.search(r"[Uu]nrecognized arguments:\s*(.*)", text)
    if wrong is None:
        said = bad_value(
            text, lambda name: _spelt(name) if _spelt(name) in options else name.upper()
        )
        return f"{said or text.rstrip('.')}; see malmend {command} --help."
    given = wrong[1]
    if name := parser.after_switches.get(given):
        return f"{name} is {given!r}, expected true or false, or nothing."
    if not given.startswith("-"):
        return f"malmend {command} takes no further {given!r}; see malmend {command} --help."
    name = re.split(r"[=\s]", given)[0].replace("_", "-")
    if name in options and parser.after_dashes:
        return f"malmend {command} takes no further {given!r}; options stand before a bare --."
    hint = nearest(name, options) or "."
    return f"There is no option {name!r} of malmend {command}{hint} See malmend {command} --help."


def _spelt(name: str) -> str:
    """A setting as an option."""
    return "--" + name.replace("_", "-")
