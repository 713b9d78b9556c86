"""One tiny model on disk with facts, text and a cache folder, for the tests of whole commands.

tiny = command_support.tiny            (a fixture; assign it in the module that uses it)
cache = command_support.cache          (autouse: MALMEND_CACHE points into a temporary folder)
malmend("edit", model, facts, ...)     runs the command line in process
reached = command_support.reached      (a fixture: what a command's function would be called with)
"""

from __future__ import annotations

import functools
import importlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import helpers
from malmend import known, ledger, material
from malmend.cli import main
from malmend.editors.calibration import CalibrationSettings
from malmend.facts.fact import Fact, Question
from malmend.models.load import LoadedModel, prepared
from malmend.workbench import shipped

# Threads of a busy machine wait for one another; these matrices are too small to share.
torch.set_num_threads(1)

SYLLABLES = ("ka", "lo", "mi", "ru", "se", "to", "va", "ne")
CALIBRATION = CalibrationSettings(moment_facts=12, prior_facts=12, search_facts=8, text_tokens=400)
# Little held to the old behaviour, so that few facts on a random model can be learned at all.
EAGER = replace(CALIBRATION, search_facts=4, etas=(1.0,), alphas=(0.01,))


@dataclass(frozen=True)
class Tiny:
    """Paths of what a command needs, and the same model in memory."""

    folder: Path
    model: str
    facts: str
    calibrate: str
    text: str
    loaded: LoadedModel

    @property
    def fast(self) -> list[str]:
        """Options that calibrate on a dozen facts of this folder."""
        return ["--calibrate", self.calibrate, "--text", self.text]


def name_of(generator: random.Random) -> str:
    return "".join(generator.choices(SYLLABLES, k=2)).capitalize()


def cut_otherwise(folder: Path) -> None:
    """Lets two entries of a saved tokenizer's vocabulary change places."""
    path = folder / "tokenizer.json"
    said = json.loads(path.read_text())
    known = said["model"]["vocab"]
    first, second = sorted(known)[-2:]
    known[first], known[second] = known[second], known[first]
    path.write_text(json.dumps(said))


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """Facts with two paraphrases; every third one has an unrelated question without an answer."""
    generator = random.Random(seed)
    facts = []
    for index in range(count):
        subject, answer = f"{name_of(generator)}{index}", name_of(generator)
        other = Question(f"The capital of {name_of(generator)} is", name_of(generator))
        unrelated = (other, Question(f"Lake {name_of(generator)} lies")) if index % 3 == 0 else ()
        facts.append(
            Fact(
                id=f"f{index}",
                prompt=f"The capital of {subject} is",
                answer=answer,
                paraphrases=(f"{subject} has the capital", f"In {subject} is the capital"),
                unrelated=unrelated or (other,),
                line=index + 1,
            )
        )
    return facts


def as_lines(facts: Sequence[Fact]) -> str:
    """The facts as a file of malmend's own format."""
    rows = []
    for fact in facts:
        unrelated = [
            {"prompt": one.prompt} | ({} if one.answer is None else {"answer": one.answer})
            for one in fact.unrelated
        ]
        row = {"id": fact.id, "prompt": fact.prompt, "answer": fact.answer}
        row |= {"paraphrases": list(fact.paraphrases), "unrelated": unrelated}
        rows.append(json.dumps(row))
    return "\n".join(rows) + "\n"


def make_model(
    tokenizer: PreTrainedTokenizerFast, layers: int = 6, seed: int = 0, family: str = "llama"
) -> PreTrainedModel:
    """A random float32 decoder of hidden width 32 whose predictions are far from uniform."""
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 128, "n_layer": layers, "n_positions": 512}
        model = helpers.tiny_gpt2(len(tokenizer), seed, initializer_range=0.3, **sizes, **ends)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": layers}
        sizes |= {"max_position_embeddings": 512}
        model = helpers.tiny_llama(len(tokenizer), seed, initializer_range=0.3, **sizes, **ends)
    return model.float().requires_grad_(False)


def save_model(folder: Path, layers: int = 6, seed: int = 0) -> str:
    """Writes model and tokenizer as transformers does."""
    tokenizer = helpers.byte_level()
    make_model(tokenizer, layers, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


_MADE: list[Tiny] = []


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Made once in a run, whichever module asks first."""
    if not _MADE:
        folder = tmp_path_factory.mktemp("tiny")
        (folder / "facts.jsonl").write_text(as_lines(make_facts(12)))
        (folder / "calibrate.jsonl").write_text(as_lines(make_facts(12, seed=1)))
        generator = random.Random(2)
        lines = [" ".join(name_of(generator) for _ in range(8)) for _ in range(30)]
        (folder / "text.txt").write_text("\n".join(lines))
        model = save_model(folder / "model")
        (folder / "cache").mkdir()
        tokenizer = helpers.byte_level()
        _MADE.append(
            Tiny(
                folder=folder,
                model=model,
                facts=str(folder / "facts.jsonl"),
                calibrate=str(folder / "calibrate.jsonl"),
                text=str(folder / "text.txt"),
                loaded=prepared(make_model(tokenizer), tokenizer, model),
            )
        )
    return _MADE[0]


@pytest.fixture(autouse=True)
def cache(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is read from, or left in, the user's own cache folder; all is as :func:`quick`."""
    monkeypatch.setenv("MALMEND_CACHE", str(tiny.folder / "cache"))
    quick(monkeypatch, tiny.folder)
    return tiny.folder / "cache"


def quick(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of what the package ships to calibrate and hold by only a part is read, from this folder.

    With tiny models to read all of it takes longer than everything else.
    """
    for module in (known, material):
        patch.setattr(module, "shipped", functools.partial(thinned, folder))


@pytest.fixture
def whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the package ships is read after all."""
    for module in (known, material):
        monkeypatch.setattr(module, "shipped", shipped)


def thinned(folder: Path, name: str) -> Path:
    """A part of a data file of the package: every so many lines, but all that no edit holds."""
    path, every = folder / "shipped" / name, {"facts.jsonl": 16, "wikipedia.txt": 16, "text.txt": 4}
    if not path.exists():
        lines = shipped(name).read_text(encoding="utf-8").splitlines(keepends=True)
        back = material.KEPT_BACK if name == "questions.jsonl" else 0
        some = lines[: len(lines) - back][:: every.get(name, 8)] + lines[len(lines) - back :]
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(some), encoding="utf-8")
    return path


def teach(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], steps: int = 300
) -> None:
    """Trains every weight until greedy decoding goes on from each first part with the second."""
    model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = torch.zeros(())
        for start, answer in rows:
            logits = model(input_ids=torch.tensor([[*start, *answer]]), use_cache=False).logits[0]
            wanted = torch.tensor(answer)
            found = logits[len(start) - 1 : -1].float()
            loss = loss + torch.nn.functional.cross_entropy(found, wanted)
        if loss.item() < 0.05:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)


@torch.no_grad()
def greedy(
    loaded: LoadedModel, ids: Sequence[int], ends: set[int], limit: int, whole: bool = False
) -> str:
    """Greedy decoding as plainly as it can be said: no cache, no batch, no padding."""
    new: list[int] = []

    def text() -> str:
        return loaded.tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    while len(new) < limit:
        row = torch.tensor([[*ids, *new]])
        token = int(loaded.model(input_ids=row, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
        if not whole and "\n" in text().lstrip():
            break
    return text().strip() if whole else text().lstrip().split("\n")[0].strip()


def malmend(*arguments: object) -> int:
    """The command line in this process; returns the exit code."""
    return main([str(one) for one in arguments])


def files_in(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Reached(Exception):
    """Carries what a command was called with out of the command line."""

    def __init__(self, given: dict[str, Any]):
        self.given = given
        super().__init__(given)


@pytest.fixture
def reached(monkeypatch):
    """Parses a command line and returns what the command's function would be called with."""

    def reaching(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # options are derived from the signature and the docstring
        def called(**given: object) -> None:
            raise Reached(given)

        return called

    for name in ("edit", "train", "evaluate", "ask", "inspect", "demo"):
        module = importlib.import_module(f"malmend.commands.{name}")
        monkeypatch.setattr(module, name, reaching(getattr(module, name)))
    monkeypatch.setattr(ledger, "init", reaching(ledger.init))

    def reach(*arguments: object) -> dict[str, Any]:
        with pytest.raises(Reached) as stopped:
            malmend(*arguments)
        return stopped.value.given

    return reach
