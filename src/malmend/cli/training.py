"""The commands that train: train, finetune."""

from __future__ import annotations

from typing import Any

from malmend.cli.options import (
    add_editor_settings,
    add_trained,
    derive,
    parse,
    parser_of,
    take_editor_settings,
    take_method,
)
from malmend.errors import MalmendError, counted


def train(arguments: list[str], what: str) -> None:
    """An editor, or another trained method."""
    from malmend.cli import show
    from malmend.commands.train import train
    from malmend.editors.settings import published, published_mend
    from malmend.editors.train_settings import (
        TrainSettings,
        published_mend_training,
        published_training,
    )
    from malmend.methods.trained import TRAINED
    from malmend.processes import joined

    parser = parser_of("train", what)
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
    own = {"model", "facts", "out", "locality", "settings", "training", "starting", "stepped"}
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
        network = vars(paper.pop("network"))
        parser.set_defaults(paper | {f"network.{name}": one for name, one in network.items()})
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
    from malmend.cli import show, show_training
    from malmend.commands.train import train

    with show.bars() as bars:

        def starting(trainer: Any, seconds: float) -> None:
            left = training.steps - trainer.step
            if not left:
                show.status(show_training.already(training.steps))
                return
            resumed = f" (resumed after step {trainer.step})" if trainer.step else ""
            show.status(
                f"{counted(left, 'step')} of "
                f"{counted(training.facts_per_step, 'fact')}{resumed}: "
                f"about {counted(max(1, round(seconds / 60)), 'minute')}."
            )

        result = train(
            **given,
            settings=settings,
            training=training,
            processes=processes,
            progress=bars,
            told=show.status,
            starting=starting,
            stepped=lambda record: show_training.step(record, training.steps),
        )
    show_training.trained(result)


def _learn(given: dict[str, Any], usual: dict[str, Any]) -> None:
    """Trains a method that is no editor; none of an editor's options suit it."""
    from malmend.cli import show, show_training
    from malmend.commands.learn import learn
    from malmend.methods.trained import TRAINED
    from malmend.processes import refuse_several

    name = given["method"]
    refuse_several(f"The training of {name}")
    settings = take_method(given, {one: kind.settings for one, kind in TRAINED.items()})
    taken = {"model", "facts", "out", "locality", "limit", "strict", "alternative", "away"}
    taken |= {"trunk", "dtype", "device"}
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
        stepped=lambda record: show_training.learning(record, settings.steps),
        told=show.status,
    )
    show_training.leaking(result.leaks)
    said = f"Trained {counted(len(result.records), 'step')} of {name}."
    if not result.records:
        said = show_training.already(settings.steps)
    show.status(f"{said}  Editor: {result.folder}")


def finetune(arguments: list[str], what: str) -> None:
    """A model that knows what is to be edited."""
    from malmend.cli import show, show_training
    from malmend.commands.finetune import finetune
    from malmend.models.finetune import FinetuneSettings

    parser = parser_of("finetune", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
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
            **given, settings=settings, progress=bars, stepped=show_training.epoch, told=show.status
        )
    show_training.finetuned(result)
