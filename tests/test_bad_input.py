"""Whatever is wrong: one message, no traceback, nothing half-written, good files untouched."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import command_support
from command_support import CALIBRATION, Tiny, malmend, save_model
from malmend import edit as edit_facts
from malmend import train as train_editor
from malmend.cli import run as run_module
from malmend.commands import edit as edit_module
from malmend.commands import evaluate as evaluate_module
from malmend.commands import train as train_module
from malmend.editors import folder as editor_folder
from malmend.editors.halfway import EVERY, Halfway
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.editors.train_settings import TrainSettings
from malmend.errors import MalmendError
from malmend.material import calibrated
from malmend.methods import editor_method
from malmend.models.load import load_model
from malmend.models.sites import find_sites

tiny = command_support.tiny
cache = command_support.cache

Arguments = list[object]
SMALL = ["--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 2]


@pytest.fixture(scope="session")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good patch and a good editor of the tiny model, and another model with its own."""
    folder = tmp_path_factory.mktemp("made")
    own = {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}
    small = EditorSettings(layers=2, network=NetworkSettings(rank=4))
    short = TrainSettings(facts_per_step=4, steps=1)
    other = save_model(folder / "other", seed=5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MALMEND_CACHE", str(tiny.folder / "cache"))
        command_support.quick(patched, tiny.folder)
        edit_facts(tiny.loaded, tiny.facts, folder / "good.safetensors", **own)
        edit_facts(other, tiny.facts, folder / "foreign.safetensors", **own)
        train_editor(tiny.loaded, tiny.facts, folder / "good", None, small, short, **own)
        train_editor(other, tiny.facts, folder / "foreign", None, small, short, **own)
    return folder


class Place:
    """One test's own folder, with a good output that must survive."""

    def __init__(self, tiny: Tiny, made: Path, folder: Path):
        self.tiny, self.made, self.folder = tiny, made, folder
        self.model, self.facts, self.fast = tiny.model, tiny.facts, tiny.fast
        shutil.copy(made / "good.safetensors", folder / "good.safetensors")
        self.good = folder / "good.safetensors"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit(self, *more: object, model: object = None, facts: object = None) -> Arguments:
        start = ["edit", model or self.model, facts or self.facts, "--out", self.good]
        return [*start, *([] if "--editor" in more else self.fast), *more]

    def train(self, *more: object, out: object = None) -> Arguments:
        out = out or self.folder / "editor"
        return ["train", self.model, self.facts, "--out", out, *self.fast, *SMALL, *more]

    def eval(self, *more: object, facts: object = None) -> Arguments:
        return ["eval", self.model, facts or self.facts, *more]

    def named(self, name: str) -> Path:
        return Path(shutil.copy(self.good, self.folder / name))

    def copied(self, name: str) -> Path:
        return Path(shutil.copytree(self.made / name, self.folder / name))


@pytest.fixture
def place(tiny: Tiny, made: Path, tmp_path: Path) -> Place:
    return Place(tiny, made, tmp_path)


def calibrated_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run go on with an editor that was calibrated quickly, as the command line cannot."""
    said = json.loads((folder / "editor.json").read_text())["calibration_sha256"]
    monkeypatch.setattr(
        train_module, "calibrated", lambda *a, **k: replace(calibrated(*a, **k), digest=said)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def messages(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of standard error but for progress."""
    progress = re.compile(r".*━|step +\d+/|\d+ steps? of |Editor: |.* will be replaced")
    return [line for line in capsys.readouterr().err.splitlines() if not progress.match(line)]


def refused(
    arguments: Arguments, folder: Path, capsys: pytest.CaptureFixture[str], lines: int | None = 1
) -> str:
    """Runs it; returns the message after the checks that every failure must pass."""
    before = contents(folder)
    code = malmend(*arguments)
    said = messages(capsys)
    assert code == 2, said
    assert said[0].startswith("malmend: ")
    assert lines is None or len(said) == lines, said
    assert all(not line.startswith("malmend: ") for line in said[1:])
    assert not any("Traceback" in line or 'File "' in line for line in said)
    assert contents(folder) == before
    return "\n".join(said)


def other_folder(folder, name):
    folder.mkdir()
    (folder / name).write_text("")
    return folder


def broken_model(place: Place, breaking: Callable[[Path], object]) -> Path:
    folder = Path(shutil.copytree(place.model, place.folder / "model"))
    breaking(folder)
    return folder


def cut(path: Path, size: int = 200) -> None:
    path.write_bytes(path.read_bytes()[:size])


def with_nan(path: Path) -> None:
    """The same file with one number that is none."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, path, metadata=header)


def with_header(path: Path, **changes: object) -> Path:
    """The same patch with other entries in its header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["malmend"])
    save_file(load_file(path), path, metadata={"malmend": json.dumps(header | changes)})
    return path


def after(_breaking: object, arguments: Arguments) -> Arguments:
    """The arguments, once something was broken."""
    return arguments


def no_patch(path: Path) -> Path:
    save_file({"weight": torch.ones(2, 2)}, path)
    return path


FACTS = '{"prompt": "In Ora is", "answer": "Chile"}\n'

# Name: what is run, and what its message must hold.
CASES: dict[str, tuple[Callable[[Place], Arguments], str]] = {
    # the command line
    "unknown command": (lambda p: ["edti"], "no command 'edti'; did you mean 'edit'?"),
    "unknown command, nothing near": (lambda p: ["zzz"], "no command 'zzz'. Expected one of edit"),
    "no arguments": (lambda p: ["edit"], "MODEL, FACTS, --out must be given"),
    "no out": (lambda p: ["edit", p.model, p.facts], "malmend: --out must be given; see"),
    "unknown option": (
        lambda p: p.edit("--limt", 3),
        "'--limt' of malmend edit; did you mean '--limit'?",
    ),
    "unknown option, nothing near": (
        lambda p: p.edit("--zzz"),
        "no option '--zzz' of malmend edit.",
    ),
    "one argument too many": (
        lambda p: ["eval", p.model, p.facts, "my edit.patch"],
        "malmend eval takes no further 'my edit.patch'; see malmend eval --help.",
    ),
    "an empty argument too many": (
        lambda p: ["eval", p.model, p.facts, ""],
        "malmend eval takes no further ''; see malmend eval --help.",
    ),
    "a switch that is neither, apart": (
        lambda p: p.edit("--alternative", "yes"),
        "--alternative is 'yes', expected true or false, or nothing",
    ),
    "another switch that is neither": (
        lambda p: ["cache", "--clear", "yes"],
        "--clear is 'yes', expected true or false, or nothing",
    ),
    "unknown action of bench": (
        lambda p: ["bench", "tabel", p.folder],
        "There is no action 'tabel' of malmend bench; did you mean 'table'?",
    ),
    "a positional in words": (
        lambda p: ["ledger", "rollback", p.folder, "x"],
        "GENERATION is 'x', expected a whole number",
    ),
    "unknown nested option": (lambda p: p.train("--network.rnk=3"), "mean '--network.rank'?"),
    "bad choice": (
        lambda p: p.edit("--method", "mand"),
        "--method is 'mand' (did you mean 'mend'?), expected 'malmen', 'mend'",
    ),
    "limit in words": (
        lambda p: p.edit("--limit", "ten"),
        "--limit is 'ten', expected a whole number",
    ),
    "no limit": (
        lambda p: p.edit("--limit", ""),
        "--limit is '', expected a whole number; see malmend edit --help",
    ),
    "no method": (
        lambda p: p.edit("--method="),
        "--method is '', expected 'malmen', 'mend'",
    ),
    "rate in words": (lambda p: p.train("--clip", "x"), "--clip is 'x', expected a number"),
    "switch that is neither": (
        lambda p: p.eval("--chat=maybe"),
        "--chat is 'maybe', expected true or false",
    ),
    "frame that is no list": (
        lambda p: p.edit("--refine.frames", "chat"),
        "--refine.frames is 'chat', expected a list such as",
    ),
    "frame without a place": (
        lambda p: p.edit('--refine.frames=["{promt}"]'),
        "The frame '{promt}' has no place for the prompt",
    ),
    "no pass": (lambda p: p.edit("--refine.passes", 0), "give --refine.passes 1"),
    "unknown part of refine": (
        lambda p: p.edit("--refine.pases", 1),
        "did you mean '--refine.passes'?",
    ),
    "limit zero": (lambda p: p.edit("--limit", 0), "limit is 0"),
    "limit below zero": (lambda p: p.edit("--limit=-3"), "limit is -3"),
    "decode fewer than none": (lambda p: p.eval("--decode-facts=-1"), "decode_facts is -1"),
    "no new token": (
        lambda p: ["ask", p.model, "Ora", "--max-new-tokens", 0],
        "max_new_tokens is 0",
    ),
    "bad dtype": (
        lambda p: p.edit("--dtype", "int8"),
        "'int8' is unknown, expected one of float32",
    ),
    "too many layers": (
        lambda p: p.edit("--layers", 99),
        "99 layers to edit, expected 1 to 6",
    ),
    "no such site": (lambda p: p.edit("--sites", "*.nix"), "No linear layer is named '*.nix'"),
    "near beyond one": (lambda p: p.train("--near", 2), "near is 2.0, expected a share from 0"),
    "end weight zero": (
        lambda p: p.train("--end-weight", 0),
        "end_weight is 0.0, expected a number above 0",
    ),
    "rank zero": (lambda p: p.train("--network.rank", 0), "rank is 0, expected 1 or more"),
    # models
    "missing model": (lambda p: p.edit(model="nothing"), "There is no model 'nothing'"),
    "misspelt model": (lambda p: p.edit(model="smolm2-135m"), "did you mean 'smollm2-135m'?"),
    "missing folder": (lambda p: p.edit(model=p.folder / "no"), "There is no model"),
    "missing gguf": (lambda p: p.edit(model="no.gguf"), "There is no model 'no.gguf'"),
    "model without config": (
        lambda p: after((p.folder / "bare").mkdir(), p.edit(model=p.folder / "bare")),
        "holds no config.json",
    ),
    "model that is a file": (
        lambda p: p.edit(model=p.facts),
        "facts.jsonl is a file, expected a model; give a model's folder, a .gguf file or a name.",
    ),
    "model that is a file of a model": (
        lambda p: p.edit(model=f"{p.model}/model.safetensors"),
        "model.safetensors is a file of a model's folder, expected the folder; give ",
    ),
    "model without a name": (lambda p: ["eval", "", p.facts], "The model's name is empty; give"),
    "model that is an adapter": (
        lambda p: p.edit(model=other_folder(p.folder / "lora", "adapter_config.json")),
        "lora is a LoRA adapter, expected a model; give its base, and the adapter as a patch",
    ),
    "model with corrupt weights": (
        lambda p: p.edit(model=broken_model(p, lambda f: cut(f / "model.safetensors"))),
        "cannot be loaded",
    ),
    "model without weights": (
        lambda p: p.edit(model=broken_model(p, lambda f: (f / "model.safetensors").unlink())),
        "cannot be loaded",
    ),
    "model with a broken config": (
        lambda p: p.edit(model=broken_model(p, lambda f: cut(f / "config.json", 20))),
        "cannot be loaded",
    ),
    "model without a tokenizer": (
        lambda p: p.edit(model=broken_model(p, lambda f: [x.unlink() for x in f.glob("tok*")])),
        "the backend tokenizer from one of: (1) a",
    ),
    "train into the model's folder": (
        lambda p: p.train(out=shutil.copytree(p.model, p.folder / "model")),
        "holds a model already; give another --out",
    ),
    "train into a ledger": (
        lambda p: p.train(out=other_folder(p.folder / "ledger", "ledger.sqlite")),
        "holds a ledger already; give another --out",
    ),
    "a seed of thirty digits": (
        lambda p: p.train("--seed", "1" * 30),
        "seed is 1111111111",
    ),
    "a prompt that is not UTF-8": (
        lambda p: ["ask", p.model, "Ora \udcff is"],
        "is not UTF-8",
    ),
    "no batch": (lambda p: p.eval("--trunk.batch-tokens", 0), "batch_tokens is 0, expected 1"),
    "a disk budget below none": (
        lambda p: p.eval("--trunk.store-bytes=-1"),
        "store_bytes is -1, expected 0 to 1e+18",
    ),
    "demo of fewer than no facts": (
        lambda p: ["demo", "--model", p.model, "--out", p.folder / "out", "--facts=-5"],
        "facts is -5, expected 1 to 1,6",
    ),
    "demo of more facts than there are": (
        lambda p: ["demo", "--model", p.model, "--out", p.folder / "out", "--facts=9999"],
        "facts is 9999, expected 1 to 1,6",
    ),
    "demo that says fewer than none": (
        lambda p: ["demo", "--model", p.model, "--out", p.folder / "out", "--spoken=-1"],
        "spoken is -1, expected 0 or more",
    ),
    "corrupt gguf": (lambda p: p.edit(model=p.file("m.gguf", b"GGUFno")), "is no whole GGUF"),
    # patches
    "missing patch": (lambda p: p.eval("--patch", p.folder / "no"), "There is no patch file"),
    "patch that is a folder": (lambda p: p.eval("--patch", p.folder), "There is no patch file"),
    "patch cut short": (
        lambda p: after(cut(p.good), p.eval("--patch", p.good)),
        "is no patch or is damaged",
    ),
    "patch of facts": (
        lambda p: p.eval("--patch", p.facts),
        "facts.jsonl is a text, as files of facts are, and no patch",
    ),
    "empty patch": (lambda p: p.eval("--patch", p.file("p", "")), "p is empty and no patch"),
    "patch that is no patch": (
        lambda p: p.eval("--patch", no_patch(p.folder / "x.safetensors")),
        "is a safetensors file but no patch",
    ),
    "patch with NaN": (
        lambda p: after(with_nan(p.good), p.eval("--patch", p.good)),
        "holds NaN or infinity",
    ),
    "patch without settings": (
        lambda p: p.eval("--patch", with_header(p.good, settings=None)),
        "its header's settings is null, expected an object",
    ),
    "patch with a configuration that is none": (
        lambda p: p.eval("--patch", with_header(p.good, configuration=[1])),
        "its header's configuration is [1], expected an object",
    ),
    "patch with an unknown end of answer": (
        lambda p: p.eval("--patch", with_header(p.good, settings={"end_of_answer": 7})),
        "its end of answer is 7, expected one of 'eos', 'newline', 'none'",
    ),
    "patch of another model": (
        lambda p: p.eval("--patch", p.made / "foreign.safetensors"),
        "was made for a base with fingerprint",
    ),
    "asking with a patch of another model": (
        lambda p: ["ask", p.model, "Ora", "--patch", p.made / "foreign.safetensors"],
        "was made for a base with fingerprint",
    ),
    # editors
    "missing editor": (lambda p: p.edit("--editor", p.folder / "no"), "There is no editor in"),
    "editor of another model": (
        lambda p: p.edit("--editor", p.made / "foreign"),
        "was trained for a base with fingerprint",
    ),
    "editor with cut weights": (
        lambda p: after(
            cut(next(p.copied("good").glob("editor-*"))), p.edit("--editor", p.folder / "good")
        ),
        "is damaged",
    ),
    "editor with NaN": (
        lambda p: after(
            with_nan(next(p.copied("good").glob("editor-*"))), p.edit("--editor", p.folder / "good")
        ),
        "is damaged",
    ),
    "editor with broken JSON": (
        lambda p: after(
            cut(p.copied("good") / "editor.json"), p.edit("--editor", p.folder / "good")
        ),
        "is damaged",
    ),
    "editor and calibration facts": (
        lambda p: p.edit("--editor", p.made / "good", "--calibrate", p.facts),
        "brings its own calibration; leave out --calibrate",
    ),
    "editor and settings": (
        lambda p: p.edit("--editor", p.made / "good", "--layers", 2),
        "brings its own settings",
    ),
    # outputs
    "out in a missing folder": (
        lambda p: ["edit", p.model, p.facts, "--out", p.folder / "no" / "patch"],
        "There is no folder",
    ),
    "out in what is no folder": (
        lambda p: ["edit", p.model, p.facts, "--out", p.good / "patch"],
        "good.safetensors is a file, expected a folder to write patch into; give another path",
    ),
    "out below what is no folder": (
        lambda p: ["edit", p.model, p.facts, "--out", p.good / "no" / "patch"],
        "good.safetensors is a file, expected a folder to write no/patch into",
    ),
    "report in what is no folder": (
        lambda p: p.edit("--report", p.good / "page"),
        "good.safetensors is a file, expected a folder to make page in",
    ),
    "report where no folder can be made": (
        lambda p: p.edit("--report", "/proc/page"),
        "/proc/page cannot be made (No such file or directory)",
    ),
    "out that is a folder": (
        lambda p: ["edit", p.model, p.facts, "--out", p.folder],
        "is a folder",
    ),
    "json in a missing folder": (
        lambda p: p.eval("--json", p.folder / "no" / "report.json"),
        "There is no folder",
    ),
    "json that is a folder": (lambda p: p.eval("--json", p.folder), "is a folder"),
    "report into a file": (
        lambda p: p.eval("--report", p.good),
        "is a file, expected a folder",
    ),
    "report below a missing folder": (
        lambda p: p.edit("--report", p.folder / "no" / "page"),
        "There is no folder",
    ),
    "report over the facts": (
        lambda p: p.edit("--report", p.folder, facts=p.file("report.json", FACTS)),
        "is read by this command",
    ),
    "report over the patch": (
        lambda p: p.eval("--patch", p.named("index.html"), "--report", p.folder),
        "is read by this command",
    ),
    "train into a file": (lambda p: p.train(out=p.good), "is a file, expected a folder"),
    "train below a missing folder": (
        lambda p: p.train(out=p.folder / "no" / "editor"),
        "There is no folder",
    ),
    "demo into a file": (
        lambda p: ["demo", "--model", p.model, "--out", p.good],
        "is a file, expected a folder",
    ),
    # prompts and settings
    "empty prompt": (lambda p: ["ask", p.model, ""], "The prompt is empty"),
    "blank prompt": (lambda p: ["ask", p.model, " \n"], "The prompt is empty"),
    "asking in chat without a template": (
        lambda p: ["ask", p.model, "Ora", "--chat"],
        "no chat template",
    ),
    "evaluating in chat without a template": (lambda p: p.eval("--chat"), "no chat template"),
    "missing YAML": (lambda p: p.train("--config", p.folder / "no.yaml"), "no.yaml"),
    "binary YAML": (
        lambda p: p.train("--config", p.file("c.yaml", b"\x00\xff\xfe" * 9)),
        "c.yaml:1: byte 0xff at offset 1 is not UTF-8; save the file as UTF-8 text",
    ),
    "a folder for YAML": (lambda p: p.train("--config", p.folder), "--config file cannot be read"),
    "broken YAML": (
        lambda p: p.train("--config", p.file("c.yaml", "steps: [")),
        "c.yaml:1: is no YAML (expected the node content",
    ),
    "a name twice in YAML": (
        lambda p: p.train("--config", p.file("c.yaml", "seed: 1\nnetwork: {rank: 3,\n rank: 4}")),
        "c.yaml:3: the field 'rank' is there twice, first on line 2",
    ),
    "a misspelt setting of settings": (
        lambda p: p.edit("--descent.rat", "0"),
        "--descent has no setting 'rat' (did you mean 'rate'?); see malmend edit --help.",
    ),
    "a misspelt setting in a group's file": (
        lambda p: p.edit("--refine", p.file("c.yaml", "pases: 1")),
        "The YAML file has 'refine.pases', which is no option of malmend edit; did you mean "
        "'refine.passes'? See malmend edit --help.",
    ),
    "an option cut short": (
        lambda p: p.edit("--limi", 3),
        "no option '--limi' of malmend edit; did you mean '--limit'?",
    ),
    "a value that looks like an option": (
        lambda p: p.edit("--memory", "-4GB"),
        "--memory needs a value; one that begins with a hyphen is given as --memory=VALUE.",
    ),
    "a word for settings": (
        lambda p: p.edit("--descent", "foo"),
        "--descent is 'foo', expected null, or its own options, --descent.*",
    ),
    "a setting of settings": (
        lambda p: p.edit("--descent.steps", "x"),
        "--descent.steps is 'x', expected a whole number",
    ),
    "a word for a group": (
        lambda p: p.edit("--refine", "foo"),
        "--refine is 'foo', expected its own options, --refine.*, or a YAML file of them.",
    ),
    "more solves than any edit needs": (
        lambda p: p.edit("--refine.passes", 10**9),
        "passes is 1000000000, expected 1 to 100",
    ),
    "inspecting layers of a facts file": (
        lambda p: ["inspect", p.facts, "--layers", 3],
        "facts.jsonl is a facts file, and --layers, --sites, --linear and --side say which sites "
        "of a model to show; leave them out, or give a model",
    ),
    "inspecting a misspelt file": (
        lambda p: ["inspect", str(p.file("factz.jsonl", "{}")).replace("z", "s")],
        "did you mean 'factz.jsonl'?",
    ),
    "one name where a plan needs a list": (
        lambda p: [
            "bench",
            p.file("p.yaml", "models: a\nfacts: b\nmethods: [ft]"),
            "--out",
            p.folder / "o",
        ],
        "models is 'a'; give a list",
    ),
    "no step": (lambda p: p.train("--steps", 0), "steps is 0, expected 1 or more"),
    "no fact per step": (lambda p: p.train("--facts-per-step", 0), "facts_per_step is 0"),
    "more facts per step than facts": (
        lambda p: p.train("--facts-per-step", 99),
        "Facts to train on: 12, expected at least 99",
    ),
    "eta below zero": (lambda p: p.edit("--eta=-1"), "--eta"),
    "rate below zero": (lambda p: p.train("--network-rate=-1"), "network_rate is -1"),
    "facts without an unrelated question": (
        lambda p: [
            "train",
            p.model,
            p.file("f", FACTS),
            "--out",
            p.folder / "editor",
            *p.fast,
            *SMALL,
            "--facts-per-step=1",
        ],
        "has no unrelated question",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line(name, place, capsys):
    arguments, message = CASES[name]
    given = arguments(place)
    lines = 2 if given[:1] == ["bench"] and "--out" in given else 1  # of a plan every fault is said
    assert message in refused(given, place.folder, capsys, lines)


# Content of a facts file, and what must be said of it; every fault has a line of its own.
BAD_FACTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["is empty"]),
    "blank": (b" \n\n", ["is empty"]),
    "binary": (bytes(range(128, 256)) * 3, ["not UTF-8"]),
    "zip": (b"PK\x03\x04\x14\x00\x00\xff", ["no UTF-8 text (byte 0x00 at offset 5)"]),
    "plain text": (b"Lima is in Peru\n", ["is in no format of facts"]),
    "bad lines": (FACTS.encode() + b"{no\n[1]\n", [":2: is not valid JSON", ":3: is a list"]),
    "cut off": (b'[{"src": "a", "answers": ["b"]}, {"src"', [":1: entry 2: is not valid JSON"]),
    "empty list": (b"[]", ["holds an empty list"]),
    "missing answer": (b'{"prompt": "In Ora is"}\n', ["answer"]),
    "empty answer": (b'{"prompt": "In Ora is", "answer": ""}\n', ["answer"]),
    "unknown field": (b'{"prompt": "a b", "answer": "c", "promt": "d"}\n', ["'promt'"]),
}


@pytest.mark.parametrize("command", ["edit", "eval", "train", "inspect"])
@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts_are_refused_with_every_fault(name, command, place, capsys):
    content, wanted = BAD_FACTS[name]
    facts = place.file("facts", content)
    arguments = {
        "edit": place.edit(facts=facts),
        "eval": place.eval(facts=facts),
        "train": ["train", place.model, facts, "--out", place.folder / "editor", *place.fast],
        "inspect": ["inspect", facts],
    }[command]
    said = refused(arguments, place.folder, capsys, lines=None)
    assert f"{facts} cannot be used" in said.splitlines()[0]
    assert all(part in said for part in wanted), said
    assert len(said.splitlines()) >= 1 + len([part for part in wanted if part.startswith(":")])


@pytest.mark.parametrize("option", ["facts", "--calibrate", "--text", "--locality"])
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("missing", "there is no such file; did you mean 'words'?"), ("folder", "is a folder")],
)
def test_a_file_that_cannot_be_read(option, kind, wanted, place, capsys):
    place.file("words", "some words\n")
    path = place.folder / ("wrods" if kind == "missing" else "")
    arguments = place.train("--steps", 1)
    if option == "facts":
        arguments[2] = path
    else:
        arguments += [option, path]
    said = refused(arguments, place.folder, capsys, lines=2)
    assert wanted in said


def test_text_that_cannot_be_read_for_perplexity(place, capsys):
    for path in (place.folder, place.folder / "no", place.file("bytes", b"\xff\xfe\xff")):
        refused(place.eval("--text", path), place.folder, capsys, lines=2)


def test_text_without_a_permission_to_read_it(place, capsys, monkeypatch):
    path = place.file("secret", "some words")
    read = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert malmend(*place.eval("--text", path)) == 2
    assert "may not be read (permission denied)" in "\n".join(messages(capsys))


def test_strict_names_both_lines_and_writes_nothing(place, capsys):
    facts = place.file("facts", FACTS + FACTS + FACTS.replace("Chile", "Peru"))
    said = refused(place.edit("--strict", facts=facts), place.folder, capsys, lines=3)
    assert "facts:2: duplicate of" in said
    assert "facts:3: contradiction of" in said


def test_calibration_facts_without_a_paraphrase(place, capsys):
    facts = place.file("facts", FACTS)
    said = refused(place.edit("--calibrate", facts), place.folder, capsys)
    assert "No calibration fact has a paraphrase" in said


def test_an_editor_in_training_on_other_facts(place, capsys):
    place.copied("good")
    facts = place.file("facts", Path(place.facts).read_text().replace("is", "was"))
    arguments = place.train(out=place.folder / "good")
    arguments[2] = facts
    assert "other facts" in refused(arguments, place.folder, capsys)


def test_an_editor_in_training_under_other_settings(place, capsys):
    place.copied("good")
    arguments = place.train("--seed", 3, out=place.folder / "good")
    assert "seed = 0, now 3" in refused(arguments, place.folder, capsys)


@pytest.mark.slow
def test_an_editor_in_training_at_another_dtype(place, capsys):
    place.copied("good")
    arguments = place.train("--dtype", "bfloat16", out=place.folder / "good")
    said = refused(arguments, place.folder, capsys)
    assert "in training on other numbers (dtype)" in said


def test_fewer_steps_than_were_taken(place, capsys):
    out = place.folder / "editor"
    assert malmend(*place.train("--steps", 3, out=out)) == 0
    messages(capsys)
    said = refused(place.train("--steps", 2, out=out), place.folder, capsys)
    assert "was trained for 3 steps, 2 are asked for" in said


def test_too_few_facts_are_noticed_before_the_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "opened", None)
    said = refused(place.train("--facts-per-step", 99), place.folder, capsys)
    assert "Facts to train on: 12, expected at least 99" in said


def test_facts_without_an_unrelated_question_are_noticed_before_too(place, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "opened", None)
    facts = place.file("lonely.jsonl", '{"prompt": "In Ora", "answer": "a"}\n' * 2)
    arguments = ["train", place.model, facts, "--facts-per-step", 1, "--out", place.folder / "new"]
    assert "has no unrelated question" in refused(arguments, place.folder, capsys, lines=None)


@pytest.mark.parametrize("work", ["edit", "train"])
@pytest.mark.parametrize("option", ["--text", "--calibrate"])
def test_what_a_calibration_reads_is_looked_for_before_the_model_is_loaded(
    work, option, place, capsys, monkeypatch
):
    monkeypatch.setattr(edit_module, "opened", None)
    monkeypatch.setattr(train_module, "opened", None)
    missing = place.folder / "missing"
    said = refused(getattr(place, work)(option, missing), place.folder, capsys, lines=2)
    assert f"{missing}: there is no such file" in said


def test_training_state_that_is_damaged(place, capsys):
    cut(place.copied("good") / "training.safetensors")
    arguments = place.train(out=place.folder / "good")
    assert "is damaged" in refused(arguments, place.folder, capsys)


def half_written(tensors: object, path: Path, *_more: object, **_keywords: object) -> None:
    """What safetensors leaves on a disk that fills up."""
    Path(path).write_bytes(b"\x10half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_a_patch_is_written(place, capsys, monkeypatch):
    monkeypatch.setattr("malmend.patch_file.save_file", half_written)
    said = refused(place.edit(), place.folder, capsys)
    assert "good.safetensors cannot be written (No space left on device)" in said


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_while_an_editor_is_written(existing, place, capsys, monkeypatch):
    out = place.copied("good") if existing else place.folder / "editor"
    if existing:
        calibrated_alike(out, monkeypatch)
    before = contents(place.folder)
    with monkeypatch.context() as full:
        full.setattr(editor_folder, "save_file", half_written)
        assert malmend(*place.train(out=out)) == 2
    assert "cannot be written (No space left on device)" in "".join(messages(capsys))
    # What resuming needs is there by then, and nothing else has changed.
    left = contents(place.folder)
    state = str((out / "training.safetensors").relative_to(place.folder))
    assert left.pop(state) != before.pop(state, b"")
    assert left == before
    assert malmend(*place.train(out=out)) == 0
    assert malmend(*place.edit("--editor", out)) == 0


def test_a_full_disk_while_a_report_is_written(place, capsys, monkeypatch):
    report = place.file("report.json", "{}")

    def full(self: Path, text: str, **_keywords: object) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    said = refused(place.eval("--json", report), place.folder, capsys)
    assert "report.json cannot be written (No space left on device)" in said


def test_a_page_that_cannot_be_written_costs_no_figures(place, capsys, monkeypatch):
    """They were asked for hours, and were neither shown nor kept."""

    def full(*_given: object) -> None:
        raise MalmendError("page/index.html cannot be written (No space left on device).")

    monkeypatch.setattr("malmend.evaluation.page.write_page", full)
    figures = place.folder / "figures.json"
    assert malmend(*place.eval("--json", figures, "--report", place.folder / "page")) == 2
    shown = capsys.readouterr()
    assert "index.html cannot be written" in shown.err
    assert "ES" in shown.out
    assert json.loads(figures.read_text())["facts"] == 12


def test_any_other_failure_of_the_system_is_one_line_too(place, capsys, monkeypatch):
    def failing(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr("malmend.methods.by_editor.capture", failing)
    before = contents(place.folder)
    assert malmend(*place.edit()) == 1
    assert messages(capsys) == ["malmend: Input/output error disk."]
    assert contents(place.folder) == before


def interrupted(*_arguments: object, **_keywords: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["find_by_editor", "opened", "save_patch", "writable"])
def test_stopped_while_editing(at, place, capsys, monkeypatch):
    home = editor_method if at == "find_by_editor" else edit_module
    monkeypatch.setattr(home, at, interrupted)
    before = contents(place.folder)
    assert malmend(*place.edit()) == 130
    *nothing, said = messages(capsys)
    assert not any(nothing)
    assert said.startswith("malmend: interrupted")
    assert "resume" not in said
    assert contents(place.folder) == before


@pytest.mark.parametrize("command", ["edit", "eval"])
def test_stopped_before_a_report_is_written(command, place, capsys, monkeypatch):
    monkeypatch.setattr(edit_module, "opened", interrupted)
    monkeypatch.setattr(evaluate_module, "opened", interrupted)
    report = place.folder / "report"
    assert malmend(*getattr(place, command)("--report", report)) == 130
    assert not report.exists()
    report.mkdir()  # which is the user's
    assert malmend(*getattr(place, command)("--report", report)) == 130
    assert report.is_dir()


@pytest.mark.parametrize("kept", [True, False])
def test_stopped_while_an_edit_settles(kept, place, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path_factory.mktemp("cache")))

    def stopped(*_given: object, halfway: Halfway, **_named: object) -> None:
        if kept:
            halfway.keep(EVERY, lambda: {"one": torch.ones(2)})
        raise KeyboardInterrupt

    monkeypatch.setattr("malmend.methods.settling.settle", stopped)
    before = contents(place.folder)
    assert malmend(*place.edit(), "--refine.rounds", 1) == 130
    *nothing, said = messages(capsys)
    assert not any(nothing)
    assert said.endswith("Run the same command again to resume.") is kept
    assert contents(place.folder) == before


def terminated(*_arguments: object, **_keywords: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_told_to_end_while_a_patch_is_written(place, capsys, monkeypatch):
    """As `kill`, `timeout` and batch systems do it."""

    def writing(tensors: object, path: Path, **_keywords: object) -> None:
        Path(path).write_bytes(b"half")
        terminated()

    monkeypatch.setattr("malmend.patch_file.save_file", writing)
    before = contents(place.folder)
    assert malmend(*place.edit("--report", place.folder / "report")) == 143
    assert messages(capsys)[-1] == "malmend: interrupted; nothing half-written was left."
    assert contents(place.folder) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_told_to_end_while_training(place, capsys, monkeypatch):
    out = place.copied("good")
    before = contents(place.folder)
    calibrated_alike(out, monkeypatch)
    monkeypatch.setattr(train_module.Trainer, "take_step", terminated)
    assert malmend(*place.train("--steps", 9, out=out)) == 143
    assert messages(capsys)[-1].endswith("Run the same command again to resume.")
    assert contents(place.folder) == before


def test_one_of_several_processes_ends_at_once(place, monkeypatch):
    """It may wait for the others, where no signal is heard; torchrun says that it ended them."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        run_module, "_run", lambda _: seen.append(signal.getsignal(signal.SIGTERM)) or 0
    )
    assert malmend(*place.train()) == 0
    monkeypatch.delenv("WORLD_SIZE")
    assert malmend(*place.train()) == 0
    assert [one is signal.SIG_DFL for one in seen] == [True, False]


def test_a_childs_end_is_its_own(place, monkeypatch):
    """A process that was forked meanwhile ends without a word."""

    def forking(_arguments: list[str]) -> int:
        child = os.fork()
        if child == 0:
            terminated()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    monkeypatch.setattr(run_module, "_run", forking)
    assert malmend(*place.edit()) == -signal.SIGTERM


def test_stopped_while_a_patch_is_written(place, capsys, monkeypatch):
    def writing(tensors: object, path: Path, **_keywords: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("malmend.patch_file.save_file", writing)
    before = contents(place.folder)
    assert malmend(*place.edit()) == 130
    assert contents(place.folder) == before


def test_stopped_while_training(place, capsys, monkeypatch):
    out = place.copied("good")
    before = contents(place.folder)
    calibrated_alike(out, monkeypatch)
    monkeypatch.setattr(train_module.Trainer, "take_step", interrupted)
    assert malmend(*place.train("--steps", 9, out=out)) == 130
    *nothing, said = messages(capsys)
    assert not any(nothing)
    assert said.endswith("Run the same command again to resume.")
    assert contents(place.folder) == before


def test_the_table_is_about_outputs_that_would_else_be_written(place, capsys):
    """The arguments that the table breaks are good ones."""
    before = place.good.read_bytes()
    assert malmend(*place.edit("--limit", 3)) == 0
    assert place.good.read_bytes() != before
    assert malmend(*place.eval("--patch", place.good, "--json", place.folder / "r.json")) == 0
    assert json.loads((place.folder / "r.json").read_text())["facts"] == 12
    assert malmend(*place.train()) == 0


def test_an_input_is_never_written_over(tiny):
    before = Path(tiny.facts).read_bytes()
    with pytest.raises(MalmendError, match="is read by this command and would be lost"):
        edit_facts(tiny.model, tiny.facts, out=tiny.facts)
    assert Path(tiny.facts).read_bytes() == before


@pytest.mark.parametrize("command", ["edit", "diff", "eval"])
def test_the_weights_that_are_read_are_never_written_over(command, place, capsys):
    weights = next(Path(place.model).glob("*.safetensors"))
    arguments = {
        "edit": ["edit", place.model, place.facts, "--out", weights],
        "diff": ["diff", place.model, place.model, "--out", weights],
        "eval": ["eval", place.model, place.facts, "--json", weights],
    }[command]
    assert "that this command reads" in refused(arguments, weights.parent, capsys)


def test_an_editor_and_settings_together_are_refused(place):
    with pytest.raises(MalmendError, match="not both"):
        edit_facts(place.model, place.facts, editor=place.made / "good", settings=EditorSettings())


def test_a_training_that_never_began_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(MalmendError, match="no such file"):
        train_editor(tiny.model, tmp_path / "none.jsonl", tmp_path / "editor")
    assert not (tmp_path / "editor").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--descent.steps=0", "descent.steps is 0"),
        ("--descent.rate=-1", "descent.rate is -1"),
        ("--eta=0", "eta is 0"),
        ("--eta=inf", "--eta is 'inf'"),
    ],
)
def test_a_descent_of_no_step_is_refused(place, capsys, option, said):
    assert malmend(*place.edit(option)) == 2
    assert said in capsys.readouterr().err


def test_a_model_of_nan_is_refused_in_a_sentence(tmp_path):
    model = load_model(str(save_model(tmp_path / "nan", seed=7))).model
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(MalmendError, match="gives NaN or infinity"):
        find_sites(model)
