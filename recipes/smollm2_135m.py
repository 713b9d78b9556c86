"""Train the editor that the package ships for SmolLM2-135M, and measure it.

    python recipes/smollm2_135m.py train      # recipes/out/, resumes where it was
    python recipes/smollm2_135m.py ship       # into the package, in half precision
    python recipes/smollm2_135m.py measure    # the shipped editor at m = 1 to 4,096, and its card

Training facts are the train split of the project's own, every second one towards its alternative,
so that the editor learns to write what the model does not believe.  ``--qa FILE`` adds facts in the
layout of MEND's zsRE files, ``--locality FILE`` more unrelated questions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from card import card

from malmend import edit, evaluate, load_model, train
from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.settings import EditorSettings
from malmend.editors.training import StepRecord, TrainSettings
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Fact, FactSet, Question
from malmend.facts.readers import read_facts, read_questions
from malmend.workbench import shipped, spread

OUT = Path(__file__).resolve().parent / "out"
NAME = "smollm2-135m"
SIZES = (1, 64, 256, 1024, 4096)
OWN_FACTS, QA_FACTS, QUESTIONS = 2560, 3072, 300
SETTINGS = TrainSettings()
EDITOR = EditorSettings()


def training_facts(qa: Path | None) -> list[Fact]:
    """The project's own training facts, half of them counterfactual, and ``--qa``'s, mixed."""
    own = [fact for fact in read_facts(shipped("facts.jsonl")) if "train" in fact.tags]
    own = spread(own, OWN_FACTS)  # over all relations
    false = [fact for index, fact in enumerate(own) if index % 2 and fact.alternative]
    changed = {fact.id: fact for fact in towards_alternatives(FactSet("own", tuple(false)))}
    facts = [changed.get(fact.id, fact) for fact in own]
    if qa is not None:
        others = list(read_facts(qa))
        random.Random(0).shuffle(others)
        facts += others[:QA_FACTS]
    return facts


def unrelated_questions(locality: Path | None) -> list[Question]:
    """The project's own general questions, and ``--locality``'s."""
    questions = list(read_questions(shipped("questions.jsonl")))[:QUESTIONS]
    if locality is not None:
        questions += read_questions(locality)
    return questions


def test_facts(qa_dev: Path | None, size: int) -> list[Fact]:
    """Facts that were not trained on: ``--qa-dev``'s where given, else the test split's."""
    if qa_dev is not None:
        facts = list(read_facts(qa_dev))
    else:
        facts = [fact for fact in read_facts(shipped("facts.jsonl")) if "test" in fact.tags]
    random.Random(0).shuffle(facts)
    return [replace(fact, paraphrases=fact.paraphrases[:3]) for fact in facts[:size]]


def said(record: StepRecord) -> None:
    """One line per step."""
    print(
        f"step {record.step}/{SETTINGS.steps} loss {record.loss:.3f} gen {record.gen:.3f} "
        f"loc {record.loc:.3f} eta {record.eta:.3f} {record.seconds:.1f} s",
        flush=True,
    )


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per size and set of facts, unedited beside edited."""
    loaded = load_model(NAME)
    rows: list[dict[str, Any]] = []
    own = test_facts(None, 512)
    sets: list[tuple[str, Sequence[Fact]]] = [
        ("own", own),
        ("own, counterfactual", towards_alternatives(FactSet("own", tuple(own)))),
    ]
    source = "own" if args.qa_dev is None else "qa"
    sets += [(source, test_facts(args.qa_dev, size)) for size in SIZES]
    for name, facts in sets:
        done = edit(loaded, facts)
        report = evaluate(
            loaded, facts, done.patch, decode_facts=min(256, len(facts)), text=args.text
        )
        row = {
            "facts": name,
            "m": len(facts),
            "unedited": {kind: asdict(one) for kind, one in report.unedited.items()},
            "edited": {kind: asdict(one) for kind, one in report.edited.items()},
            "perplexity": dict(report.perplexity),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        (OUT / "metrics.json").write_text(json.dumps(rows, indent=1))
    return rows


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("train", "ship", "measure"))
    parser.add_argument("--qa", type=Path, help="more training facts (MEND / zsRE JSON)")
    parser.add_argument("--locality", type=Path, help="more unrelated questions")
    parser.add_argument("--qa-dev", type=Path, help="facts to measure on in place of our own")
    parser.add_argument("--text", type=Path, help="text to measure perplexity on")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    folder = shipped("editors") / NAME
    if args.stage == "train":
        train(
            NAME,
            training_facts(args.qa),
            OUT / "editor",
            unrelated_questions(args.locality),
            settings=SETTINGS,
            editor=EDITOR,
            stepped=said,
        )
    elif args.stage == "ship":
        saved = load_editor(OUT / "editor")
        about = {name: value for name, value in saved.about.items() if name != "curve"}
        save_editor(saved.editor, about, folder, slim=True)
    else:
        figures = measured(args)
        (folder / "README.md").write_text(card(NAME, load_editor(folder).about, figures), "utf-8")


if __name__ == "__main__":
    main()
