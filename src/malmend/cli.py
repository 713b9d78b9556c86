"""The command line: ``malmend COMMAND ...``.  With show.py the only place that prints or exits.

Options are derived by jsonargparse from the functions in ``malmend.commands`` and the frozen
settings dataclasses that they take; nothing is declared twice.  ``train --config FILE`` reads the
same names from YAML.
"""

from __future__ import annotations

import difflib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from malmend.errors import MalmendError, nearest

COMMANDS = {
    "edit": "edit facts into a model and write a patch",
    "train": "train an editor (MALMEN or MEND); run again to resume",
    "eval": "how well a model, edited or not, answers",
    "ask": "let a model answer one prompt, with and without a patch",
    "finetune": "fine-tune a model on facts, so that it knows what is to be edited",
    "continuations": "make facts of a text: passages and the tokens that follow them",
    "inspect": "what is in a model, an editor, a patch or a facts file",
    "demo": "the main job on a real model, start to finish",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.  Returns the exit code: 0, 1 (a full disk, say), 2 (bad input) or 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except MalmendError as error:
        print(f"malmend: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f" {error.filename}" if error.filename else ""
        print(f"malmend: {error.strerror or error}{what}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = arguments[:1] in (["train"], ["finetune"])
        hint = " Run the same command again to resume." if resumes else ""
        print(f"\nmalmend: interrupted; nothing half-written was left.{hint}", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: malmend COMMAND ...   (malmend COMMAND --help says more)\n")
        print("\n".join(f"  {name:<13} {what}" for name, what in COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"malmend {version('malmend')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise MalmendError(
            f"There is no command {name!r}{nearest(name, COMMANDS) or '.'} "
            f"Expected one of {', '.join(COMMANDS)}."
        )
    # Warnings of the libraries below are for developers, who have the tests for them.
    warnings.simplefilter("ignore")
    runners: dict[str, Callable[[list[str]], None]] = {
        "edit": _edit,
        "train": _train,
        "eval": _eval,
        "ask": _ask,
        "finetune": _finetune,
        "continuations": _continuations,
        "inspect": _inspect,
        "demo": _demo,
    }
    runners[name](arguments[1:])
    return 0


def _edit(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.edit import edit
    from malmend.editors.settings import training_free

    parser = _parser("edit")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    _derive(parser, edit, {"model", "facts", "out", "editor", "settings", "told"})
    parser.add_argument("--out", type=str, required=True, help="path of the patch to write")
    parser.add_argument(
        "--editor",
        type=str,
        default="auto",
        help="an editor's folder; none; or auto, the one that is shipped for this model",
    )
    _settings(parser, network=False)
    given = _parse(parser, arguments)
    settings = _editor_settings(given, network=False)
    untouched = settings == training_free()
    if given["editor"] not in ("auto", "none") and not untouched:
        raise MalmendError(
            f"The editor {given['editor']} brings its own settings; leave out --method, --layers "
            "and the other settings of editors."
        )
    with show.bars() as bars:
        result = edit(
            **given,
            settings=None if untouched else settings,
            progress=bars,
            told=show.status,
        )
    show.edited(result)


def _train(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.train import train
    from malmend.editors.settings import published
    from malmend.editors.training import TrainSettings, published_training

    parser = _parser("train")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file, with paraphrases")
    parser.add_argument("--out", type=str, required=True, help="the editor's folder")
    parser.add_argument(
        "--paper", type=bool, default=False, help="MALMEN A.6 and the published code"
    )
    parser.add_argument(
        "--locality", type=str, help="file of unrelated questions, else each fact's own"
    )
    own = {"model", "facts", "out", "locality", "settings", "editor", "starting", "stepped"}
    _derive(parser, train, own)
    _settings(parser, network=True)
    parser.add_class_arguments(TrainSettings)
    given = _parse(parser, arguments)
    if given["paper"]:  # other defaults; what was given still counts
        parser.set_defaults(_flat({**vars(published()), **vars(published_training())}))
        given = _parse(parser, arguments)
    given.pop("paper")
    given.pop("config", None)
    names = TrainSettings.__dataclass_fields__
    training = TrainSettings(**{name: given.pop(name) for name in names})
    settings = _editor_settings(given, network=True)
    with show.bars() as bars:
        started = False

        def starting(trainer: Any, seconds: float) -> None:
            nonlocal started
            left = training.steps - trainer.step
            resumed = f" (resumed after step {trainer.step})" if trainer.step else ""
            show.status(
                f"{left} steps of {training.facts_per_step} facts{resumed}: "
                f"about {max(1, round(seconds / 60))} minutes."
            )

        result = train(
            **given,
            settings=training,
            editor=settings,
            progress=bars,
            starting=starting,
            stepped=lambda record: show.step(record, training.steps),
        )
    show.trained(result)


def _eval(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.evaluate import evaluate
    from malmend.files import writable

    parser = _parser("eval")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    parser.add_argument("--patch", type=str, help="a patch; without it the model is asked alone")
    _derive(parser, evaluate, {"model", "facts", "patch"})
    parser.add_argument("--json", type=str, help="file to write all figures and answers to")
    given = _parse(parser, arguments)
    path = given.pop("json")
    if path is not None:
        writable(path, given["facts"], given["patch"], given["text"])
    with show.bars() as bars:
        result = evaluate(**given, progress=bars)
    if path is not None:
        result.save(path)
    show.report(result)
    if given["report"] is not None:
        show.page(given["report"])


def _ask(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.ask import ask

    parser = _parser("ask")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("prompt", type=str, help="a question, or text to go on with")
    parser.add_argument("--patch", type=str, help="a patch; the answer is then shown with it too")
    _derive(parser, ask, {"model", "prompt", "patch"})
    show.asked(ask(**_parse(parser, arguments)))


def _finetune(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.finetune import finetune
    from malmend.models.finetune import FinetuneSettings

    parser = _parser("finetune")
    parser.add_argument("model", type=str, help="name or folder")
    parser.add_argument("facts", type=str, nargs="+", help="facts files; of claims for an encoder")
    parser.add_argument("--out", type=str, required=True, help="the fine-tuned model's folder")
    _derive(parser, finetune, {"model", "facts", "out", "settings", "stepped", "told"})
    parser.add_class_arguments(FinetuneSettings)
    given = _parse(parser, arguments)
    settings = FinetuneSettings(
        **{name: given.pop(name) for name in FinetuneSettings.__dataclass_fields__}
    )
    with show.bars() as bars:
        result = finetune(
            **given, settings=settings, progress=bars, stepped=show.epoch, told=show.status
        )
    show.finetuned(result)


def _continuations(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.continuations import continuations

    parser = _parser("continuations")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("text", type=str, help="text file, a passage per line")
    parser.add_argument("--out", type=str, required=True, help="path of the facts file to write")
    _derive(parser, continuations, {"model", "text", "out"})
    show.continued(continuations(**_parse(parser, arguments)))


def _inspect(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.inspect import inspect

    parser = _parser("inspect")
    parser.add_argument("thing", type=str, help="a model, an editor, a patch or a facts file")
    _derive(parser, inspect, {"thing"})
    show.inspected(inspect(**_parse(parser, arguments)))


def _demo(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.demo import demo

    parser = _parser("demo")
    _derive(parser, demo, {"told"})
    given = _parse(parser, arguments)
    with show.bars() as bars:
        result = demo(**given, progress=bars, told=show.status)
    show.demonstrated(result)


def _parser(command: str) -> Any:
    """A parser whose errors are ours and whose options are written with hyphens."""
    from jsonargparse import ArgumentParser
    from jsonargparse import DefaultHelpFormatter as Formatter

    class Hyphens(Formatter):
        def _format_action_invocation(self, action: Any) -> str:
            shown = super()._format_action_invocation(action)
            return re.sub(r"--[\w.]+", lambda found: found[0].replace("_", "-"), shown)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise MalmendError(_usage_error(command, message, self))

    return Parser(
        prog=f"malmend {command}",
        description=COMMANDS[command],
        formatter_class=Hyphens,
        usage=f"malmend {command} [options] ...",
        print_config=None,
    )


def _derive(parser: Any, function: Callable[..., Any], skip: set[str]) -> None:
    """The function's own parameters as options, with its docstring as help."""
    parser.add_function_arguments(
        function, skip=skip | {"progress", "calibration"}, fail_untyped=False
    )


def _settings(parser: Any, network: bool) -> None:
    from malmend.editors.settings import EditorSettings

    parser.add_class_arguments(EditorSettings, skip=set() if network else {"network"})


def _editor_settings(given: dict[str, Any], network: bool) -> Any:
    """Takes the fields of EditorSettings out of the parsed options."""
    from malmend.editors.network import NetworkSettings
    from malmend.editors.settings import EditorSettings
    from malmend.models.capture import Descent

    names = [name for name in EditorSettings.__dataclass_fields__ if name != "network" or network]
    values = {name: given.pop(name) for name in names}
    if isinstance(values["descent"], dict):
        values["descent"] = Descent(**values["descent"])
    values["network"] = (
        NetworkSettings(**values["network"]) if network else NetworkSettings(blocks=0)
    )
    return EditorSettings(**values)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Defaults for a parser: nested dataclasses by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name == "network":
            flat |= {f"network.{part}": one for part, one in vars(value).items()}
        else:
            flat[name] = value
    return flat


def _parse(parser: Any, arguments: list[str]) -> dict[str, Any]:
    """Options as plain values; ``--facts-per-step`` and ``--facts_per_step`` are the same."""
    from malmend.editors.refine import RefineSettings
    from malmend.models.trunk import TrunkSettings

    spelt = [
        re.sub(r"^--[^=]*", lambda found: "--" + found[0][2:].replace("-", "_"), one)
        for one in arguments
    ]
    defaults = parser.get_defaults().as_dict()
    for index, (one, following) in enumerate(zip(spelt, [*spelt, ""][1:], strict=True)):
        # A switch may stand alone: --strict is --strict=true.
        if isinstance(defaults.get(one[2:]), bool) and following not in ("true", "false"):
            spelt[index] = f"{one}=true"
    try:
        given = parser.parse_args(spelt).as_dict()
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
    wrong = re.search(r"[Uu]nrecognized arguments: (\S+)", text)
    if wrong is None:
        return f"{_bad_value(text) or text.rstrip('.')}; see malmend {command} --help."
    name = wrong[1].split("=")[0].replace("_", "-")
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"There is no option {name!r} of malmend {command}{hint} See malmend {command} --help."


def _bad_value(text: str) -> str | None:
    """A parser's complaint about a value, in plain words: option, value and what was expected."""
    found = re.match(r'Parser key "([\w.]+)": (.*)(?:Got value|Given value): (.*)$', text)
    kinds = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", text)
    if found is None or not kinds:
        return None
    names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    names["tuple"] = """a list such as '["one", "two"]'"""
    wanted = [names.get(kind, kind) or choices for kind, choices in kinds if kind != "NoneType"]
    option = found[1].replace("_", "-")
    return f"--{option} is {found[3].rstrip('.')!r}, expected {' or '.join(wanted)}"


if __name__ == "__main__":
    sys.exit(main())
