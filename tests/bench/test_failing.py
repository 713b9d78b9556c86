"""Cells that fail stop no other, are named at the end, and are tried again by the next run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import command_support
from malmend.bench import run as bench_module
from malmend.bench.plan import Plan
from malmend.bench.results import Results
from malmend.bench.run import bench
from malmend.errors import MalmendError

tiny = command_support.tiny
cache = command_support.cache


@pytest.fixture
def plan(tiny, cache) -> Plan:
    free = {"epochs": 5, "layers": 1}
    methods = {"bad": {"method": "ft", **free, "rate": 1e12}, "ft": {**free, "rate": 0.01}}
    return Plan((tiny.model,), tiny.facts, methods, sizes=(2, 3))


def names(folder) -> list[tuple[str, int]]:
    return [(row["name"], row["m"]) for row in Results(folder).rows.values()]


def test_the_other_cells_are_done_first(plan, tmp_path):
    told: list[str] = []
    with pytest.raises(MalmendError) as caught:
        bench(plan, tmp_path, told=told.append)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("2 of 4 cells failed; the same command tries them again")
    assert [line.split(": ")[0] for line in lines] == [
        f"  {plan.models[0]}, bad, m {size}, together, seed 0" for size in (2, 3)
    ]
    assert all("NaN or infinity" in line for line in lines)
    assert [line.strip() for line in lines] == [one[8:] for one in told if one[:8] == "Failed: "]
    assert names(tmp_path) == [("ft", 2), ("ft", 3)]


def test_a_rerun_tries_them_again_and_only_them(plan, tmp_path, monkeypatch):
    ran, run = [], bench_module.run_cell

    def short_of_memory(asking, cell, *rest):
        ran.append((cell.name, cell.size))
        if cell.name == "bad":
            raise MemoryError
        return run(asking, cell, *rest)

    monkeypatch.setattr(bench_module, "run_cell", short_of_memory)
    with pytest.raises(MalmendError, match=r"2 of 4 cells failed(.|\n)*memory"):
        bench(plan, tmp_path)
    assert len(ran) == 4
    with pytest.raises(MalmendError, match="2 of 4 cells failed"):
        bench(plan, tmp_path)
    assert ran[4:] == [("bad", 2), ("bad", 3)]


def test_a_model_that_cannot_be_loaded_stops_no_other(plan, tmp_path, monkeypatch):
    load = bench_module.load_model
    monkeypatch.setattr(bench_module, "load_config", lambda name: None)
    monkeypatch.setattr(bench_module, "load_model", lambda name, device: load(name, device=device))
    both = Plan(("no/such/model", *plan.models), plan.facts, {"ft": plan.methods["ft"]}, (2,))
    with pytest.raises(MalmendError, match=r"1 of 2 cells failed(.|\n)*no/such/model, ft, m 2"):
        bench(both, tmp_path)
    assert names(tmp_path) == [("ft", 2)]


@pytest.mark.parametrize("name", ["config.json", "ledger.sqlite", "editor.json"])
def test_results_are_not_mixed_with_what_is_read(plan, tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(MalmendError, match=r"holds an? \w+ already; give another --out\."):
        bench(plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (torch.linalg.LinAlgError("not positive\nat all"), "_LinAlgError: not positive"),
        (ValueError(), "ValueError"),
        (MalmendError("So it is.\nIn full."), "So it is."),
        (MemoryError("x"), "there was not enough memory"),
    ],
)
def test_whatever_a_method_raises_stops_no_other(plan, tmp_path, monkeypatch, error, said):
    """Once only what malmend raises on purpose, and a lack of memory."""
    run = bench_module.run_cell

    def run_or_raise(asking, cell, *rest):
        if cell.name == "bad":
            raise error
        return run(asking, cell, *rest)

    monkeypatch.setattr(bench_module, "run_cell", run_or_raise)
    with pytest.raises(MalmendError) as caught:
        bench(replace(plan, sizes=(2,)), tmp_path)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.endswith(f"bad, m 2, together, seed 0: {said}")
    assert names(tmp_path) == [("ft", 2)]


def test_an_interrupt_stops_all(plan, tmp_path, monkeypatch):
    def interrupt(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "run_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench(plan, tmp_path)
