"""The command line: ``malmend COMMAND ...``.  With show.py the only place that prints or exits.

Options are derived by jsonargparse from the functions in ``malmend.commands`` and the frozen
settings dataclasses that they take; nothing is declared twice.  ``train --config FILE`` reads the
same names from YAML.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from malmend.errors import MalmendError, nearest
from malmend.options import (
    add_editor_settings,
    add_methods,
    add_trained,
    derive,
    flat,
    parse,
    parser_of,
    take_editor_settings,
    take_method,
)

COMMANDS = {
    "edit": "edit facts into a model and write a patch",
    "train": "train an editor (MALMEN or MEND); run again to resume",
    "eval": "how well a model, edited or not, answers",
    "ask": "let a model answer one prompt, with and without a patch",
    "finetune": "fine-tune a model on facts, so that it knows what is to be edited",
    "continuations": "make facts of a text: passages and the tokens that follow them",
    "bench": "methods side by side: run a plan; bench table and bench plot show it",
    "export": "make a LoRA adapter or a whole model of a patch",
    "push": "upload an exported folder to the Hugging Face hub",
    "diff": "which layers of two models differ, and the difference as a patch",
    "conflicts": "where patches meet, and what stacking them does to their facts",
    "ledger": "which facts a model carries: add, revoke, replace, verify, roll back",
    "inspect": "what is in a model, an editor, a patch or a facts file",
    "cache": "what is kept of models and facts, and how to be rid of it",
    "demo": "the main job on a real model, start to finish",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.  Returns the exit code: 0, 1 (a full disk, say), 2 (bad input) or 130.

    3 is of `ledger verify`, where a fact does not hold.
    """
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
        resumes = arguments[:1] in (["train"], ["finetune"], ["bench"])
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
    runners: dict[str, Callable[[list[str]], int | None]] = {
        "edit": _edit,
        "train": _train,
        "eval": _eval,
        "ask": _ask,
        "finetune": _finetune,
        "continuations": _continuations,
        "bench": _bench,
        "export": _shipping("export"),
        "push": _shipping("push"),
        "diff": _shipping("diff"),
        "conflicts": _shipping("conflicts"),
        "ledger": _ledger,
        "inspect": _inspect,
        "cache": _cache,
        "demo": _demo,
    }
    return runners[name](arguments[1:]) or 0


def _edit(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.edit import edit
    from malmend.editors.settings import training_free
    from malmend.methods.table import METHODS

    parser = parser_of("edit", COMMANDS["edit"])
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    derive(parser, edit, {"model", "facts", "out", "editor", "settings", "method", "told"})
    parser.add_argument("--out", type=str, required=True, help="path of the patch to write")
    parser.add_argument(
        "--editor",
        type=str,
        default="auto",
        help="an editor's folder; none; or auto, the one that is shipped for this model",
    )
    add_editor_settings(parser, {"network", "method"})
    add_methods(parser)
    given = parse(parser, arguments)
    method = take_method(given, METHODS)
    settings = take_editor_settings(given, network=False)
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
            method=method,
            progress=bars,
            told=show.status,
        )
    show.edited(result)


def _train(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.train import train
    from malmend.editors.settings import published, published_mend
    from malmend.editors.train_settings import (
        TrainSettings,
        published_mend_training,
        published_training,
    )
    from malmend.methods.trained import TRAINED
    from malmend.processes import joined

    parser = parser_of("train", COMMANDS["train"])
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file, with paraphrases")
    parser.add_argument("--out", type=str, required=True, help="the editor's folder")
    parser.add_argument(
        "--paper",
        type=bool,
        default=False,
        help="MALMEN A.6 and the published code; --method mend-single is MEND's own",
    )
    parser.add_argument(
        "--locality", type=str, help="file of unrelated questions, else each fact's own"
    )
    own = {"model", "facts", "out", "locality", "settings", "editor", "starting", "stepped"}
    derive(parser, train, own | {"processes", "told"})
    add_editor_settings(parser, {"method"})
    parser.add_class_arguments(TrainSettings)
    add_trained(parser)
    given = parse(parser, arguments)
    if given["method"] in TRAINED:
        _learn(given, usual=parse(parser, ["model", "facts", "--out", "folder"]))
        return
    paper = {**vars(published()), **vars(published_training())} if given["paper"] else {}
    if given["method"] == "mend-single":
        paper = {**vars(published_mend()), **vars(published_mend_training())}
    if paper:  # other defaults; what was given still counts
        parser.set_defaults(flat(paper))
        given = parse(parser, arguments)
    take_method(given, {name: kind.settings for name, kind in TRAINED.items()})
    given.pop("paper")
    given.pop("config", None)
    names = TrainSettings.__dataclass_fields__
    training = TrainSettings(**{name: given.pop(name) for name in names})
    settings = take_editor_settings(given, network=True)
    with joined() as processes:
        if not processes.is_first:
            show.silence()
        _train_together(given, training, settings, processes)


def _train_together(given: dict[str, Any], training: Any, settings: Any, processes: Any) -> None:
    """Trains among the processes of a run, or alone; the first says how it goes."""
    from malmend import show
    from malmend.commands.train import train

    with show.bars() as bars:

        def starting(trainer: Any, seconds: float) -> None:
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
            processes=processes,
            progress=bars,
            told=show.status,
            starting=starting,
            stepped=lambda record: show.step(record, training.steps),
        )
    show.trained(result)


def _learn(given: dict[str, Any], usual: dict[str, Any]) -> None:
    """Trains a method that is no editor; none of an editor's options suit it."""
    from malmend import show
    from malmend.commands.learn import learn
    from malmend.methods.trained import TRAINED

    name = given["method"]
    settings = take_method(given, {one: kind.settings for one, kind in TRAINED.items()})
    taken = {"model", "facts", "out", "locality", "limit", "strict", "alternative", "away"}
    taken |= {"trunk", "dtype"}
    for option in set(given) - taken - {"method", "config"}:
        if given[option] != usual[option]:
            raise MalmendError(
                f"--{option.replace('_', '-')} is of editors, and the method is {name}; leave it "
                f"out, or see --{name}.* in malmend train --help."
            )
    result = learn(
        **{option: given[option] for option in taken},
        method=name,
        settings=settings,
        stepped=lambda record: show.learning(record, settings.steps),
    )
    show.status(f"Trained {len(result.records)} steps of {name}.  Editor: {result.folder}")


def _eval(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.evaluate import evaluate
    from malmend.files import writable

    parser = parser_of("eval", COMMANDS["eval"])
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("facts", type=str, help="facts file")
    parser.add_argument(
        "--patch", type=str, help="a patch or LoRA adapter; without it the model is asked alone"
    )
    derive(parser, evaluate, {"model", "facts", "patch"})
    parser.add_argument("--json", type=str, help="file to write all figures and answers to")
    given = parse(parser, arguments)
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

    parser = parser_of("ask", COMMANDS["ask"])
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("prompt", type=str, help="a question, or text to go on with")
    parser.add_argument(
        "--patch", type=str, help="a patch or LoRA adapter; the answer is then shown with it too"
    )
    derive(parser, ask, {"model", "prompt", "patch"})
    show.asked(ask(**parse(parser, arguments)))


def _finetune(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.finetune import finetune
    from malmend.models.finetune import FinetuneSettings

    parser = parser_of("finetune", COMMANDS["finetune"])
    parser.add_argument("model", type=str, help="name or folder")
    parser.add_argument("facts", type=str, nargs="+", help="facts files; of claims for an encoder")
    parser.add_argument("--out", type=str, required=True, help="the fine-tuned model's folder")
    derive(parser, finetune, {"model", "facts", "out", "settings", "stepped", "told"})
    parser.add_class_arguments(FinetuneSettings)
    given = parse(parser, arguments)
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

    parser = parser_of("continuations", COMMANDS["continuations"])
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("text", type=str, help="text file, a passage per line")
    parser.add_argument("--out", type=str, required=True, help="path of the facts file to write")
    derive(parser, continuations, {"model", "text", "out"})
    show.continued(continuations(**parse(parser, arguments)))


def _bench(arguments: list[str]) -> None:
    from malmend import show
    from malmend.bench.run import bench, bench_plot, bench_table
    from malmend.bench.table import markdown

    if arguments[:1] == ["table"]:
        parser = parser_of("bench table", "what a bench gave, as Markdown")
        parser.add_argument("folder", type=str, help="folder that malmend bench wrote")
        derive(parser, bench_table, {"folder"})
        show.plain(bench_table(**parse(parser, arguments[1:])))
        return
    if arguments[:1] == ["plot"]:
        parser = parser_of("bench plot", "curves over the number of facts, as figures")
        parser.add_argument("folder", type=str, help="folder that malmend bench wrote")
        show.plain("".join(f"{one}\n" for one in bench_plot(**parse(parser, arguments[1:]))))
        return
    parser = parser_of("bench", COMMANDS["bench"])
    parser.add_argument("plan", type=str, help="YAML file; or: table FOLDER, plot FOLDER")
    parser.add_argument("--out", type=str, required=True, help="folder of results")
    given = parse(parser, arguments)
    with show.bars() as bars:
        result = bench(**given, progress=bars, told=show.status, stepped=show.cell)
    show.plain(markdown(result.rows))


def _ledger(arguments: list[str]) -> int:
    from malmend.cli_ledger import run

    return run(arguments)


def _inspect(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.inspect import inspect

    parser = parser_of("inspect", COMMANDS["inspect"])
    parser.add_argument("thing", type=str, help="a model, editor, patch, adapter or facts file")
    derive(parser, inspect, {"thing"})
    show.inspected(inspect(**parse(parser, arguments)))


def _cache(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.cache import cache

    parser = parser_of("cache", COMMANDS["cache"])
    derive(parser, cache, set())
    show.cached(cache(**parse(parser, arguments)))


def _shipping(name: str) -> Callable[[list[str]], None]:
    """A command of ``cli_shipping``, which is read only when it runs."""

    def run(arguments: list[str]) -> None:
        from malmend import cli_shipping

        getattr(cli_shipping, name)(arguments, COMMANDS[name])

    return run


def _demo(arguments: list[str]) -> None:
    from malmend import show
    from malmend.commands.demo import demo

    parser = parser_of("demo", COMMANDS["demo"])
    derive(parser, demo, {"told"})
    given = parse(parser, arguments)
    with show.bars() as bars:
        result = demo(**given, progress=bars, told=show.status)
    show.demonstrated(result)


if __name__ == "__main__":
    sys.exit(main())
