"""The commands that hand an edit on or look at others' edits: export, push, diff, conflicts."""

from __future__ import annotations

from typing import Literal

from malmend.cli.options import derive, parse, parser_of


def export(arguments: list[str], what: str) -> None:
    """A patch as an adapter or a model."""
    from malmend.cli import show, show_shipping
    from malmend.commands.export import export

    parser = parser_of("export", what)
    parser.add_argument("patch", type=str, help="a patch")
    parser.add_argument("folder", type=str, help="folder to make")
    derive(parser, export, {"patch", "folder", "to", "model", "told"})
    kinds = Literal["lora", "merged"]
    parser.add_argument("--to", type=kinds, required=True, help="an adapter or a whole model")
    parser.add_argument("--model", type=str, help="the base, where the patch's name is not its own")
    show_shipping.exported(show.with_bars(export, parse(parser, arguments)))


def push(arguments: list[str], what: str) -> None:
    """An exported folder to the hub."""
    from malmend.cli import show_shipping
    from malmend.commands.push import push

    parser = parser_of("push", what)
    parser.add_argument("folder", type=str, help="folder that malmend export wrote")
    parser.add_argument("repo", type=str, help="repository on the hub, org/name")
    derive(parser, push, {"folder", "repo", "api"})
    show_shipping.pushed(push(**parse(parser, arguments)))


def diff(arguments: list[str], what: str) -> None:
    """Two models side by side."""
    from malmend.cli import show, show_shipping
    from malmend.commands.diff import diff

    parser = parser_of("diff", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("other", type=str, help="name, folder or GGUF file")
    derive(parser, diff, {"model", "other", "told"})
    show_shipping.differing(show.with_bars(diff, parse(parser, arguments)))


def conflicts(arguments: list[str], what: str) -> None:
    """Several patches on one model."""
    from malmend.cli import show, show_shipping
    from malmend.commands.conflicts import conflicts

    parser = parser_of("conflicts", what)
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    parser.add_argument("patches", type=str, nargs="+", help="patches, or LoRA adapters' folders")
    derive(parser, conflicts, {"model", "patches", "facts", "told"})
    parser.add_argument(
        "--facts", type=str, nargs="+", default=[], help="a facts file for each patch, in order"
    )
    show_shipping.conflicting(show.with_bars(conflicts, parse(parser, arguments)))
