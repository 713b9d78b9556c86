"""Fact verification with an encoder (MALMEN's FEVER setting): the scaling curve and Table 1.

    python benchmarks/claims.py finetune   # benchmarks/out/claims/model, resumes where it was
    python benchmarks/claims.py train      # benchmarks/out/claims/editor, likewise
    python benchmarks/claims.py curve      # m = 16 to 2,048, three draws up to 512
    python benchmarks/claims.py table      # 512 claims: the sum, the first layer, the first token

Claims are read in the layout of MALMEN's FEVER files from ``--data`` (``claims/train.json`` and
``claims/dev.json``).  The model learns the claims of both (A.4), the editor is trained on the first
and edits the second, every claim away from what the model says.  Retention is of unrelated
claims and, as neighbours, of as many dev claims that are not edited.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import malmend
from malmend.commands.finetune import finetune
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.editors.train_settings import TrainSettings
from malmend.facts.fact import Fact, Question
from malmend.files import written_beside
from malmend.models.finetune import FinetuneSettings

OUT = Path(__file__).resolve().parent / "out" / "claims"
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
MODEL, CLAIMS, SEEDS = "minilm-l6", 2500, (0, 1, 2)
SIZES = (16, 64, 256, 512, 1024, 2048)
ONE = RefineSettings(passes=1)
LEARNED = 1600  # train claims that are edited in training; the rest stand beside them
FREE = training_free()
# One solve asks for more than four do: the search, which solves once, would find 1.8.
CALIBRATION = CalibrationSettings(prior_facts=1024, alphas=(30.0,), asked=6.0, etas=(1.4,))


def dev_claims(data: Path, size: int, seed: int) -> list[Fact]:
    """Claims to edit, each beside one that is not edited."""
    known = list(malmend.read_facts(data / "claims" / "dev.json", CLAIMS))
    random.Random(seed).shuffle(known)
    return [
        replace(fact, neighbours=(Question(other.prompt, other.answer),))
        for fact, other in zip(known[:size], cycle(known[size:]), strict=False)
    ]


def calibration_facts(data: Path) -> Path:
    """Train claims, each beside four others of the file that must not move, in a file."""
    path = OUT / "calibration.jsonl"
    facts = train_claims(data)[:1024]
    rest = iter(list(malmend.read_facts(data / "claims" / "train.json"))[CLAIMS:])
    facts = [
        replace(fact, neighbours=tuple(Question(other.prompt) for other in islice(rest, 4)))
        for fact in facts
    ]
    rows = [
        {
            "prompt": fact.prompt,
            "answer": fact.answer,
            "alternative": fact.alternative,
            "paraphrases": fact.paraphrases,
            "unrelated": [{"prompt": question.prompt} for question in fact.unrelated],
            "neighbours": [{"prompt": question.prompt} for question in fact.neighbours],
        }
        for fact in facts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_claims(data: Path) -> list[Fact]:
    """Claims to train on, each beside others of the same kind that are not edited."""
    known = list(malmend.read_facts(data / "claims" / "train.json", CLAIMS))
    random.Random(0).shuffle(known)
    facts, others = known[:LEARNED], known[LEARNED:]
    return [
        replace(
            fact,
            neighbours=tuple(
                Question(others[(index + step) % len(others)].prompt) for step in (0, 307, 613)
            ),
        )
        for index, fact in enumerate(facts)
    ]


def unrelated_claims(data: Path) -> Path:
    """The unrelated claims of both files, in a facts file: they are part of what is verified."""
    path, seen = OUT / "unrelated.jsonl", set[str]()
    rows = []
    for name in ("train.json", "dev.json"):
        for fact in malmend.read_facts(data / "claims" / name):
            for question in fact.unrelated:
                if question.prompt not in seen:
                    seen.add(question.prompt)
                    rows.append({"prompt": question.prompt, "answer": question.answer})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measured(
    name: str,
    data: Path,
    size: int,
    seed: int,
    editor: str | Path = "none",
    settings: EditorSettings | None = FREE,
    refine: RefineSettings = RefineSettings(),
) -> dict:
    """One row of a table."""
    loaded = malmend.load_model(str(OUT / "model"))
    facts = dev_claims(data, size, seed)
    patch = malmend.edit(
        loaded,
        facts,
        editor=editor,
        settings=settings,
        away=True,
        calibrate=calibration_facts(data) if settings is not None else None,
        calibration=CALIBRATION if settings is not None else CalibrationSettings(),
        refine=refine,
    ).patch
    report = malmend.eval(loaded, facts, patch, away=True)
    before, after = report.unedited, report.edited
    row = {
        "editor": name,
        "m": size,
        "seed": seed,
        "ES": after["ES"].exact,
        "GS": after["GS"].exact,
        "LS": after["LS"].exact,
        "LS unedited": before["LS"].exact,
        "retention unrelated": after["LS"].retention,
        "retention same kind": after["NS"].retention,
        "ES unedited": before["ES"].exact,
        "GS unedited": before["GS"].exact,
    }
    said = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    print(said, flush=True)
    return row


def train_editor(data: Path, folder: Path) -> None:
    """Algorithm 2 on train claims."""

    def show(record: object) -> None:
        print(record, flush=True)

    malmend.train(
        str(OUT / "model"),
        train_claims(data),
        folder,
        away=True,
        settings=EditorSettings(),
        training=TrainSettings(facts_per_step=512, halvings=1, steps=24, locality_weight=2.0),
        calibration=CALIBRATION,
        stepped=show,
    )


def main() -> None:
    """Which of the four."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["finetune", "train", "curve", "table"])
    parser.add_argument("--data", type=Path, default=BESIDE)
    given = parser.parse_args()
    files = [given.data / "claims" / name for name in ("train.json", "dev.json")]
    if not all(path.is_file() for path in files):
        print(f"There are no claims in {given.data}; name their folder with --data.")
        return
    rows = []
    if given.what == "finetune":
        learned = [*files, unrelated_claims(given.data)]
        finetune(MODEL, learned, OUT / "model", FinetuneSettings(), limit=CLAIMS, stepped=print)
    elif given.what == "train":
        train_editor(given.data, OUT / "editor")
    elif given.what == "curve":
        for size in SIZES:
            for seed in SEEDS if size <= 512 else SEEDS[:1]:
                rows.append(measured("trained", given.data, size, seed, OUT / "editor", None))
    else:
        variants = {
            "without a network": (FREE, RefineSettings()),
            "without a network, one solve": (FREE, ONE),
            "sum": (replace(FREE, method="mend"), ONE),
            "first layer": (replace(FREE, linear="first"), RefineSettings()),
            "first token": (replace(FREE, tokens="answer"), RefineSettings()),
        }
        for seed in SEEDS:
            rows.append(measured("one solve", given.data, 512, seed, OUT / "editor", None, ONE))
            for name, (settings, refine) in variants.items():
                rows.append(measured(name, given.data, 512, seed, "none", settings, refine))
    if rows:
        with written_beside(OUT / f"{given.what}.json") as beside:
            beside.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
