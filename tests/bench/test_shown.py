"""A bench's tables in a terminal, which is narrow, and in a file, which stays Markdown."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len

from malmend.bench.table import failures, markdown
from malmend.cli import show, show_bench

ASKED = ("token_ratio", "exact", "generated", "retention", "kl")


def row(name: str, size: int, seed: int) -> dict:
    kinds = {kind: dict.fromkeys(ASKED, 0.125 + seed / 8) for kind in ("ES", "GS", "LS", "NS")}
    told = {
        "prompt": "Ora | lies [in]",
        "wanted": "Chile " * 40,
        "unedited": "",
        "edited": "\x1b[2J",
    }
    return {
        "model": "tiny",
        "protocol": "together",
        "name": name,
        "m": size,
        "seed": seed,
        "unedited": kinds,
        "edited": kinds,
        "perplexity": {"unedited": 9.5, "edited": 10.25},
        "patch": {"mean_residual": 0.25, "residual_after": 0.5},
        "edit_bytes": 5e8,
        "edit_seconds": 3.0,
        "failures": [{"kind": "GS", **told}],
    }


ROWS = [
    row(name, size, seed) for size in (16, 1024) for name in ("ft", "a" * 40) for seed in (0, 1)
]


@pytest.fixture
def shown(monkeypatch):
    """What a terminal of 80 columns shows of Markdown."""

    def of(text: str, is_terminal: bool = True) -> str:
        file = io.StringIO()
        keywords = {"file": file, "width": 80, "force_terminal": is_terminal, "color_system": None}
        console = show._Terminal(emoji=False, **keywords)
        for module in (show, show_bench):
            monkeypatch.setattr(module, "OUT", console)
        show_bench.bench(text)
        return file.getvalue()

    return of


def test_the_table_fits_a_terminal_and_leaves_no_figure_out(shown):
    """It was raw Markdown, of lines three times as wide as the terminal."""
    text = markdown(ROWS)
    assert max(map(len, text.splitlines())) > 160
    said = shown(text)
    assert max(map(cell_len, said.splitlines())) <= 80
    assert "tiny, all facts at once" in said
    assert said.count("0.188 ± 0.088") == text.count("0.188 ± 0.088") > 40
    for figure in ("9.50", "10.25", "0.25", "500", "1,024", "unedited", "generated", "seeds"):
        assert figure in said
    assert "*unedited*" not in said
    assert "| --" not in said


def test_what_goes_into_a_file_stays_markdown(shown):
    assert shown(markdown(ROWS), is_terminal=False) == markdown(ROWS)


def test_failures_stand_below_one_another(shown):
    said = shown(failures(ROWS))
    assert max(map(cell_len, said.splitlines())) <= 80
    assert "ft, m 1,024, GS\n  prompt    Ora | lies [in]\n" in said
    assert "  unedited  (nothing)\n  edited    \\x1b[2J\n" in said
    assert "results" in said or "first ten of every cell" in said
