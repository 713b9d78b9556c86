"""Names that a plan may give models and methods: each has its own figure and its own line."""

from __future__ import annotations

from typing import Any

import pytest

from malmend.bench.plot import plot
from malmend.bench.table import failures, markdown


def row(model: str, name: str = "ft") -> dict[str, Any]:
    scores = {"ES": {"token_ratio": 0.5}}
    said = {"kind": "ES", "prompt": "a", "wanted": "b", "unedited": "c", "edited": "d"}
    return {
        "model": model,
        "name": name,
        "protocol": "together",
        "m": 4,
        "seed": 0,
        "unedited": scores,
        "edited": scores,
        "edit_seconds": 2.0,
        "failures": [said],
        "patch": {},
    }


def test_every_model_has_its_own_figures(tmp_path):
    models = ["x-m", "x/m", "x m", "x\\m", "y" * 300, "y" * 301]
    made = plot([row(one) for one in models], tmp_path)
    assert len({path.name.casefold() for path in made}) == len(made) == 2 * len(models)
    assert {path.name for path in made} == {path.name for path in tmp_path.iterdir()}
    assert tmp_path / "curves-x-m-together.png" in made
    alone = plot([row("x/m")], tmp_path)  # whatever stands beside it in another plan
    assert set(alone) < set(made)


@pytest.mark.parametrize("table", [markdown, failures])
def test_a_name_stays_in_its_cell(table):
    plain, odd = (table([row("model", name)]) for name in ("a b", "a |\nb"))
    assert odd.replace("a \\| b", "a b") == plain


def test_a_models_name_stays_in_its_line():
    assert markdown([row("m |\nn")]).startswith("**m | n**, all facts at once\n")


def test_figures_of_every_name_are_drawn_and_name_it(tmp_path):
    """Two $ were a formula that could not be read, and "_mine" was in no legend."""
    names = ["_mine", "a$b$", "$\\x$", "ft"]
    _, path = plot([row("m$o$del\\", name) for name in names], tmp_path)
    said = path.read_text()
    for one in (*names, "m$o$del\\, together"):
        assert f"<!-- {one} -->" in said
