"""The command that compares: bench, and its table and plot."""

from __future__ import annotations

import os

from malmend.cli.options import derive, parse, parser_of
from malmend.errors import MalmendError, nearest


def bench(arguments: list[str], what: str) -> None:
    """Runs a plan, or shows what one gave."""
    from malmend.bench.run import bench, bench_plot, bench_table
    from malmend.bench.table import markdown
    from malmend.cli import show, show_bench

    if arguments[:1] == ["table"]:
        parser = parser_of("bench table", "what a bench gave, as Markdown")
        parser.add_argument("folder", type=str, help="folder that malmend bench wrote")
        derive(parser, bench_table, {"folder"})
        show_bench.bench(bench_table(**parse(parser, arguments[1:])))
        return
    if arguments[:1] == ["plot"]:
        parser = parser_of("bench plot", "curves over the number of facts, as figures")
        parser.add_argument("folder", type=str, help="folder that malmend bench wrote")
        show.plain("".join(f"{one}\n" for one in bench_plot(**parse(parser, arguments[1:]))))
        return
    _check_word(arguments)
    parser = parser_of("bench", what)
    parser.add_argument("plan", type=str, help="YAML file; or: table FOLDER, plot FOLDER")
    parser.add_argument("--out", type=str, required=True, help="folder of results")
    derive(parser, bench, {"plan", "out", "told", "stepped"})
    given = parse(parser, arguments)
    with show.bars() as bars:
        result = bench(**given, progress=bars, told=show.status, stepped=show.cell)
    show_bench.bench(markdown(result.rows))


def _check_word(arguments: list[str]) -> None:
    """Raises MalmendError where a misspelt "table" or "plot" would be taken for a plan."""
    word = arguments[0] if len(arguments) > 1 and not arguments[1].startswith("-") else ""
    near = nearest(word, ("table", "plot"))
    if near and not os.path.exists(word):
        raise MalmendError(
            f"There is no action {word!r} of malmend bench{near} Or give a plan and --out."
        )
