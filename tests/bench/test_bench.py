"""A plan from its file to its table: cells, what is kept, going on, and what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import command_support
import helpers
import malmend
from command_support import malmend as command
from malmend import workbench
from malmend.bench import asking as asking_module
from malmend.bench import cell as cell_module
from malmend.bench import making as making_module
from malmend.bench import run as bench_module
from malmend.bench.asking import Asking
from malmend.bench.cell import drawn, run_cell
from malmend.bench.making import key_of
from malmend.bench.plan import Plan, read_plan
from malmend.bench.planned_method import PlannedMethod, planned_method, source_of
from malmend.bench.results import NAME, Results
from malmend.bench.run import bench, bench_plot, bench_table
from malmend.bench.table import failures, markdown
from malmend.editors.checkpoint import save_editor
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import MalmendError
from malmend.methods.ft import FineTuning, FineTuningKL
from malmend.models.sites import find_sites
from malmend.numerics.moments import RunningMoments
from malmend.progress import silent

tiny = command_support.tiny
cache = command_support.cache

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "ft": {"epochs": 2, "layers": 1, "rate": 0.01},
    "by sums": {"method": "mend", "eta": 0.01, "layers": 2},
}


@pytest.fixture
def plan(tiny) -> Plan:
    return Plan((tiny.model,), tiny.facts, METHODS, sizes=(2, 4), seeds=(0, 1), decode=1)


# --- the plan


def write(path, **fields):
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_plan_reads_as_it_is_written(tmp_path):
    given = {"models": ["a"], "facts": "f", "methods": {"ft": None, "sum": {"method": "mend"}}}
    plan = read_plan(write(tmp_path / "plan.yaml", sizes=[4, 2], protocols=["alone"], **given))
    assert plan == Plan(
        ("a",), "f", {"ft": {}, "sum": {"method": "mend"}}, sizes=(4, 2), protocols=("alone",)
    )
    names = write(tmp_path / "names.yaml", models=["a"], facts="f", methods=["malmen", "ft"])
    assert read_plan(names).methods == {"malmen": {}, "ft": {}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sizs": [1]}, "unknown field 'sizs'; did you mean 'sizes'?"),
        ({"sizes": ["many"]}, r"plan\.yaml:\d+: sizes\[1\] is 'many', expected a whole number"),
        ({"sizes": [0]}, r"sizes\[1\] is 0, expected a whole number of at least 1"),
        ({"seeds": []}, "seeds is empty; give a list of whole numbers"),
        ({"single_above": "x"}, "single_above is 'x', expected a whole number"),
        ({"protocols": ["apart"]}, r"protocols\[1\] is 'apart', expected 'together' or"),
        ({"facts": None}, "facts is left empty"),
        ({"decode": -1}, "decode is -1, expected a whole number of at least 0"),
        ({"decode": None}, "decode is left empty"),
        ({"text": None}, "text is left empty"),
        ({"methods": {"ft": {"most": "x"}}}, "has most 'x', expected a number of facts"),
        ({"methods": {"ft": [3]}}, r"'ft' is \[3\], expected settings by name"),
        ({"methods": {"a": {3: 4}}}, "cannot be used|expected settings by name"),
        (
            {"methods": {"a": {"method": ["ft"]}}},
            "'a' is .*ft.*, expected one of malmen",
        ),
        ({"methods": {"ft": {"epochs": None}}}, "'ft' cannot be made: epochs is empty"),
        ({"methods": {"ft": {"epochs": 2.5}}}, "'ft' cannot be made: .*epochs"),
        ({"methods": {"ft": {"rate": "x" * 5000}}}, "rate is 'x{299,300}', expected a number"),
        ({"methods": {"lora": {"sites": 3, "rank": "a"}}}, "'lora' cannot be made: .*rank"),
        ({"methods": {"memit": {"blocks": 3}}}, "'memit' cannot be made: .*blocks"),
        ({"methods": {"context": {"shown": 1.5}}}, "'context' cannot be made: .*shown"),
        ({"methods": {"malmen": {"linear": "third"}}}, "'malmen' cannot be made: .*linear"),
        ({"methods": {"malmen": {"prior": "bogus"}}}, "'malmen' cannot be made: .*prior"),
        ({"methods": {"malmen": {"frames": "{prompt}"}}}, "'malmen' cannot be made: .*frames"),
        ({"methods": {"ft": {"editor": "e"}}}, "'ft' takes no editor"),
        ({"methods": {"ke": {"editor": "none"}}}, "'ke' is trained before it edits"),
        ({"methods": {"a": {"method": "enn", "editor": None}}}, "'a' is trained before it edits"),
        ({"methods": {"a": {"class": "os:path"}}}, "path is no dataclass"),
        (
            {"methods": {"fft": {"method": "fft"}}},
            "is 'fft', expected .*; did you mean 'ft'",
        ),
        ({"methods": {"ftt": {}}}, "'ftt' is none of malmen, .*; did you mean 'ft'"),
        ({"methods": {"memitt": {"most": 5}}}, "'memitt' is none of .*; did you mean 'memit'"),
        ({"methods": {"paper": {}}}, "'paper' is none of malmen, .* say what it is: method"),
        ({"methods": {"enn": {}}}, "'enn' is trained before it edits; run `malmend train"),
        ({"methods": {"a": {"method": "ke"}}}, "'a' is trained before it edits"),
        ({"methods": {"mend-single": {"passes": 1}}}, "mend-single is trained before it edits"),
        ({"methods": {"ft": {"epoch": 3}}}, "has no setting 'epoch'; did you mean 'epochs'"),
        ({"methods": {"ft": {"epochs": 0}}}, "ft.epochs is 0"),
        ({"methods": {"malmen": {"laiers": 3}}}, "has no setting 'laiers'; did you mean 'layers'"),
        ({"methods": {"malmen": {"stpes": 3}}}, "has no setting 'stpes'; did you mean 'steps'"),
        ({"methods": {"a": {"editor": "e", "layers": 3}}}, "names an editor, which brings its own"),
        ({"methods": {"a": {"class": "nowhere:Mine"}}}, "'nowhere:Mine', which cannot be imported"),
    ],
)
def test_faults_of_a_plan(change, said, tmp_path):
    fields = {"models": ["a"], "facts": "f", "methods": {"ft": {}}} | change
    with pytest.raises(MalmendError, match=said):
        read_plan(write(tmp_path / "plan.yaml", **fields))


@pytest.mark.parametrize("content", [None, "a: [", "- a", "\xff"])
def test_files_that_are_no_plan(content, tmp_path):
    path = tmp_path / "plan.yaml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        MalmendError, match=r"plan\.yaml( to be read|:1: is no YAML|:1: byte 0xff at| holds no)"
    ):
        read_plan(path)


def test_what_stands_under_a_name_becomes_settings():
    assert planned_method("ft", {"epochs": 7, "most": 64}).method == FineTuning(epochs=7)
    assert planned_method("held", {"method": "ft-kl"}).method == FineTuningKL()
    solved = planned_method("once", {"passes": 1, "frames": ["{prompt}!"]})
    assert (solved.editor, solved.settings) == ("auto", None)
    assert (solved.refine.passes, solved.refine.frames) == (1, ("{prompt}!",))
    free = planned_method("free", {"layers": 3, "linear": "first"})
    assert (free.editor, free.settings) == (
        "none",
        malmend.EditorSettings(layers=3, linear="first"),
    )
    assert planned_method("mend", {}).settings == malmend.EditorSettings(method="mend")
    for name in ("paper", "mend-single"):
        assert planned_method(name, {"editor": "runs/paper"}) == PlannedMethod(editor="runs/paper")
    for method in ("mend", "enn"):
        named = planned_method("a", {"method": method, "editor": "runs/a", "passes": 1})
        assert named == PlannedMethod(editor="runs/a", refine=RefineSettings(passes=1))
    summed = planned_method("a", {"method": "mend", "editor": "none"})
    assert (summed.editor, summed.settings) == ("none", malmend.EditorSettings(method="mend"))


def test_cells_small_ones_first_and_one_draw_above_a_size():
    plan = Plan(
        ("a",), "f", {"ft": {"most": 4}, "lora": {}}, (8, 4), (3, 5), 4, ("together", "alone")
    )
    found = [(cell.size, cell.seed, cell.protocol, cell.name) for cell in plan.cells()]
    both = [(p, n) for p in ("together", "alone") for n in ("ft", "lora")]
    assert found == [
        *((4, seed, *one) for seed in (3, 5) for one in both),
        *((8, 3, protocol, "lora") for protocol in ("together", "alone")),
    ]
    keys = {cell.key() for cell in plan.cells()}
    assert len(keys) == len(found)


def test_a_smaller_draw_begins_the_larger():
    facts = command_support.make_facts(20)
    assert drawn(facts, 5, 1) == drawn(facts, 12, 1)[:5]
    assert drawn(facts, 12, 1) != drawn(facts, 12, 2)
    assert len({fact.id for fact in drawn(facts, 20, 1)}) == 20


# --- running


def test_a_row_holds_what_edit_and_eval_say(plan, tiny, tmp_path):
    done = bench(
        replace(plan, sizes=(4,), seeds=(1,), methods={"ft": METHODS["ft"]}), tmp_path / "o"
    )
    (row,) = done.rows
    facts = drawn(list(malmend.read_facts(tiny.facts)), 4, 1)
    patch = malmend.edit(tiny.loaded, facts, method=FineTuning(**METHODS["ft"])).patch
    report = malmend.eval(tiny.loaded, facts, patch, decode_facts=1, text="none")
    for model, scores in (("unedited", report.unedited), ("edited", report.edited)):
        for kind, metrics in scores.items():
            for metric in ("token_ratio", "exact", "generated", "retention", "kl"):
                known, wanted = row[model][kind][metric], getattr(metrics, metric)
                assert known == (None if wanted is None else pytest.approx(wanted, abs=1e-6))
    assert row["patch"]["facts_sha256"] == patch.provenance["facts_sha256"]
    assert (row["m"], row["seed"], row["protocol"]) == (4, 1, "together")
    assert row["facts_sha256"] == row["patch"]["facts_sha256"]
    assert (row["base"], row["device"]) == (tiny.loaded.fingerprint, "cpu")
    assert row["threads"] == torch.get_num_threads()


def test_facts_alone_are_each_edited_and_asked_alone(plan, tiny, tmp_path):
    alone = replace(
        plan, sizes=(3,), seeds=(0,), protocols=("alone",), methods={"ft": METHODS["ft"]}
    )
    (row,) = bench(alone, tmp_path / "out").rows
    ratios, kept, asked = [], 0, 0
    for fact in drawn(list(malmend.read_facts(tiny.facts)), 3, 0):
        patch = malmend.edit(tiny.loaded, [fact], method=FineTuning(**METHODS["ft"])).patch
        report = malmend.eval(tiny.loaded, [fact], patch, decode_facts=0, text="none")
        ratios.append(report.edited["GS"].token_ratio)
        for before, after in zip(report.rows[0].unedited, report.rows[0].edited, strict=True):
            if before.kind == "LS":
                pairs = list(zip(before.predicted, after.predicted, strict=True))
                kept, asked = kept + sum(a == b for a, b in pairs), asked + len(pairs)
    assert row["edited"]["GS"]["token_ratio"] == pytest.approx(math.fsum(ratios) / 3)
    assert row["edited"]["LS"]["retention"] == pytest.approx(kept / asked)


def test_the_cost_is_said_again_when_smaller_cells_are_known(plan, tmp_path):
    said: list[str] = []
    bench(plan, tmp_path / "out", told=said.append)
    assert len(said) == 2  # sizes 2 and 4
    assert said[0].endswith("not known yet of ft, by sums.")
    assert re.fullmatch(r"8 cells, 4 to do: about \d+ minutes by what is done\.", said[1])


@pytest.mark.slow
def test_a_stopped_bench_goes_on_and_does_nothing_twice(plan, tmp_path, monkeypatch):
    ran, run = [], bench_module.run_cell

    def counted(asking, cell, *rest):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return run(asking, cell, *rest)

    monkeypatch.setattr(bench_module, "run_cell", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bench(plan, out)
    assert len((out / NAME).read_text().splitlines()) == 3
    monkeypatch.setattr(
        bench_module, "run_cell", lambda *given: (ran.append(given[1]), run(*given))[1]
    )
    told = []
    done = bench(plan, out, told=told.append)
    cells = list(plan.cells())
    assert ran == cells
    assert "8 cells, 5 to do: about 1 minutes by what is done" in told[0]
    assert [(row["name"], row["m"], row["seed"]) for row in done.rows] == [
        (cell.name, cell.size, cell.seed) for cell in cells
    ]
    again = bench(plan, out, told=told.append)
    assert (len(ran), told[-1]) == (8, "8 cells, all done.")
    assert again.rows == done.rows


def test_other_facts_settings_or_questions_are_other_cells(plan, tiny, tmp_path, monkeypatch):
    small = replace(plan, sizes=(2,), seeds=(0,), methods={"ft": METHODS["ft"]})
    ran = []
    run = bench_module.run_cell
    monkeypatch.setattr(bench_module, "run_cell", lambda *given: (ran.append(1), run(*given))[1])
    out = tmp_path / "out"
    bench(small, out)
    other = tmp_path / "facts.jsonl"
    other.write_text(command_support.as_lines(command_support.make_facts(12, seed=9)))
    more = METHODS["ft"] | {"epochs": 3}
    for count, changed in enumerate(
        [
            replace(small, decode=2),
            replace(small, facts=str(other)),
            replace(small, methods={"ft": more}),
        ],
        start=2,
    ):
        bench(changed, out)
        assert len(ran) == count
    text = tmp_path / "text.txt"
    for words in ("The capital of Kalo is here.\n", "Another text about Kalo.\n"):
        text.write_text(words * 20)
        bench(replace(small, text=str(text)), out)
    assert len(ran) == 6  # the same name, another text
    # A bound on sizes changes no figure.
    bench(replace(small, methods={"ft": METHODS["ft"] | {"most": 8}}), out)
    assert len(ran) == 6


def test_facts_that_only_stand_elsewhere_are_the_same_cell(plan):
    (cell,) = replace(plan, methods={"ft": {}}, sizes=(2,), seeds=(0,)).cells()
    facts = command_support.make_facts(4)
    key = key_of(cell, facts, plan)
    moved = [replace(one, line=one.line + 1, id=f"new {one.id}", tags=("a",)) for one in facts]
    assert key_of(cell, moved, plan) == key
    other = [replace(one, reversed=one.question) for one in facts]  # which is asked
    assert key_of(cell, other, plan) != key


def test_skipped_facts_are_told(plan, tmp_path, monkeypatch):
    class Reached(BaseException):  # which no cell's failure is
        pass

    def stop(*_given, **_options):
        raise Reached

    facts, told = Path(plan.facts), []
    again = tmp_path / "again.jsonl"
    first = json.loads(facts.read_text().splitlines()[0]) | {"id": "again"}
    again.write_text(facts.read_text() + json.dumps(first))
    monkeypatch.setattr(bench_module, "load_model", stop)
    with pytest.raises(Reached):
        bench(replace(plan, facts=str(again)), tmp_path / "out", told=told.append)
    assert told[0] == "Skipped 1 fact: 1 duplicate and 0 contradictions of earlier ones."


@pytest.mark.parametrize("given", [{"ft": {}}, {"malmen": {}}, {"a": {"editor": "none"}}])
def test_what_lies_in_the_working_folder_is_no_part_of_a_cell(given, plan, tmp_path, monkeypatch):
    """Without an editor the path of its files was once that of the working folder."""
    (cell,) = replace(plan, methods=given, sizes=(2,), seeds=(0,)).cells()
    facts = command_support.make_facts(4)
    key = key_of(cell, facts, plan)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "auto", tmp_path / "none"):
        folder.mkdir(exist_ok=True)
        (folder / "editor.json").write_text("stray")
    assert key_of(cell, facts, plan) == key


def test_another_editor_of_the_package_is_another_cell(plan, tmp_path, monkeypatch):
    about = tmp_path / "any" / "editor.json"
    about.parent.mkdir()
    monkeypatch.setattr(workbench, "shipped", lambda _name: tmp_path)
    facts = command_support.make_facts(4)
    keys: dict[str, list[str]] = {}
    methods = {"auto": {"passes": 1}, "none": {"layers": 2}, "ft": {}}
    for content in ("one", "other"):
        about.write_text(content)
        for cell in replace(plan, methods=methods, sizes=(2,), seeds=(0,)).cells():
            keys.setdefault(cell.name, []).append(key_of(cell, facts, plan))
    assert {name: len(set(found)) for name, found in keys.items()} == {
        "auto": 2,
        "none": 1,
        "ft": 1,
    }


@pytest.mark.parametrize(
    ("source", "said"),
    [("class Mine(:", "invalid syntax"), ("nothing\n", "name 'nothing' is not defined")],
)
def test_a_class_of_a_broken_module_is_refused(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    (tmp_path / "broken_method.py").write_text(source)
    before = list(sys.path)
    with pytest.raises(MalmendError, match=f"cannot be imported .*{said}") as caught:
        planned_method("mine", {"class": "broken_method:Mine"})
    assert "\n" not in str(caught.value)
    assert sys.path == before


def test_a_class_of_the_working_folder_leaves_no_trace_in_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    before = list(sys.path)
    (tmp_path / "lone_method.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: int = 1\n"
    )
    assert planned_method("mine", {"class": "lone_method:Mine", "x": 3}).method.x == 3
    assert source_of("lone_method:Mine") == tmp_path / "lone_method.py"
    assert sys.path == before


def test_another_editor_in_the_same_folder_is_another_cell(plan, tmp_path):
    plan = replace(plan, methods={"mine": {"editor": str(tmp_path)}}, sizes=(2,), seeds=(0,))
    (cell,) = plan.cells()
    facts, keys = command_support.make_facts(4), set()
    for name, content in (("editor.json", "a"), ("editor.json", "b"), ("editor.safetensors", "c")):
        (tmp_path / name).write_text(content)
        keys.add(key_of(cell, facts, plan))
    assert len(keys) == 3


def test_a_half_written_line_is_lost_and_a_foreign_one_refused(tmp_path):
    first = json.dumps({"key": "a", **ROWS[0]})
    (tmp_path / NAME).write_text(first + '\n{"key": "b", "m"')
    results = Results(tmp_path)
    assert list(results.rows) == ["a"]
    results.add("c", {**ROWS[1], "x": float("nan")})
    assert [json.loads(line)["key"] for line in (tmp_path / NAME).read_text().splitlines()] == [
        "a",
        "c",
    ]
    assert Results(tmp_path).rows["c"]["x"] is None
    for wrong in ("[]", '{"key": "a"}', "{"):
        (tmp_path / NAME).write_text(first + f"\n{wrong}\n")
        with pytest.raises(MalmendError, match=r"cells\.jsonl:2: is no row of a bench"):
            Results(tmp_path)


def test_more_facts_than_there_are(plan, tmp_path):
    with pytest.raises(MalmendError, match=r"edits 40 facts and .* has 12; give smaller sizes"):
        bench(replace(plan, sizes=(40,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ("smollm2-135n",)}, "no model 'smollm2-135n'; did you mean 'smollm2-135m'"),
        ({"methods": {"ft": {}, "paper": {"editor": "runs/none"}}}, "no editor in runs/none"),
        ({"text": "nowhere.txt"}, r"nowhere\.txt"),
        (
            {"models": ("no/a", "no/b"), "methods": {"p": {"editor": "no/c"}}, "text": "no/d"},
            r"(?s)^What the plan names cannot be used: 4 faults\n.*no/a.*no/b.*no/c.*no/d",
        ),
    ],
)
def test_what_is_not_there_is_said_before_a_model_is_loaded(
    change, said, plan, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        bench_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    with pytest.raises(MalmendError, match=said):
        bench(replace(plan, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{"name": "mend"}, {"name": "a", "method": "enn"}])
def test_a_folder_of_another_method_than_the_plan_says(given, plan, tmp_path):
    name = given.pop("name")
    layers = {"b.0": (3, 4)}
    known = {"b.0": SiteStatistics(RunningMoments(4), RunningMoments(3))}
    made = Editor(EditorSettings(prior="identity"), layers, known)
    save_editor(made, {}, tmp_path / "editor")
    methods = {name: {**given, "editor": str(tmp_path / "editor")}}
    said = f"'{name}' is (mend|enn), and .*editor holds an editor of the method malmen"
    with pytest.raises(MalmendError, match=said):
        bench(replace(plan, methods=methods), tmp_path / "out")


def test_no_such_device(plan, tmp_path):
    with pytest.raises(MalmendError, match="--device is 'gpu', expected cpu"):
        bench(plan, tmp_path / "out", device="gpu")
    assert not (tmp_path / "out").exists()


# --- tables and figures


def row(name: str, m: int, seed: int, es: float, gs: float | None = None) -> dict:
    def scores(value):
        return {"ES": {"token_ratio": value}, "GS": {"token_ratio": gs}, "LS": {"token_ratio": 0.5}}

    said = {"kind": "ES", "prompt": "a | b", "wanted": "c", "unedited": "d", "edited": "e\nf"}
    return {
        "model": "model",
        "name": name,
        "protocol": "together",
        "m": m,
        "seed": seed,
        "unedited": scores(0.1),
        "edited": scores(es),
        "edit_seconds": 2.0,
        "seconds": 3.0,
        "failures": [said],
        "patch": {},
        "made": "made",
        "facts_sha256": "facts",
        "asked": [],
        "base": "base",
    }


ROWS = [row("one", 16, 0, 0.9), row("one", 16, 1, 0.7), row("two", 16, 0, 0.5), row("one", 4, 0, 1)]


def test_the_table_has_means_deviations_and_the_unedited_model():
    lines = markdown(ROWS).splitlines()
    assert lines[0] == "**model**, all facts at once"
    assert lines[2] == "| m | method | ES | LS | edit s | seeds |"  # nothing of GS was asked
    assert lines[4:] == [
        "| 4 | *unedited* | 0.100 | 0.500 |  | 1 |",
        "| 4 | one | 1.000 | 0.500 | 2 | 1 |",
        "| 16 | *unedited* | 0.100 ± 0.000 | 0.500 ± 0.000 |  | 2 |",
        "| 16 | one | 0.800 ± 0.141 | 0.500 ± 0.000 | 2 | 2 |",
        "| 16 | two | 0.500 | 0.500 | 2 | 1 |",
    ]


def test_the_table_has_the_perplexity_of_rows_that_have_one():
    text = {"perplexity": {"unedited": 26.83, "edited": 29.371}}
    lines = markdown([ROWS[0] | text, ROWS[1] | text, ROWS[2] | {"perplexity": {}}]).splitlines()
    assert lines[2] == "| m | method | ES | LS | perplexity | edit s | seeds |"
    assert lines[4:] == [
        "| 16 | *unedited* | 0.100 ± 0.000 | 0.500 ± 0.000 | 26.83 ± 0.00 |  | 2 |",
        "| 16 | one | 0.800 ± 0.141 | 0.500 ± 0.000 | 29.37 ± 0.00 | 2 | 2 |",
        "| 16 | two | 0.500 | 0.500 |  | 2 | 1 |",
    ]


def test_one_models_perplexity_makes_no_column_for_another():
    other = ROWS[0] | {"model": "other", "perplexity": {"unedited": 26.83, "edited": 29.371}}
    heads = [one for one in markdown([ROWS[0], other]).splitlines() if one.startswith("| m ")]
    assert [("perplexity" in head) for head in heads] == [False, True]


def test_failures_are_shown_of_the_largest_cell():
    lines = failures(ROWS).splitlines()
    assert lines[2:-2] == [
        "| one | 16 | ES | a \\| b | c | d | e f |",
        "| two | 16 | ES | a \\| b | c | d | e f |",
    ]
    said = dict(ROWS[0]["failures"][0])
    many = [said | {"kind": kind, "prompt": str(i)} for kind in ("ES", "LS") for i in range(5)]
    lines = failures([ROWS[0] | {"failures": many}]).splitlines()
    assert [line.split(" | ")[2:4] for line in lines[2:-2]] == [
        [kind, prompt] for kind in ("ES", "LS") for prompt in "012"
    ]


def test_what_the_table_of_failures_leaves_out_is_said():
    long = dict(ROWS[0]["failures"][0]) | {"prompt": "start " + "of it | " * 400 + "end"}
    lines = failures([ROWS[0] | {"failures": [long]}]).splitlines()
    prompt = lines[2].split(" | ", 4)[3]
    assert lines[2].startswith("| one | 16 | ES | start of it \\| ")
    assert " … " in lines[2]
    assert "end | c | d | e f |" in lines[2]
    assert len(prompt) < 200
    assert lines[3] == ""
    assert "of each kind the first 3 at most" in lines[4]


def test_a_figure_that_not_every_seed_has_says_of_how_many_it_is():
    text = {"perplexity": {"unedited": 26.83, "edited": 29.371}, "patch": {"mean_residual": 0.5}}
    lines = markdown([ROWS[0] | text, ROWS[1]]).splitlines()
    assert lines[2] == "| m | method | ES | LS | perplexity | residual | edit s | seeds |"
    assert "| 26.83 (of 1) |  |  | 2 |" in lines[4]
    assert lines[5].endswith("| 0.500 ± 0.000 | 29.37 (of 1) | 0.5 (of 1) | 2 | 2 |")


def test_failures_are_of_every_kind_and_are_what_eval_says(plan, tiny, tmp_path):
    one = replace(plan, sizes=(4,), seeds=(0,), decode=0, methods={"ft": METHODS["ft"]})
    (row,) = bench(one, tmp_path / "out").rows
    facts = drawn(list(malmend.read_facts(tiny.facts)), 4, 0)
    patch = malmend.edit(tiny.loaded, facts, method=FineTuning(**METHODS["ft"])).patch
    report = malmend.eval(tiny.loaded, facts, patch, decode_facts=0, text="none")
    replies = [reply for fact in report.rows for reply in fact.edited]
    wanted = [
        (kind, reply.question.prompt)
        for kind in ("ES", "GS", "LS")
        for reply in replies
        if reply.kind == kind and (reply.moved if kind == "LS" else reply.exact == 0.0)
    ]
    assert [(one["kind"], one["prompt"]) for one in row["failures"]] == wanted
    assert {kind for kind, _ in wanted} >= {"GS", "LS"}
    moved = [one for one in row["failures"] if one["kind"] == "LS"]
    assert all(one["unedited"] != one["edited"] for one in moved)


@pytest.mark.parametrize("most", [[5, 3], [3, 5]])
def test_of_facts_alone_the_most_memory_of_all_is_kept(plan, tiny, monkeypatch, most):
    taken = iter(most)

    @contextmanager
    def peak_memory():
        yield SimpleNamespace(most=next(taken))

    monkeypatch.setattr(cell_module, "peak_memory", peak_memory)
    given = {"ft": METHODS["ft"]}
    (cell,) = replace(plan, sizes=(2,), seeds=(0,), protocols=("alone",), methods=given).cells()
    done = run_cell(Asking(tiny.loaded, plan), cell, command_support.make_facts(2), silent)
    assert done["edit_bytes"] == 5


def test_a_mixture_of_experts_is_compared_by_methods_that_need_no_usual_layer(plan, tmp_path):
    tokenizer = helpers.byte_level()
    for part in (helpers.mixture(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "mixture")
    text = tmp_path / "text.txt"
    text.write_text("Nothing of note happened. " * 5)
    methods = {"lora": {"sites": "*.self_attn.o_proj", "epochs": 1}, "context": {}}
    given = {"models": (str(tmp_path / "mixture"),), "methods": methods, "text": str(text)}
    rows = bench(replace(plan, **given, sizes=(2,), seeds=(0,)), tmp_path / "out").rows
    assert [row["name"] for row in rows] == ["lora", "context"]
    assert set(rows[0]["perplexity"]) == {"unedited", "edited"}
    assert rows[0]["unedited"] == rows[1]["unedited"]


def test_without_matplotlib_it_is_said_how_to_have_it(monkeypatch, tmp_path):
    Results(tmp_path).add("0", ROWS[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MalmendError, match="run pip install matplotlib"):
        bench_plot(tmp_path)


def test_figures_are_drawn_and_hold_the_points(tmp_path):
    results = Results(tmp_path)
    for index, one in enumerate(ROWS):
        results.add(str(index), one)
    png, svg = bench_plot(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    from malmend.bench.plot import _drawn
    from malmend.bench.table import groups

    drawn_figure = _drawn({key[2:]: some for key, some in groups(ROWS).items()}, "t")
    panels = {axis.get_title(): axis for axis in drawn_figure.axes}
    assert list(panels) == [
        "ES (token ratio)",
        "LS (token ratio; dotted: unedited)",
        "seconds to edit",
    ]
    lines = {line.get_label(): line for line in panels["ES (token ratio)"].get_lines()}
    assert list(lines["one"].get_xdata()) == [4, 16]
    band = panels["ES (token ratio)"].collections[0].get_paths()[0].vertices
    of_16 = sorted({round(y, 6) for x, y in band if x == 16})
    assert of_16 == pytest.approx([0.8 - 0.141421, 0.8 + 0.141421], abs=1e-5)
    assert list(lines["one"].get_ydata()) == pytest.approx([1.0, 0.8])


def test_of_a_single_size_the_unedited_level_is_seen():
    """A line through one point is none."""
    from malmend.bench.plot import _drawn
    from malmend.bench.table import groups

    seen = {}
    for rows in (ROWS, [row for row in ROWS if row["m"] == ROWS[0]["m"]]):
        drawn = _drawn({key[2:]: some for key, some in groups(rows).items()}, "t")
        panel = next(axis for axis in drawn.axes if "dotted" in axis.get_title())
        line = next(one for one in panel.get_lines() if one.get_label() == "_unedited")
        seen[len(line.get_xdata())] = line.get_marker()
    assert seen == {2: "None", 1: "_"}


def test_an_empty_folder_has_no_table(tmp_path):
    with pytest.raises(MalmendError, match=r"no cells\.jsonl with a finished cell in"):
        bench_table(tmp_path)


def test_as_a_command(plan, tiny, tmp_path, capsys):
    path = write(
        tmp_path / "plan.yaml",
        models=[tiny.model],
        facts=tiny.facts,
        sizes=[2],
        methods={"ft": METHODS["ft"]},
    )
    out = tmp_path / "out"
    assert command("bench", path, "--out", out) == 0
    shown = capsys.readouterr()
    assert "1 cell, 1 to do" in shown.err
    assert "ft, m 2, together, seed 0: ES 0." in shown.err
    assert command("bench", "table", out) == 0
    assert capsys.readouterr().out == shown.out
    assert shown.out.startswith(f"**{tiny.model}**, all facts at once")
    assert command("bench", "table", out, "--failed") == 0
    assert "| ft | 2 | " in capsys.readouterr().out
    assert command("bench", "plot", out) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert command("bench", tmp_path / "none.yaml", "--out", out) == 2
    assert command("bench", "table", tmp_path / "none") == 2


def test_the_method_of_the_documentation_works_as_it_stands(plan, tmp_path, monkeypatch):
    docs = (ROOT / "docs" / "bench.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    assert len(code.splitlines()) < 60
    (tmp_path / "mymodule_of_docs.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    mine = {"class": "mymodule_of_docs:MyMethod", "share": 0.5, "layers": 1}
    (row,) = bench(replace(plan, sizes=(2,), seeds=(0,), methods={"mine": mine}), "out").rows
    assert row["patch"]["method"] == "mine"
    assert row["patch"]["settings"]["share"] == 0.5
    assert row["edited"]["LS"]["kl"] > 0


def test_the_plan_of_the_documentation_reads(tmp_path):
    docs = (ROOT / "docs" / "bench.md").read_text()
    (written,) = re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)
    given = yaml.safe_load(written)
    del given["methods"]["mine"]  # whose module is the reader's own
    plan = read_plan(write(tmp_path / "plan.yaml", **given))
    assert plan.methods["memit"] == {"most": 256}
    assert len(list(plan.cells())) == 3 * 3 * 9 + 1 * 8


@pytest.mark.parametrize("name", ["ablations", "alone", "mend-appendix", "methods"])
def test_the_plans_of_the_results_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # from where a class of benchmarks/ is found
    found = read_plan(ROOT / f"benchmarks/plans/{name}.yaml")
    assert list(found.cells())


def test_settings_may_be_nested(tmp_path):
    descended = planned_method("a", {"descent": {"steps": 2}}).settings
    assert descended.descent.steps == 2
    assert planned_method("a", {"descent": None}).settings.descent is None


def test_a_plan_without_a_cell_is_refused(plan, tmp_path):
    with pytest.raises(MalmendError, match="has no cell"):
        bench(replace(plan, methods={"ft": {"most": 1}}), tmp_path / "out")


def test_other_settings_under_one_name_are_never_averaged(plan, tmp_path):
    out, small = tmp_path / "out", replace(plan, sizes=(2,))
    bench(replace(small, methods={"ft": METHODS["ft"]}), out)
    bench(replace(small, seeds=(0,), methods={"ft": METHODS["ft"] | {"epochs": 3}}), out)
    (line,) = [line for line in bench_table(out).splitlines() if "| ft |" in line]
    assert line.endswith("| 1 |")
    assert "±" not in line


def test_what_was_done_under_other_defaults_is_done_again_and_never_averaged(
    plan, tmp_path, monkeypatch
):
    out, small = tmp_path / "out", replace(plan, sizes=(2,), methods={"ft": METHODS["ft"]})
    first = bench(small, out).rows
    monkeypatch.setattr(making_module, "UNSAID", [2, *making_module.UNSAID[1:]])
    (again,) = bench(replace(small, seeds=(0,)), out).rows
    assert again["key"] not in {row["key"] for row in first}
    (line,) = [line for line in bench_table(out).splitlines() if "| ft |" in line]
    assert line.endswith("| 1 |")


@pytest.mark.parametrize(
    ("given", "size", "settles"),
    [
        ({"malmen": {"rounds": 0.0}}, 129, False),
        ({"malmen": {"rounds": 2.0, "steps": 50}}, 2, True),
        ({"malmen": {}}, 128, False),
        ({"malmen": {}}, 129, True),
        ({"malmen": {"passes": 1}}, 129, False),
        ({"ft": METHODS["ft"]}, 129, False),
        ({"context": {}}, 129, False),
    ],
)
def test_how_edits_settle_counts_where_they_do(plan, monkeypatch, given, size, settles):
    cells = replace(plan, methods=given, sizes=(size,)).cells()
    cell = next(one for one in cells if one.protocol == "together")
    before = making_module.unsaid(cell)
    monkeypatch.setattr(making_module, "SETTLING", [7, *making_module.SETTLING[1:]])
    assert (making_module.unsaid(cell) != before) is settles


def test_facts_alone_are_few(plan):
    cell = next(iter(replace(plan, methods={"malmen": {}}, sizes=(129,)).cells()))
    assert making_module.unsaid(replace(cell, protocol="alone")) == making_module.UNSAID


def test_another_draw_or_decode_is_asked_anew(tiny):
    asking = Asking(tiny.loaded, Plan(("m",), "f", {"ft": {}}))
    facts = command_support.make_facts(2)
    patch = malmend.edit(tiny.loaded, facts, method=FineTuning(**METHODS["ft"])).patch
    for decode in (0, 1, 2, 0):
        rows = asking.patched(facts, patch, decode).rows
        spoken = [row.unedited[0].generated is not None for row in rows]
        assert spoken == [at < decode for at in range(2)]
        assert [row.edited[0].generated is not None for row in rows] == spoken


def test_text_is_read_once_unedited_and_not_for_facts_alone(tiny, tmp_path, monkeypatch):
    (text := tmp_path / "text").write_text("In Ora lies a hall.\n" * 9)
    read = list[bool]()
    own = asking_module.perplexity

    def noted(loaded, trunk, words):
        weight = find_sites(loaded.model)[-1].weight
        read.append(torch.equal(weight, plain))
        return own(loaded, trunk, words)

    plain = find_sites(tiny.loaded.model)[-1].weight.detach().clone()
    monkeypatch.setattr(asking_module, "perplexity", noted)
    way = {"ft": {**METHODS["ft"]}}
    plan = Plan(("m",), "f", way, sizes=(2,), protocols=("alone", "together"), text=str(text))
    asking = Asking(tiny.loaded, plan)
    for seed in (0, 1):
        facts = command_support.make_facts(2, seed=seed)
        rows = {c.protocol: run_cell(asking, c, facts, silent) for c in plan.cells()}
        assert rows["alone"]["perplexity"] == {}
        assert rows["together"]["perplexity"].keys() == {"unedited", "edited"}
    assert read == [True, False, False]


def test_two_benches_in_one_folder_lose_nothing(tmp_path):
    one, other = Results(tmp_path), Results(tmp_path)
    one.add("a", ROWS[0])
    with pytest.raises(MalmendError, match="another bench writes to it"):
        other.add("b", ROWS[1])
    one.add("c", ROWS[2])
    assert list(Results(tmp_path).rows) == ["a", "c"]


def test_a_changed_model_or_class_is_another_cell(plan, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, source = tmp_path / "model.safetensors", tmp_path / "changing_method.py"
    source.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    x: int = 1\n"
    )
    mine = {"mine": {"class": "changing_method:Mine"}}
    (cell,) = replace(plan, models=(str(tmp_path),), methods=mine, sizes=(2,), seeds=(0,)).cells()
    facts, keys = command_support.make_facts(4), set()
    for path, content in ((weights, "a"), (weights, "bc"), (source, "# other\n")):
        path.write_text(content)
        keys.add(key_of(cell, facts, plan))
    assert len(keys) == 3
