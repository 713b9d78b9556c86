"""The command line: ``malmend COMMAND ...``.  Nothing outside ``malmend.cli`` prints or exits.

Options are derived by jsonargparse from the functions in ``malmend.commands`` and the frozen
settings dataclasses that they take; nothing is declared twice.  ``train --config FILE`` reads the
same names from YAML.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from malmend.cli.options import (
    add_editor,
    add_editor_settings,
    add_methods,
    derive,
    parse,
    parser_of,
    take_editor_settings,
    take_method,
)
from malmend.errors import (
    MalmendError,
    Resumable,
    harmless,
    is_full_device,
    is_out_of_memory,
    nearest,
)

# What an operating system says of a path that another one, or other rights, would put right.
BAD_PATHS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS, errno.ELOOP}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.  Returns the exit code: 0, 1 (no memory, say) or 2 (bad input).

    2 too where a file cannot be written, of a full disk say: another place can be given.

    3 is of `ledger verify`, where a fact does not hold; 130 and 143 are of what was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    came: list[int] = []
    try:
        with _heard(came):
            return _run(arguments)
    except MalmendError as error:
        print(f"malmend: {harmless(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f" {error.filename}" if error.filename else ""
        given = error.errno in BAD_PATHS
        advice = "; check the path, and who may read or write there" if given else ""
        print(f"malmend: {harmless(f'{error.strerror or error}{what}{advice}')}.", file=sys.stderr)
        return 2 if given else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = "There is no memory left; give a smaller model, or --memory where it is an option"
        if is_full_device(error):
            said = "The device has no room left; give less of --trunk.batch-tokens, --dtype "
            said += "bfloat16 or --device auto, or edit fewer layers"
        why = "".join(f" ({harmless(one)})" for one in str(error).splitlines()[:1])
        print(f"malmend: {said}{why}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        resumes = arguments[:1] in (["train"], ["finetune"], ["bench"])
        resumes = resumes or isinstance(stopped, Resumable)
        hint = " Run the same command again to resume." if resumes else ""
        print(f"\nmalmend: interrupted; nothing half-written was left.{hint}", file=sys.stderr)
        return 128 + (came[0] if came else signal.SIGINT)


@contextmanager
def _heard(came: list[int]) -> Iterator[None]:
    """Inside the block SIGTERM interrupts as Ctrl-C does, and is noted.

    Where it is dealt with already, and of several processes, it is left alone: one that waits for
    the others hears no signal, and would outlast torchrun, which ends them by this one.
    """
    before, here = signal.getsignal(signal.SIGTERM), os.getpid()
    alone = threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ
    if not alone or before is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != here:  # a child that was forked meanwhile
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        came.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: malmend COMMAND ...   (malmend COMMAND --help says more)\n")
        print("\n".join(f"  {name:<13} {what}" for name, (_, what) in COMMANDS.items()))
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
    if name not in ("train", "edit") and "WORLD_SIZE" in os.environ:
        from malmend.processes import refuse_several

        refuse_several(f"malmend {name}")
    run, what = COMMANDS[name]
    with warnings.catch_warnings():
        # Those of the libraries below are for developers, who have the tests for them.
        warnings.simplefilter("ignore")
        from malmend.cli.show import notes

        with notes():
            if isinstance(run, str):
                run = getattr(importlib.import_module(f"malmend.cli.{run}"), name)
            return run(arguments[1:], what) or 0


def _edit(arguments: list[str], what: str) -> None:
    from malmend.cli import show
    from malmend.commands.edit import edit
    from malmend.editors.settings import EditorSettings
    from malmend.methods.table import METHODS
    from malmend.processes import joined, refuse_several

    parser = parser_of("edit", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    own = {"model", "facts", "out", "editor", "settings", "method", "processes", "told"}
    derive(parser, edit, own)
    parser.add_argument("--out", type=str, required=True, help="path of the patch to write")
    add_editor(parser)
    add_editor_settings(parser, {"network", "method"})
    add_methods(parser)
    given = parse(parser, arguments)
    method = take_method(given, METHODS)
    settings = take_editor_settings(given, network=False)
    untouched = settings == EditorSettings()
    if given["editor"] not in ("auto", "none") and not untouched:
        raise MalmendError(
            f"The editor {given['editor']} brings its own settings; leave out --method, --layers "
            "and the other settings of editors."
        )
    if method is not None:
        refuse_several(f"--method {method.name}")
    given |= {"settings": None if untouched else settings, "method": method}
    with joined() as processes:
        if not processes.is_first:
            show.silence()
        show.edited(show.with_bars(edit, {**given, "processes": processes}))


def _eval(arguments: list[str], what: str) -> None:
    from malmend.cli import show, show_report
    from malmend.commands.evaluate import evaluate
    from malmend.evaluation.page import check_apart, page_folder, write_page
    from malmend.files import writable

    parser = parser_of("eval", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    parser.add_argument(
        "--patch", type=str, help="a patch or LoRA adapter; without it the model is asked alone"
    )
    derive(parser, evaluate, {"model", "facts", "patch", "told"})
    parser.add_argument("--json", type=str, help="file to write all figures and answers to")
    given = parse(parser, arguments)
    path, folder = given.pop("json"), given.pop("report")
    inputs = [given[name] for name in ("facts", "patch", "text", "model")]
    if path is not None:
        writable(path, *inputs)
    if folder is not None:
        page_folder(folder, *inputs)
        if path is not None:
            check_apart(path, folder)
    result = show.with_bars(evaluate, given)
    # First what a full disk leaves: of hours of asking something is always seen.
    show_report.report(result)
    if path is not None:
        result.save(path)
    if folder is not None:
        write_page(result, folder)
        show.page(folder)


def _ask(arguments: list[str], what: str) -> None:
    from malmend.cli import show
    from malmend.commands.ask import ask

    parser = parser_of("ask", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("prompt", type=str, help="a question, or text to go on with")
    parser.add_argument(
        "--patch", type=str, help="a patch or LoRA adapter; the answer is then shown with it too"
    )
    derive(parser, ask, {"model", "prompt", "patch"})
    show.asked(ask(**parse(parser, arguments)))


def _continuations(arguments: list[str], what: str) -> None:
    from malmend.cli import show
    from malmend.commands.continuations import continuations

    parser = parser_of("continuations", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("text", type=str, help="text file, a passage per line")
    parser.add_argument("--out", type=str, required=True, help="path of the facts file to write")
    derive(parser, continuations, {"model", "text", "out"})
    show.continued(continuations(**parse(parser, arguments)))


def _inspect(arguments: list[str], what: str) -> None:
    from malmend.cli import show
    from malmend.commands.inspect import inspect

    parser = parser_of("inspect", what)
    parser.add_argument("thing", type=str, help="a model, editor, patch, adapter or facts file")
    derive(parser, inspect, {"thing"})
    show.inspected(inspect(**parse(parser, arguments)))


def _cache(arguments: list[str], what: str) -> None:
    from malmend.cli import show
    from malmend.commands.cache import cache

    parser = parser_of("cache", what)
    derive(parser, cache, set())
    show.cached(cache(**parse(parser, arguments)))


def _demo(arguments: list[str], what: str) -> None:
    from malmend.cli import show, show_report
    from malmend.commands.demo import demo

    parser = parser_of("demo", what)
    derive(parser, demo, {"told"})
    show_report.demonstrated(show.with_bars(demo, parse(parser, arguments)))


# What runs each command, and what it does, for a person.  A string is a module of malmend.cli with
# a function of the command's name; it is read only when that runs.
COMMANDS: dict[str, tuple[str | Callable[[list[str], str], int | None], str]] = {
    "edit": (_edit, "edit facts into a model and write a patch"),
    "train": ("training", "train an editor (MALMEN or MEND); run again to resume"),
    "eval": (_eval, "how well a model, edited or not, answers"),
    "ask": (_ask, "let a model answer one prompt, with and without a patch"),
    "finetune": ("training", "fine-tune a model on facts, so that it knows what is to be edited"),
    "continuations": (
        _continuations,
        "make facts of a text: passages and the tokens that follow them",
    ),
    "bench": ("bench", "methods side by side: run a plan; bench table and bench plot show it"),
    "export": ("shipping", "make a LoRA adapter or a whole model of a patch"),
    "push": ("shipping", "upload an exported folder to the Hugging Face hub"),
    "diff": ("shipping", "which layers of two models differ, and the difference as a patch"),
    "conflicts": ("shipping", "where patches meet, and what stacking them does to their facts"),
    "ledger": ("ledger", "which facts a model carries: add, revoke, replace, verify, roll back"),
    "inspect": (_inspect, "what is in a model, an editor, a patch or a facts file"),
    "cache": (_cache, "what is kept of models and facts, and how to be rid of it"),
    "demo": (_demo, "the main job on a real model, start to finish"),
}
