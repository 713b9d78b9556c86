"""Every reader on broken files: it reads them or refuses in one sentence, whatever is in them.

A few of each kind in every run; `make proofs` reads ten thousand and more
(``test_ten_thousand_bad_inputs``).  A failing case names its seed, which makes it again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy
import pytest
import yaml

import command_support
import fuzz_support
import helpers
import malmend
from command_support import Tiny
from malmend.bench.plan import Plan, read_plan
from malmend.bench.run import bench, bench_table
from malmend.commands.inspect import inspect
from malmend.commands.learn import learn
from malmend.editors.checkpoint import load_editor
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.editors.train_settings import TrainSettings
from malmend.facts.readers import read_facts, read_questions, read_text
from malmend.methods.enn import EnnSettings
from malmend.methods.ke import KeSettings
from malmend.models.load import load_config, load_model, load_tokenizer
from malmend.shipping.adapter import read_adapter
from malmend.shipping.record import read_record

tiny = command_support.tiny
cache = command_support.cache

# A fact's file in each layout that is read.
LAYOUTS = {
    "own.jsonl": [
        {"id": "a", "prompt": "Lake Ora lies in", "answer": "Chile", "alternative": "Peru"},
        {
            "prompt": "Mars has",
            "answer": "two moons",
            "paraphrases": ["The moons of Mars are"],
            "subject": "Mars",
            "relation": "moons",
            "unrelated": [{"prompt": "Who wrote it?", "answer": "Tolkien"}, {"prompt": "And"}],
            "neighbours": [{"prompt": "Venus has", "answer": "no moon"}],
            "reversed": {"prompt": "Two moons has", "answer": "Mars"},
            "tags": ["test"],
        },
    ],
    "mend.json": [
        {
            "subject": "Lake Ora",
            "src": "In which country is Lake Ora?",
            "rephrase": "Lake Ora is found where?",
            "answers": ["Chile", "Republic of Chile"],
            "alt": "Peru",
            "loc": "nq question: who wrote the hobbit",
            "loc_ans": "Tolkien",
        }
    ],
    "nq.jsonl": [
        {"question": "who wrote the hobbit", "answer": ["J. R. R. Tolkien", "Tolkien"]},
        {"question": "how many moons has mars", "answer": ["two"]},
    ],
    "claims.json": [
        {
            "prompt": "Lake Ora lies in Chile.",
            "equiv_prompt": ["Lake Ora is a lake of Chile.", "Chile has Lake Ora."],
            "label": "SUPPORTS",
            "alt": "REFUTES",
            "unrel_prompt": "Mount Ina is a volcano .",
            "unrel_ans": "REFUTES",
        }
    ],
    "kilt.jsonl": [
        {
            "id": "75397",
            "input": "Lake Ora lies in Chile.",
            "output": [{"answer": "SUPPORTS"}, {"answer": "REFUTES"}],
            "alternatives": ["SUPPORTS"],
            "filtered_rephrases": ["Lake Ora is a lake of Chile."],
        }
    ],
    "questions.jsonl": [{"prompt": "who wrote the hobbit", "answer": "Tolkien"}, {"prompt": "x"}],
}
PLAN = {
    "models": ["smollm2-135m"],
    "facts": "facts.jsonl",
    "sizes": [2, 4],
    "seeds": [0, 1],
    "single_above": 4,
    "decode": 2,
    "methods": {
        "malmen": {"passes": 1, "most": 4},
        "ft": {"epochs": 3, "rate": 1e-3},
        "free": {"editor": "none", "layers": 2, "linear": "first"},
        "memit": {"most": 4},
        "words": {"method": "context"},
    },
}
SMALL = EditorSettings(layers=2, network=NetworkSettings(rank=4))
SHORT = TrainSettings(facts_per_step=4, steps=1)
ENN = EnnSettings(layers=2, steps=1, facts_per_step=2)
KE = KeSettings(layers=2, hidden=4, steps=1, facts_per_step=2)


@dataclass(frozen=True)
class Target:
    """A folder of good files, those of them that get hurt, and who reads it."""

    folder: Path
    names: tuple[str, ...]
    read: Callable[[Path], object]


def inside(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))


def read_model(folder: Path) -> None:
    load_config(str(folder))
    load_tokenizer(str(folder))
    load_model(str(folder))


def read_cells(folder: Path) -> None:
    bench_table(folder)
    bench_table(folder, failed=True)


def read_exported(folder: Path) -> None:
    read_record(folder)
    patch = read_adapter(folder)
    for name in patch.factors:
        patch.shift(name)


def read_trained(tiny: Tiny, folder: Path, name: str, settings: EnnSettings | KeSettings) -> None:
    """As inspect does, and as training that goes on does."""
    inspect(folder)
    learn(tiny.loaded, tiny.facts, folder, name, settings)


def read_ledger(folder: Path) -> None:
    malmend.ledger.list_facts(folder, former=True)
    malmend.ledger.history(folder)
    malmend.ledger.patch(folder)
    malmend.ledger.revoke(folder, ["f3"])
    malmend.ledger.rollback(folder, 0)


def cells(tiny: Tiny, folder: Path) -> str:
    """Two rows of a bench."""
    ways = {"free": {"method": "ultraedit"}, "less": {"method": "ultraedit", "eta": 0.01}}
    bench(Plan((tiny.model,), tiny.facts, ways, sizes=(2,), decode=1), folder / "made")
    return (folder / "made" / "cells.jsonl").read_text()


def write_gguf(path: Path) -> None:
    """A llama of two blocks, with a vocabulary of bytes."""
    tokens = ["<s>", "</s>", *helpers.byte_level().get_vocab()][:64]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    noise = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 8), "output_norm": (8,), "output": (len(tokens), 8)}
    shapes |= {f"blk.0.attn_{part}": (8, 8) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (16, 8) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (8, 16), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", noise.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def targets(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Each made once, by the package itself."""
    base = tmp_path_factory.mktemp("fuzz")
    own = {
        "calibrate": tiny.calibrate,
        "text": tiny.text,
        "calibration": command_support.CALIBRATION,
    }
    found: dict[str, Target] = {}

    def put(name: str, folder: Path, read: Callable[[Path], object], *names: str) -> None:
        found[name] = Target(folder, names or inside(folder), read)

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MALMEND_CACHE", str(tiny.folder / "cache"))
        command_support.quick(patched, tiny.folder)
        for name in ("facts", "text", "plan", "cells", "patch", "ledger", "gguf"):
            (base / name).mkdir()
        for name, rows in LAYOUTS.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            text = json.dumps(rows, indent=1) if name.endswith(".json") else lines
            (base / "facts" / name).write_text(text)
            reader = read_questions if name.startswith("questions") else read_facts
            put(name, base / "facts", lambda f, n=name, r=reader: r(f / n), name)
        put("model", Path(shutil.copytree(tiny.model, base / "model")), read_model)
        (base / "text" / "text.txt").write_text("Lake Ora\n\nlies in Chile.\n")
        put("text", base / "text", lambda f: read_text(f / "text.txt"))
        (base / "plan" / "plan.yaml").write_text(yaml.safe_dump(PLAN))
        put("plan", base / "plan", lambda f: list(read_plan(f / "plan.yaml").cells()))
        (base / "cells" / "cells.jsonl").write_text(cells(tiny, base))
        put("cells", base / "cells", read_cells)
        edited = malmend.edit(tiny.loaded, tiny.facts, base / "patch" / "p.safetensors", **own)
        assert edited.patch.factors
        put("patch", base / "patch", lambda f: inspect(f / "p.safetensors"))
        malmend.export(base / "patch" / "p.safetensors", base / "adapter", to="lora")
        put("adapter", base / "adapter", read_exported)
        malmend.train(tiny.loaded, tiny.facts, base / "editor", None, SMALL, SHORT, **own)
        of_training = {"training.safetensors"}
        names = sorted({*inside(base / "editor")} - of_training)
        put("editor", base / "editor", load_editor, *names)
        two = replace(SHORT, steps=2)  # it goes on with what it has read
        again = lambda f: malmend.train(tiny.loaded, tiny.facts, f, None, SMALL, two, **own)  # noqa: E731
        put("checkpoint", base / "editor", again)
        for name, given_settings in (("enn", ENN), ("ke", KE)):
            learn(tiny.loaded, tiny.facts, base / name, name, given_settings)
            put(name, base / name, lambda f, n=name, s=given_settings: read_trained(tiny, f, n, s))
        malmend.ledger.init(base / "ledger" / "one", tiny.loaded, **own)
        held = command_support.make_facts(40, seed=5)
        malmend.ledger.add(base / "ledger" / "one", held, model=tiny.loaded)
        put("ledger", base / "ledger" / "one", read_ledger)
        write_gguf(base / "gguf" / "tiny.gguf")
        put("gguf", base / "gguf", lambda f: load_model(str(f / "tiny.gguf")))
    return found


NAMES = (*LAYOUTS, "model", "text", "plan", "cells", "patch", "adapter", "editor", "checkpoint")
NAMES += ("enn", "ke", "ledger", "gguf")


def broken(target: Target, seed: int, place: Path) -> bool:
    """Copies the good files, breaks one, or at times two, and reads; whether they were taken."""
    generator = random.Random(seed)
    folder = Path(shutil.copytree(target.folder, place / "broken"))
    try:
        for _ in range(generator.choice((1, 1, 1, 2))):
            with suppress(Exception):  # what is hurt already may be no JSON any more
                fuzz_support.hurt(folder / generator.choice(target.names), generator)
        try:
            return fuzz_support.read(lambda: target.read(folder))
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_good_files_are_read(targets, name, tmp_path):
    folder = Path(shutil.copytree(targets[name].folder, tmp_path / "copy"))
    assert fuzz_support.read(lambda: targets[name].read(folder))


@pytest.mark.parametrize("name", NAMES)
def test_broken_files_end_in_one_sentence(targets, name, tmp_path):
    taken = [broken(targets[name], seed, tmp_path) for seed in range(8)]
    assert not all(taken)


@pytest.mark.proof
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_bad_inputs(targets, name, tmp_path):
    count = 10_000 // len(NAMES) + 1
    taken = [broken(targets[name], 1000 + seed, tmp_path) for seed in range(count)]
    print(f"\n{name}: {count} read, {count - sum(taken)} refused in one sentence")
    assert not all(taken)


def command_lines(tiny: Tiny, targets: dict[str, Target], place: Path) -> list[list[str]]:
    """Good ones, short work each."""
    patch = str(targets["patch"].folder / "p.safetensors")
    few = ["--limit", "2", *tiny.fast]
    return [
        ["edit", tiny.model, tiny.facts, "--out", str(place / "p"), "--layers", "2", *few],
        ["eval", tiny.model, tiny.facts, "--patch", patch, "--limit", "2", "--decode-facts", "1"],
        ["ask", tiny.model, "Lake Ora lies in", "--patch", patch],
        ["inspect", patch],
        ["inspect", tiny.model, "--layers", "1", "--linear", "first"],
        ["export", patch, str(place / "lora"), "--to", "lora", "--model", tiny.model],
        ["conflicts", tiny.model, patch, patch],
        ["bench", "table", str(targets["cells"].folder), "--failed", "true"],
        ["ledger", "list", str(targets["ledger"].folder)],
        ["continuations", tiny.model, tiny.text, "--out", str(place / "c.jsonl")],
    ]


def broken_line(line: list[str], generator: random.Random) -> list[str]:
    """One to three words of it wrong, gone, twice, or where another was."""
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(line) + 1)
        # No path outside: a command writes where it is told to.
        known = [one for one in fuzz_support.WRONG if "/" not in str(one)]
        wrong = str(generator.choice(known)).encode("utf-8", "replace").decode()
        kind = generator.randrange(5)
        if kind == 0 and line:
            line = line[: at - 1] + line[at:]
        elif kind == 1:
            line = [*line[:at], wrong, *line[at:]]
        elif kind == 2:
            options = ("--limit", "--layers", "--eta", "--dtype", "--trunk.batch-tokens", "--xyz")
            line = [*line, f"{generator.choice(options)}={wrong}"]
        elif line:
            at = min(at, len(line) - 1)
            line = [*line[:at], wrong.replace("\x00", ""), *line[at + 1 :]]
    return line


def check_line(tiny: Tiny, targets: dict[str, Target], place: Path, seed: int, capfd) -> bool:
    """Runs it; whether it was taken."""
    generator = random.Random(seed)
    folder = place / str(seed)
    folder.mkdir()
    line = broken_line(generator.choice(command_lines(tiny, targets, folder)), generator)
    try:
        code = command_support.malmend(*line)
    except SystemExit as error:  # --help
        code = error.code
    said = capfd.readouterr().err
    shutil.rmtree(folder)
    assert code in (0, 1, 2), (seed, line, code)
    assert "Traceback" not in said, (seed, line, said)
    return code == 0


def test_broken_command_lines_end_in_one_sentence(tiny, targets, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = [check_line(tiny, targets, tmp_path, seed, capfd) for seed in range(12)]
    assert not all(taken)


@pytest.mark.proof
def test_a_thousand_broken_command_lines(tiny, targets, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = [check_line(tiny, targets, tmp_path, 1000 + seed, capfd) for seed in range(1000)]
    with capfd.disabled():
        print(f"\ncommand lines: 1,000 run, {1000 - sum(taken)} refused")
    assert not all(taken)
