from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import command_support
from command_support import files_in, malmend
from malmend import ledger
from malmend.cli.ledger import ACTIONS
from malmend.cli.run import COMMANDS
from malmend.commands.ask import ask
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, published, published_mend
from malmend.editors.train_settings import (
    TrainSettings,
    published_mend_training,
    published_training,
)
from malmend.models.descent import Descent
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch
from malmend.patch_file import load_patch, save_patch

tiny = command_support.tiny
cache = command_support.cache
reached = command_support.reached

SMALL = ["--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 2]

TRUNK = {"--trunk", "--trunk.batch-tokens", "--trunk.store-bytes"}
MODEL = {"-h", "--help", "--dtype"}
FACTS = {"--limit", "--strict", "--alternative", "--away"}
CALIBRATION = {"--calibrate", "--text"}
WITH_MODEL = TRUNK | {"-h", "--help", "--model", "--author", "--wait"}
EDITOR = {
    "--method",
    "--form",
    "--layers",
    "--linear",
    "--side",
    "--sites",
    "--tokens",
    "--end-of-answer",
    "--end-weight",
    "--descent",
    "--descent.help",
    "--prior",
    "--eta",
}
_TUNED = ("layers", "rate", "decay", "epochs", "batch", "locality", "seed", "end-of-answer")
METHODS = {
    "ft": _TUNED,
    "ft-kl": _TUNED,
    "lora": ("rank", "alpha", "rate", "epochs", "batch", "sites", "seed", "end-of-answer"),
    "memit": (
        *("blocks", "steps", "rate", "kl", "clamp", "decay", "alpha", "prefixes", "text-tokens"),
        *("seed", "end-of-answer"),
    ),
    "ultraedit": ("eta", "ridge", "batch", "layers", "linear", "tokens", "end-of-answer"),
}
TRAINED = {
    "enn": (
        *("layers", "inner-steps", "inner-rate", "c-edit", "c-loc", "rate", "scalar-rate", "clip"),
        *("steps", "facts-per-step", "seed", "save-every", "end-of-answer"),
    ),
    "ke": (
        *("layers", "hidden", "start", "margin", "decay", "floor", "rate", "multiplier-rate"),
        *("steps", "facts-per-step", "seed", "save-every", "end-of-answer"),
    ),
}
# Every command, and of the ledger its actions.
SHOWN = {name: what for name, (_, what) in COMMANDS.items() if name != "ledger"}
SHOWN |= {f"ledger {name}": what for name, (_, what) in ACTIONS.items()}
# The whole public surface: a change here is a change for users.
OPTIONS = {
    "edit": MODEL
    | FACTS
    | TRUNK
    | CALIBRATION
    | EDITOR
    | {f"--{method}" for method in METHODS}
    | {f"--{method}.{field}" for method, fields in METHODS.items() for field in fields}
    | {
        "--out",
        "--editor",
        "--report",
        "--refine",
        "--refine.passes",
        "--refine.frames",
        "--refine.gain",
        "--refine.chat-gain",
        "--refine.restore",
        "--refine.rounds",
        "--refine.steps",
        "--refine.wordings",
        "--refine.hold",
        "--refine.around",
        "--memory",
        "--device",
    },
    "train": MODEL
    | FACTS
    | TRUNK
    | CALIBRATION
    | EDITOR
    | {f"--{method}" for method in TRAINED}
    | {f"--{method}.{field}" for method, fields in TRAINED.items() for field in fields}
    | {
        "--config",
        "--out",
        "--paper",
        "--locality",
        "--network",
        "--network.rank",
        "--network.blocks",
        "--network.placement",
        "--network.start",
        "--network.identity",
        "--network.normalise",
        "--facts-per-step",
        "--halvings",
        "--steps",
        "--locality-weight",
        "--near",
        "--network-rate",
        "--scalar-rate",
        "--clip",
        "--chunk",
        "--seed",
        "--save-every",
        "--memory",
        "--device",
    },
    "eval": MODEL
    | FACTS
    | TRUNK
    | {
        "--patch",
        "--chat",
        "--decode-facts",
        "--text",
        "--report",
        "--force",
        "--json",
        "--device",
    },
    "ask": MODEL | {"--patch", "--chat", "--max-new-tokens", "--force", "--device"},
    "continuations": {
        *("-h", "--help", "--out", "--tokens", "--prompt-tokens", "--limit"),
    },
    "finetune": {
        *("-h", "--help", "--out", "--asked", "--end-of-answer", "--limit", "--rate", "--batch"),
        *("--epochs", "--validation", "--patience", "--until", "--seed", "--device"),
    },
    "bench": {"-h", "--help", "--out", "--device"},
    "export": TRUNK
    | {"-h", "--help", "--to", "--model", "--rank", "--dtype", "--facts", "--limit"}
    | {"--decode-facts", "--text", "--force"},
    "push": {"-h", "--help", "--private"},
    "diff": MODEL | {"--out"},
    "conflicts": MODEL | TRUNK | {"--facts", "--limit", "--decode-facts", "--force", "--device"},
    "ledger init": MODEL
    | TRUNK
    | CALIBRATION
    | EDITOR
    | {"--editor", "--author", "--rule", "--rule.retention", "--rule.questions", "--rule.refuse"}
    | {"--device", "--frames"},
    "ledger add": WITH_MODEL | FACTS | {"--skip-known", "--device"},
    "ledger replace": WITH_MODEL | FACTS - {"--away"} | {"--device"},
    "ledger verify": WITH_MODEL - {"--author"} | {"--device"},
    "ledger revoke": {"-h", "--help", "--author", "--wait"},
    "ledger rollback": {"-h", "--help", "--author", "--wait"},
    "ledger list": {"-h", "--help", "--former", "--out"},
    "ledger history": {"-h", "--help"},
    "ledger patch": {"-h", "--help", "--out"},
    "inspect": MODEL | {"--layers", "--linear", "--side", "--sites"},
    "cache": {"-h", "--help", "--clear"},
    "demo": {"-h", "--help", "--out", "--model", "--facts", "--spoken", "--device"},
}


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        malmend(*command.split(), "--help")
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", SHOWN)
def test_the_options_of_every_command(command, capsys):
    shown = help_of(command, capsys)
    rows = re.findall(r"^  (-.*?)(?:  |$)", shown, re.MULTILINE)
    shown_options = {found for row in rows for found in re.findall(r"(?<!\w)-[-\w.+]+", row)}
    assert shown_options == OPTIONS[command]
    assert not re.search(r"--\w+_\w", shown)  # options are written with hyphens
    assert not re.search(r"``|:\w+:`|\(equation|\(1\d\)", shown)  # docstrings' own marks
    assert not re.search(r"\bNone\b", shown)  # what is accepted is null


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("edit", "MODEL FACTS --out OUT [options]"),
        ("finetune", "MODEL FACTS ... --out OUT [options]"),
        ("ledger revoke", "LEDGER IDS ... [options]"),
        ("cache", "[options]"),
    ],
)
def test_the_first_line_says_what_must_be_given(command, usage, capsys):
    assert help_of(command, capsys).splitlines()[0] == f"usage: malmend {command} {usage}"


@pytest.mark.parametrize("command", ["edit", "train", "export"])
def test_help_is_no_python(command, capsys):
    assert not re.search(r"Union|Literal|Optional", help_of(command, capsys))


@pytest.mark.parametrize("command", SHOWN)
def test_every_option_is_explained(command, capsys):
    shown = help_of(command, capsys)
    assert SHOWN[command] in " ".join(shown.split())
    entries = re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]
    for entry in entries:
        text = " ".join(entry.split())
        assert len(re.sub(r"\((type|required).*|-\S+|\{.*?\}|\b[A-Z_]+\b", "", text).split()) > 1, (
            text
        )


def test_the_ledger_shows_its_actions(capsys):
    assert malmend("ledger") == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and what in shown for name, (_, what) in ACTIONS.items())
    assert malmend("ledger", "--help") == 0
    assert capsys.readouterr().out == shown


def test_without_a_command_the_usage_is_shown(capsys):
    assert malmend() == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and what in shown for name, (_, what) in COMMANDS.items())
    for word in ("help", "-h", "--help"):
        assert malmend(word) == 0
        assert capsys.readouterr().out == shown


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version(word, capsys):
    assert malmend(word) == 0
    assert capsys.readouterr().out == f"malmend {version('malmend')}\n"


def test_edit_evaluate_and_ask(tiny, tmp_path, capsys):
    patch, report = tmp_path / "patch.safetensors", tmp_path / "report.json"
    assert malmend("edit", tiny.model, tiny.facts, "--out", patch, "--limit", 3, *tiny.fast) == 0
    shown = capsys.readouterr().out
    assert "Edited 3 facts at 6 layers" in shown
    assert "patch.safetensors" in shown.replace("\n", "")
    assert load_patch(patch).provenance["facts"] == 3

    arguments = ["--patch", patch, "--json", report, "--text", tiny.text, "--limit=3"]
    assert malmend("eval", tiny.model, tiny.facts, *arguments) == 0
    shown = capsys.readouterr().out
    for word in ("token ratio", "exact", "generated", "retention", "kl", "perplexity", "edited"):
        assert word in shown
    figures = json.loads(report.read_text())
    assert f"{100 * figures['edited']['ES']['token_ratio']:.1f}%" in shown
    assert figures["facts"] == 3

    assert malmend("eval", tiny.model, tiny.facts, "--decode_facts", "0") == 0
    shown = capsys.readouterr().out
    assert "edited" not in re.sub("unedited", "", shown.split("token ratio:")[0])

    assert malmend("ask", tiny.model, "In Ora [b] is", "--patch", patch) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("In Ora [b] is\n")
    assert "unedited: " in shown
    assert "edited:   " in shown
    assert malmend("ask", tiny.model, "In Ora is", "--max-new-tokens", "2") == 0
    assert "unedited" not in capsys.readouterr().out
    assert files_in(tmp_path) == {"patch.safetensors", "report.json"}


def test_groups_of_names_that_begin_alike_are_told_apart(tiny, tmp_path, capsys):
    relations = ["airport_iata_code_of_it", "airport_icao_code_of_it"]
    rows = [
        {
            "prompt": f"The code of Kalo{index} is",
            "answer": "Lomi Vane"[: 4 + 5 * index],
            "paraphrases": [f"What is Kalo{index}'s code?"],
            "neighbours": [{"prompt": "The code of Seto is", "answer": "Vane"}],
            "relation": relation,
        }
        for index, relation in enumerate(relations)
    ]
    facts, patch = tmp_path / "facts", tmp_path / "patch"
    facts.write_text("\n".join(map(json.dumps, rows)))
    assert malmend("edit", tiny.model, facts, "--out", patch, *tiny.fast) == 0
    capsys.readouterr()
    assert malmend("eval", tiny.model, facts, "--patch", patch) == 0
    shown = capsys.readouterr().out
    first_cells = [line.split("│")[1].strip() for line in shown.splitlines() if "│" in line]
    for relation in relations:
        assert relation in "".join(first_cells)


def test_groups_and_the_kinds_that_were_asked_are_shown(tiny, tmp_path, capsys):
    beside = "The capital of Seto is"
    said = ask(tiny.loaded, beside, max_new_tokens=1).unedited  # so that something can be kept
    rows = [
        {
            "prompt": f"The capital of Kalo{index} is",
            "answer": "Lomi",
            "relation": "capital [of]" if index else "river",
            "neighbours": [{"prompt": beside, "answer": said}],
        }
        for index in range(3)
    ]
    facts, patch = tmp_path / "facts", tmp_path / "patch"
    facts.write_text("\n".join(map(json.dumps, rows)))
    assert malmend("eval", tiny.model, facts) == 0
    shown = capsys.readouterr().out
    assert "NS (neighbours)" in shown
    for absent in ("GS", "LS (", "RS", "retention", "kept", "→", "chat"):
        assert absent not in shown
    assert shown.count("by relation") == 1
    assert re.search(r"capital \[of\] +│ +2 ", shown)
    assert "by answer tokens" not in shown  # all answers are equally long
    assert malmend("edit", tiny.model, facts, "--out", patch, *tiny.fast) == 0
    capsys.readouterr()
    assert malmend("eval", tiny.model, facts, "--patch", patch) == 0
    shown = capsys.readouterr().out
    assert "by relation, unedited to edited" in shown
    assert "→" in shown
    assert "kept: share" in shown


def test_train_and_edit_with_the_editor_and_inspect_all(tiny, tmp_path, capsys):
    editor, patch = tmp_path / "editor", tmp_path / "patch"
    train = ["train", tiny.model, tiny.facts, "--out", editor, *SMALL, *tiny.fast]
    assert malmend(*train) == 0
    shown = capsys.readouterr()
    assert "2 steps of 4 facts: about" in shown.err
    assert len(re.findall(r"^step +\d/2  loss ", shown.err, re.MULTILINE)) == 2
    assert shown.out.startswith("Trained 2 steps: ")
    assert malmend(*train, "--steps", 3) == 0
    assert "1 step of 4 facts (resumed after step 2)" in capsys.readouterr().err
    assert malmend(*train, "--steps", 3) == 0
    shown = capsys.readouterr().err
    assert "Trained already: 3 steps were taken; ask for more to go on." in shown
    assert "0 steps" not in shown

    assert malmend("edit", tiny.model, tiny.facts, "--out", patch, "--editor", editor) == 0
    assert "Edited 12 facts at 2 layers" in capsys.readouterr().out
    assert load_patch(patch).provenance["settings"]["network"]["rank"] == 4
    for thing, kind in (
        (tiny.model, "model"),
        (tiny.facts, "facts"),
        (patch, "patch"),
        (editor, "editor"),
    ):
        assert malmend("inspect", thing) == 0
        assert capsys.readouterr().out.startswith(f"{kind} ")


def test_a_patch_gives_the_terminal_no_orders(tiny, tmp_path, capsys):
    path, order = tmp_path / "patch", "\x1b[2J"
    ultra = [tiny.model, tiny.facts, "--limit", 1, "--method", "ultraedit"]
    assert malmend("edit", *ultra, "--out", path) == 0
    patch = load_patch(path)
    about = {**patch.provenance, "model": f"other{order}", "base": "x" * 64}
    save_patch(Patch(patch.factors, about), path)
    capsys.readouterr()
    assert malmend("eval", tiny.model, tiny.facts, "--patch", path) == 2
    shown = capsys.readouterr().err
    assert order not in shown
    assert r"other\x1b[2J" in shown


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_full_device_is_one_sentence(kind, tiny, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr("malmend.commands.edit.lay_out", full)
    assert malmend("edit", tiny.model, tiny.facts, "--out", tmp_path / "patch", *tiny.fast) == 1
    shown = capsys.readouterr().err
    assert "The device has no room left; give less of --trunk.batch-tokens, --dtype" in shown
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("said", ["", "DefaultCPUAllocator: can't allocate memory\nMore."])
def test_a_full_memory_is_one_sentence(said, tiny, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError(said) if said else MemoryError

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", full)
    assert malmend("edit", tiny.model, tiny.facts, "--out", tmp_path / "patch", *tiny.fast) == 1
    why = f" ({said.splitlines()[0]})" if said else ""
    asked = "give a smaller model, or --memory where it is an option"
    assert f"malmend: There is no memory left; {asked}{why}.\n" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert malmend("demo", "--model", tiny.model, "--facts", 4, "--spoken", 1, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "The weights are bit for bit what they were." in shown
    assert "generated is over the first 1 fact\n" in shown
    assert "not asked: all paraphrases and neighbours of a fact but the first of each" in shown
    assert f"Report: {out / 'index.html'} " in shown
    assert files_in(out) == {"patch.safetensors", "report.json", "index.html"}


def test_characters_that_nobody_sees_are_told(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts, patch = Path("facts.jsonl"), tmp_path / "patch"
    facts.write_text('{"prompt": "In Ora is", "answer": "Chile\\u200b"}\n')
    warned = "1 field holds a character that nobody sees and that changes its tokens:\n"
    which = "facts.jsonl:1: field 'answer': U+200B, zero width space\n"
    ultra = ["--method", "ultraedit", "--out", patch]
    assert malmend("edit", tiny.model, facts, *ultra) == 0
    assert f"{warned}  {which}" in capsys.readouterr().err  # before the work
    assert malmend("eval", tiny.model, facts, "--decode-facts", 0, "--text", "none") == 0
    assert f"{warned}  {which}" in capsys.readouterr().out
    assert malmend("inspect", facts) == 0
    assert f"characters that nobody sees: 1\n    {which}" in capsys.readouterr().out


TRAINED = ["--method", "ke", "--ke.steps", 1, "--ke.layers", 1, "--ke.hidden", 2]
EDITOR = ["--layers", 1, "--steps", 1, "--facts-per-step", 1, "--network.rank", 2]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("edit", ["--out", "OUT", "--report", "REPORT"]),
        ("eval", ["--decode-facts", 0, "--text", "none"]),
        ("finetune", ["--out", "OUT", "--validation", 0, "--epochs", 1]),
        ("train", ["--out", "OUT", *TRAINED, "--ke.facts_per_step", 1]),
        ("train", ["--out", "OUT", *EDITOR]),
    ],
    ids=["edit", "eval", "finetune", "train ke", "train"],
)
def test_skipped_facts_are_told(command, options, tiny, tmp_path, capsys):
    """Once in each, before the work."""
    facts = tmp_path / "facts.jsonl"
    row = '{"prompt": "In Ora is", "answer": "%s", "paraphrases": ["Ora is in"]%s}\n'
    rest = ', "unrelated": [{"prompt": "Lake Ruva is", "answer": "Kalo"}]'
    facts.write_text("".join(row % (name, rest) for name in ("Chile", "Peru", "Chile")))
    places = {"OUT": tmp_path / "out", "REPORT": tmp_path / "report"}
    calibrated = tiny.fast if command == "edit" or options[-1] == 2 else []
    given = [places.get(one, one) for one in options]
    assert malmend(command, tiny.model, facts, *given, *calibrated) == 0
    shown = capsys.readouterr().err.replace(" \n", " ")  # a line that the terminal broke
    assert shown.count("Skipped 2 facts: 1 duplicate and 1 contradiction of earlier ones") == 1
    assert ("--strict refuses them" in shown) == (command != "finetune")
    assert re.search(r"3'?: duplicate of .*1'?\n", shown)
    assert re.search(r"2'?: contradiction of .*1'?\n", shown)


def test_without_options_the_commands_own_defaults_hold(reached):
    given = reached("edit", "m", "f", "--out", "p")
    assert (given["model"], given["facts"], given["out"], given["editor"]) == (
        "m",
        "f",
        "p",
        "auto",
    )
    assert given["settings"] is None  # nothing was asked for: a shipped editor may come in
    assert given["trunk"] == TrunkSettings()
    given = reached("train", "m", "f", "--out", "e")
    assert (given["training"], given["settings"]) == (TrainSettings(), EditorSettings())
    assert given["locality"] is None
    given = reached("eval", "m", "f")
    assert (given["patch"], given["limit"], given["decode_facts"]) == (None, None, None)


@pytest.mark.parametrize(
    ("spelt", "strict"),
    [
        (["--strict"], True),
        (["--strict", "--limit", "2"], True),
        (["--strict", "true"], True),
        (["--strict", "True"], True),
        (["--strict", "False"], False),
        (["--strict=true"], True),
        (["--strict", "false"], False),
        (["--strict=false"], False),
        ([], False),
    ],
)
def test_a_switch_may_stand_alone(reached, spelt, strict):
    assert reached("eval", "m", "f", *spelt)["strict"] is strict


@pytest.mark.parametrize("spelt", [["--rule.refuse"], ["--rule.refuse", "True"]])
def test_a_switch_of_a_group_may_stand_alone(spelt, monkeypatch):
    given: dict[str, Any] = {}

    @functools.wraps(ledger.init)
    def called(**said: object) -> None:
        given.update(said)

    monkeypatch.setattr(ledger, "init", called)
    assert malmend("ledger", "init", "folder", "m", *spelt, "--rule.retention", "0.5") == 0
    assert (given["rule"].refuse, given["rule"].retention) == (True, 0.5)


def test_a_switch_before_the_positionals_does_not_swallow_them(reached):
    given = reached("eval", "--chat", "m", "--force", "f")
    assert (given["model"], given["facts"], given["chat"], given["force"]) == ("m", "f", True, True)


@pytest.mark.parametrize("prompt", ["A chat", "a force", "  chat"])
def test_a_prompt_that_ends_like_a_switch_is_asked_as_it_stands(reached, prompt):
    assert reached("ask", "m", prompt)["prompt"] == prompt


def test_a_value_that_ends_like_a_switch_stays(reached):
    assert reached("eval", "./strict", "f", "--text", "a chat")["text"] == "a chat"
    assert reached("eval", "./strict", "f")["model"] == "./strict"


def test_nothing_behind_a_bare_double_hyphen_is_an_option(reached, capsys):
    """Another file was once opened, and another prompt asked: hyphens had become underscores."""
    assert reached("inspect", "--", "--my-facts-a.jsonl")["thing"] == "--my-facts-a.jsonl"
    given = reached("ask", "m", "--chat", "--", "--foo-bar is")
    assert (given["prompt"], given["chat"]) == ("--foo-bar is", True)
    assert reached("ask", "m", "--", "--chat")["prompt"] == "--chat"
    assert malmend("ask", "m", "--", "--chat", "--max-new-tokens", "4") == 2
    said = capsys.readouterr().err
    assert "takes no further '--max-new-tokens 4'; options stand before a bare --" in said


@pytest.mark.parametrize("name", ["--facts-per-step", "--facts_per_step"])
@pytest.mark.parametrize("joined", [True, False])
def test_hyphens_and_underscores_are_the_same(reached, name, joined):
    option = [f"{name}=7"] if joined else [name, "7"]
    assert reached("train", "m", "f", "--out", "e", *option)["training"].facts_per_step == 7


def test_values_keep_their_hyphens_and_underscores(reached):
    given = reached("eval", "my-mo_del", "a-b_c", "--patch=p-a_t", "--text", "t-e_x")
    assert (given["model"], given["facts"]) == ("my-mo_del", "a-b_c")
    assert (given["patch"], given["text"]) == ("p-a_t", "t-e_x")


def test_nested_settings_reach_the_command(reached):
    given = reached(
        "edit", "m", "f", "--out", "p", "--descent.steps", "3", "--trunk.batch-tokens", "9"
    )
    assert given["settings"].descent == Descent(steps=3)
    assert given["trunk"] == TrunkSettings(batch_tokens=9)
    given = reached("edit", "m", "f", "--out", "p", "--descent", "null", "--method", "mend")
    assert (given["settings"].descent, given["settings"].method) == (None, "mend")
    given = reached("train", "m", "f", "--out", "e", "--network.rank", "3", "--network.blocks=1")
    assert given["settings"].network == NetworkSettings(rank=3, blocks=1)


@pytest.mark.parametrize("paper", [["--paper"], ["--paper=true"], ["--paper", "true"]])
def test_paper_brings_every_published_setting(reached, paper):
    given = reached("train", "m", "f", "--out", "e", *paper)
    assert given["training"] == published_training()
    assert given["settings"] == published()
    network = given["settings"].network
    assert (network.rank, network.placement, network.start) == (1920, "after", "normal")
    assert (given["settings"].prior, given["settings"].descent) == ("identity", None)


def test_what_is_given_counts_before_the_paper(reached):
    given = reached(
        "train", "m", "f", "--steps", "9", "--paper", "--out", "e", "--network.rank=5", "--eta", "1"
    )
    # MALMEN's locality questions are unrelated ones only: no neighbours.
    assert given["training"] == TrainSettings(
        steps=9, near=0.0, network_rate=1e-5, scalar_rate=1e-5
    )
    assert given["settings"].network == NetworkSettings(5, placement="after", start="normal")
    assert given["settings"].eta == 1.0


def test_mend_single_brings_its_published_settings(reached):
    given = reached("train", "m", "f", "--out", "e", "--method", "mend-single", "--steps", "9")
    assert given["settings"] == published_mend()
    assert given["training"] == replace(published_mend_training(), steps=9)


def test_paper_false_is_not_the_paper(reached):
    for spelt in (["--paper=false"], ["--paper", "false"]):
        assert reached("train", "m", "f", "--out", "e", *spelt)["settings"] == EditorSettings()


def test_train_reads_yaml_and_the_command_line_counts_more(reached, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(
        "steps: 7\nfacts_per_step: 3\nnetwork:\n  rank: 8\ndescent: null\nlayers: 2\nstrict: true\n"
    )
    given = reached("train", "m", "f", "--out", "e", "--config", config, "--steps", "5")
    assert given["training"] == TrainSettings(steps=5, facts_per_step=3)
    assert given["settings"] == EditorSettings(
        layers=2, descent=None, network=NetworkSettings(rank=8)
    )
    assert given["strict"] is True


def test_yaml_may_ask_for_the_paper(reached, tmp_path):
    (tmp_path / "train.yaml").write_text("paper: true\nlayers: 3\n")
    given = reached("train", "m", "f", "--out", "e", "--config", tmp_path / "train.yaml")
    assert given["training"] == published_training()
    assert given["settings"].form == "published"
    assert given["settings"].layers == 3


def test_a_trained_editor_brings_its_own_settings(reached):
    given = reached("edit", "m", "f", "--out", "p", "--editor", "folder")
    assert given["editor"] == "folder"


@pytest.mark.parametrize("option", [["--layers", "2"], ["--descent.steps=3"], ["--method=mend"]])
def test_settings_beside_a_trained_editor_are_refused(option, capsys):
    assert malmend("edit", "m", "f", "--out", "p", "--editor", "folder", *option) == 2
    assert "brings its own settings" in capsys.readouterr().err


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "malmend", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_as_a_program_it_inspects_facts(tiny):
    done = run("inspect", tiny.facts)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"facts {tiny.facts}\n  facts: 12\n")


@pytest.mark.slow
def test_as_a_program_it_fails_with_one_line(tiny, tmp_path):
    missing: Path = tmp_path / "none.safetensors"
    done = run("eval", tiny.model, tiny.facts, "--patch", missing)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"malmend: There is no patch file {missing}")


@pytest.mark.parametrize("command", ["edit", "diff", "ledger patch"])
def test_a_patch_that_is_replaced_is_told_before(command, tiny, tmp_path, capsys):
    out, ledger = tmp_path / "p.st", tmp_path / "ledger"
    other = shutil.copytree(tiny.model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert malmend("ledger", "init", ledger, tiny.model, *tiny.fast) == 0
    given = {"edit": [tiny.model, tiny.facts, *tiny.fast], "diff": [tiny.model, other]}
    run = [*command.split(), *given.get(command, [ledger]), "--out", out]
    assert malmend(*run) == 0
    assert "will be replaced" not in capsys.readouterr().err
    assert malmend(*run) == 0
    said = load_patch(out).provenance
    assert f"p.st will be replaced (it is {said['method']}, " in capsys.readouterr().err


def test_an_edit_that_is_refused_says_of_no_patch_that_it_will_be_replaced(tiny, tmp_path, capsys):
    out = tmp_path / "p.st"
    out.write_text("x")
    assert malmend("edit", tiny.model, tiny.facts, *tiny.fast, "--out", out, "--memory=1MB") == 2
    said = capsys.readouterr().err
    assert "--memory is 1MB" in said
    assert "will be replaced" not in said


def test_warnings_of_libraries_are_left_out_while_a_command_runs_alone(monkeypatch):
    shown = []

    def note(*_given):
        shown.append(warnings.filters[0][0])

    monkeypatch.setitem(COMMANDS, "cache", (note, ""))
    before = list(warnings.filters)
    assert malmend("cache") == 0
    assert shown == ["ignore"]
    assert warnings.filters == before


FILES = [
    ("edit m f --out z --refine {}", "passes: 1"),
    ("edit m f --out z --trunk {}", "batch_tokens: 100"),
    ("eval m f --trunk {}", "batch_tokens: 100"),
    ("edit m f --out z --method ft --ft {}", "rate: 0.001"),
    ("ledger init l m --rule {}", "questions: 3"),
    ("train m f --out e --network {}", "rank: 8"),
]


@pytest.mark.parametrize(("command", "content"), FILES, ids=[one for one, _ in FILES])
def test_a_group_of_options_may_be_a_file(command, content, tmp_path, monkeypatch, capsys):
    """Where the file lay was once taken for a setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(content)
    (tmp_path / "f").write_text('{"prompt": "The capital of Peru is", "answer": "Lima"}')
    assert malmend(*command.format("own.yaml").split()) == 2
    assert "There is no model 'm'" in capsys.readouterr().err


def test_help_of_a_command(capsys):
    with contextlib.suppress(SystemExit):
        malmend("ask", "--help")
    said = capsys.readouterr().out
    with contextlib.suppress(SystemExit):
        malmend("help", "ask")
    assert capsys.readouterr().out == said != ""


@pytest.mark.parametrize("option", ["--patch", "--report"])
def test_a_name_that_no_file_can_have_is_bad_input(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text('{"prompt": "The capital of Peru is", "answer": "Lima"}')
    assert malmend("eval", "m", "f", option, "n" * 300) == 2
    assert "raceback" not in capsys.readouterr().err


@pytest.mark.parametrize("tagged", ["!!bool foo", "!!timestamp foo", '!!int ""', '!!float ""'])
def test_a_value_that_is_not_of_the_kind_its_tag_says(tagged, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(f"seed: {tagged}")
    assert malmend("train", "m", "f", "--out", "e", "--config", "own.yaml") == 2
    assert "own.yaml: is no YAML" in capsys.readouterr().err
