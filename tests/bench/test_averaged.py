"""Which rows a table averages: seeds of one making, and of each seed one row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import command_support
from malmend.bench.making import making
from malmend.bench.plan import Plan
from malmend.bench.results import Results
from malmend.bench.run import bench, bench_table
from malmend.errors import MalmendError
from malmend.models.load import load_model
from malmend.one_writer import only_writer

tiny = command_support.tiny
cache = command_support.cache

FT = {"epochs": 2, "layers": 1, "rate": 0.01}


@pytest.fixture
def plan(tiny, tmp_path) -> Plan:
    """Of facts and a model that a test may change."""
    facts, model = tmp_path / "facts.jsonl", tmp_path / "model"
    facts.write_text(command_support.as_lines(command_support.make_facts(12)))
    command_support.save_model(model)
    return Plan((str(model),), str(facts), {"ft": FT}, sizes=(2,), seeds=(0, 1))


def seeds_shown(folder: Path) -> str:
    """The last column of the method's line in the table."""
    (line,) = [line for line in bench_table(folder).splitlines() if "| ft |" in line]
    return line.split("|")[-2].strip()


def test_other_facts_in_the_same_file_are_never_averaged(plan, tmp_path):
    out = tmp_path / "out"
    bench(plan, out)
    assert seeds_shown(out) == "2"
    Path(plan.facts).write_text(command_support.as_lines(command_support.make_facts(12, seed=9)))
    bench(replace(plan, seeds=(0,)), out)
    assert seeds_shown(out) == "1"
    bench(replace(plan, seeds=(1,)), out)
    assert seeds_shown(out) == "2"


def test_facts_that_a_file_only_calls_otherwise_are_averaged(plan, tmp_path):
    """Which are not run again either."""
    bench(replace(plan, seeds=(0,)), tmp_path / "out")
    path = Path(plan.facts)
    path.write_text("\n" + path.read_text().replace('"id": "f', '"id": "new f'))
    bench(replace(plan, seeds=(1,)), tmp_path / "out")
    assert seeds_shown(tmp_path / "out") == "2"


def test_other_weights_under_the_same_name_are_never_averaged(plan, tmp_path):
    bench(plan, tmp_path / "out")
    command_support.save_model(Path(plan.models[0]), seed=5)
    bench(replace(plan, seeds=(0,)), tmp_path / "out")
    assert seeds_shown(tmp_path / "out") == "1"


def test_weights_that_were_only_written_again_make_one_row_of_a_seed(plan, tmp_path):
    bench(replace(plan, seeds=(0,)), tmp_path / "out")
    command_support.save_model(Path(plan.models[0]))
    assert len(bench(replace(plan, seeds=(0, 1)), tmp_path / "out").rows) == 2
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 3
    assert seeds_shown(tmp_path / "out") == "2"


def test_an_editor_trained_again_or_a_class_changed_is_another_making(
    plan, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    facts, source = command_support.make_facts(4), tmp_path / "averaged_method.py"
    source.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: int = 1\n"
    )
    methods = {"mine": {"editor": str(tmp_path)}, "own": {"class": "averaged_method:Mine"}}
    made: dict[str, list[str]] = {name: [] for name in methods}
    for path in (tmp_path / "editor.json", tmp_path / "editor.safetensors", source):
        path.write_text(f"{path.read_text() if path == source else ''}# changed\n")
        for cell in replace(plan, methods=methods, seeds=(0, 1)).cells():
            made[cell.name].append(making(cell, facts, plan, tiny.loaded))
    assert {name: len(set(found)) for name, found in made.items()} == {"mine": 2, "own": 2}
    assert made["mine"][0] == made["mine"][1]  # two seeds
    cell = next(iter(plan.cells()))
    other = load_model(plan.models[0], "bfloat16")
    assert making(cell, facts, plan, tiny.loaded) != making(cell, facts, plan, other)
    assert making(cell, facts, plan, tiny.loaded) != making(cell, facts[1:], plan, tiny.loaded)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_with_other_files_beside_its_weights_is_another(name, plan, tmp_path):
    """What had been found with the old ones was shown as done, and averaged with the new."""
    bench(replace(plan, seeds=(0,)), tmp_path / "out")
    if name == "tokenizer.json":
        command_support.cut_otherwise(Path(plan.models[0]))
    else:
        path = Path(plan.models[0]) / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.5}))
    bench(replace(plan, seeds=(0, 1)), tmp_path / "out")
    assert len((tmp_path / "out" / "cells.jsonl").read_text().splitlines()) == 3
    assert seeds_shown(tmp_path / "out") == "2"


def test_methods_asked_about_other_facts_do_not_stand_side_by_side(plan, tmp_path):
    plan, out = replace(plan, seeds=(0,)), tmp_path / "out"
    two = {"ft": FT, "other": {**FT, "method": "ft", "rate": 0.02}}
    bench(replace(plan, methods=two), out)
    assert "| other |" in bench_table(out)
    Path(plan.facts).write_text(command_support.as_lines(command_support.make_facts(12, seed=9)))
    bench(plan, out)
    assert seeds_shown(out) == "1"
    assert "| other |" not in bench_table(out)
    bench(replace(plan, methods=two), out)
    assert "| other |" in bench_table(out)


def test_one_bench_at_a_time_runs_into_a_folder(plan, tmp_path):
    """The slower one found out when its cell was done, and lost it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "cells.jsonl").write_text("no row\n")  # nor is what is there looked at
    with only_writer(out), pytest.raises(MalmendError, match="Another run is writing"):
        bench(plan, out)
    (out / "cells.jsonl").unlink()
    assert len(bench(plan, out).rows) == 2


def test_bounds_of_sizes_do_not_part_rows(plan, tmp_path):
    bench(replace(plan, seeds=(0,)), tmp_path / "out")
    bench(replace(plan, seeds=(1,), methods={"ft": FT | {"most": 8}}), tmp_path / "out")
    assert seeds_shown(tmp_path / "out") == "2"


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([26.83, 26.85], "26.84 ± 0.01"),
        ([3.2e30], "3.2e+30"),
        ([3.2e30, 3.4e30], "3.3e+30 ± 1.4e+29"),
        ([1e100, 30.0], "over 5.0e+99"),
        ([1e100, 1e304], "over 1e+100"),
        ([1e100], "over 1e+100"),
    ],
)
def test_a_large_perplexity_is_short_and_read_back(found, shown, tmp_path):
    """An older row's, of 1e304, was refused, and the table had 300 digits of it."""
    results = Results(tmp_path)
    for seed, value in enumerate(found):
        one = row("ft", seed) | {"perplexity": {"unedited": 9.5, "edited": value}}
        results.add(str(seed), one)
    (line,) = [line for line in bench_table(tmp_path).splitlines() if "| ft |" in line]
    assert f"| {shown} |" in line


def row(name: str, seed: int) -> dict[str, Any]:
    scores = {"ES": {"token_ratio": 0.5}}
    return {
        "model": "m",
        "protocol": "together",
        "m": 4,
        "name": name,
        "seed": seed,
        "unedited": scores,
        "edited": scores,
        "edit_seconds": 2.0,
        "seconds": 3.0,
        "failures": [],
        "patch": {},
        "made": "made",
        "facts_sha256": "facts",
        "asked": [],
        "base": "base",
    }
