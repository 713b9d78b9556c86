"""Facts that go on coming: a ledger beside edits one on top of another.

    python benchmarks/lifelong.py                            # 20 batches of 100 facts
    python benchmarks/lifelong.py --batches 16               # of the project's own facts alone
    python benchmarks/lifelong.py --batches 2 --size 10      # a trial
    python benchmarks/lifelong.py --text wikitext.txt        # perplexity on a text of yours

Three ways to take in a batch, each with the same facts in the same order:

- ledger: `malmend ledger add`; every shift is that of all facts so far, solved at once;
- naive: the same editor, each batch captured on the model as the ones before it left it, and its
  shift put on top of theirs;
- ultraedit: the same with UltraEdit's normalisation, which goes on (no editor).

After every batch: its own success, what the model keeps of its answers to general questions, the
norm of the shift as a share of the edited weights' own, and perplexity.  At the end every batch is
asked again.  Results are written after each batch, as JSON, and printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import malmend
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.checkpoint import load_editor
from malmend.editors.editor import Editor
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.perplexity import perplexity, unread
from malmend.evaluation.protocols import scores
from malmend.evaluation.replies import Replies
from malmend.facts.fact import Fact
from malmend.facts.readers import read_text
from malmend.files import written_beside
from malmend.ledgers.access import reading
from malmend.material import held_out_questions
from malmend.methods.ultraedit import UltraEdit
from malmend.models.capture import capture
from malmend.patch import shifted
from malmend.progress import silent
from malmend.workbench import Workbench, lay_out, shipped

OUT = Path(__file__).resolve().parent / "out" / "lifelong.json"
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
GENERAL = 60  # questions whose answers should stay
Shifts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judge:
    """Asks a model with shifts on; everything is asked of the unedited one first."""

    bench: Workbench
    batches: Sequence[Sequence[Fact]]
    text: str
    weight_norm: float
    decode: int

    def asked(self, batch: int) -> list[Fact]:
        """Edit prompts and first paraphrases; beside the first fact, the general questions."""
        general = held_out_questions(self.bench.encoder, GENERAL)
        facts = [replace(one.alone, paraphrases=one.paraphrases[:1]) for one in self.batches[batch]]
        return [replace(facts[0], unrelated=general), *facts[1:]]

    def judge(self, batch: int, shifts: Shifts) -> dict[str, Any]:
        """Success of one batch, and what else moved."""
        bench, facts = self.bench, self.asked(batch)
        examiner = Examiner(bench.loaded, bench.trunk, bench.encoder)
        before = examiner.examine(facts, decode_facts=0, remember=True)
        with shifted(list(bench.trunk.sites), shifts):
            after = examiner.examine(facts, decode_facts=self.decode)
            surprise = perplexity(bench.loaded, bench.trunk, self.text)
        left = scores(after, before)["LS"]
        return {
            **success(after),
            "retention": left.retention,
            "kl": left.kl,
            "perplexity": surprise,
            "norm": norm(shifts) / self.weight_norm,
        }

    def at_the_end(self, shifts: Shifts) -> list[dict[str, Any]]:
        """Success of every batch with the last shifts."""
        bench = self.bench
        examiner = Examiner(bench.loaded, bench.trunk, bench.encoder)
        with shifted(list(bench.trunk.sites), shifts):
            return [
                success(examiner.examine(self.asked(one), decode_facts=self.decode))
                for one in range(len(self.batches))
            ]


def success(replies: Replies) -> dict[str, float | None]:
    """Edit prompts under three protocols, and paraphrases."""
    return {
        "ES": replies.mean("ES", "token_ratio"),
        "exact": replies.mean("ES", "exact"),
        "generated": replies.mean("ES", "generated"),
        "GS": replies.mean("GS", "token_ratio"),
    }


def norm(shifts: Shifts) -> float:
    """Of all shifts together."""
    return float(sum(shift_VK.square().sum().item() for shift_VK in shifts.values()) ** 0.5)


def by_ledger(
    bench: Workbench, folder: Path, batches: Sequence[Sequence[Fact]]
) -> Iterator[tuple[Shifts, dict[str, Any]]]:
    """Every batch added to the ledger; says what its rule warned of."""
    for batch in batches:
        done = malmend.ledger.add(folder, batch, model=bench.loaded)
        patch = malmend.ledger.patch(folder)
        shifts = {name: patch.shift(name).double() for name in patch.factors}
        yield shifts, {"warning": done.warning}


def by_naive(
    bench: Workbench, editor: Editor, batches: Sequence[Sequence[Fact]]
) -> Iterator[tuple[Shifts, dict[str, Any]]]:
    """Every batch edited into the model as the others left it."""
    shifts: dict[str, Tensor] = {}
    for batch in batches:
        questions = bench.encoder.encode_all(fact.question for fact in batch)
        on = [site for site in bench.trunk.sites if site.name in shifts]
        with shifted(on, shifts):
            captured = capture(
                bench.trunk, questions, editor.settings.tokens, editor.settings.descent
            )
        new = editor.shifts(captured)
        shifts = {name: one + shifts[name] if shifts else one for name, one in new.items()}
        yield shifts, {}


def by_ultraedit(
    bench: Workbench, batches: Sequence[Sequence[Fact]]
) -> Iterator[tuple[Shifts, dict[str, Any]]]:
    """UltraEdit as it is published: batch after batch, with one normalisation."""
    facts = [fact for batch in batches for fact in batch]
    for found in UltraEdit(batch=len(batches[0])).batches(bench, facts, silent):
        yield found.shifts, {}


def run(
    judge: Judge,
    ways: Mapping[str, Callable[[], Iterator[tuple[Shifts, dict[str, Any]]]]],
    out: Path,
) -> dict[str, Any]:
    """Every way in turn; what is known so far is in the file after each batch."""
    results: dict[str, Any] = {}
    for name, way in ways.items():
        rows: list[dict[str, Any]] = []
        results[name] = {"batches": rows}
        start, shifts = time.perf_counter(), {}
        for batch, (shifts, said) in enumerate(way()):
            seconds = time.perf_counter() - start
            rows.append(
                {"batch": batch + 1, "seconds": seconds, **said, **judge.judge(batch, shifts)}
            )
            write(results, out)
            print(f"{name} {batch + 1}/{len(judge.batches)}: ES {rows[-1]['ES']:.3f}", flush=True)
            start = time.perf_counter()
        for row, last in zip(rows, judge.at_the_end(shifts), strict=True):
            row["at_the_end"] = last
        write(results, out)
    return results


def write(results: Mapping[str, Any], out: Path) -> None:
    """As JSON, never half written."""
    with written_beside(out) as beside:
        beside.write_text(json.dumps(results, indent=1))


def markdown(results: Mapping[str, Any]) -> str:
    """One line per way and batch."""
    columns = ("ES", "exact", "generated", "GS")
    lines = [
        "| way | batch | ES | exact | generated | GS | ES at the end | generated at the end "
        "| retention | KL | perplexity | norm | s |",
        "|---|---:|" + "---:|" * 11,
    ]
    for name, found in results.items():
        for row in found["batches"]:
            last = row["at_the_end"]
            cells = [f"{row[one]:.3f}" for one in columns]
            cells += [f"{last['ES']:.3f}", f"{last['generated']:.3f}"]
            cells += [f"{row['retention']:.3f}", f"{row['kl']:.3f}", f"{row['perplexity']:.1f}"]
            cells += [f"{row['norm']:.4f}", f"{row['seconds']:.0f}"]
            lines.append(f"| {name} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def facts_of(path: str | None) -> list[Fact]:
    """A file's; else facts in zsRE layout where they are there, else the project's own test facts.

    The shipped editor was trained on none of these two.
    """
    beside = BESIDE / "qa" / "dev.json"
    if path is not None or beside.is_file():
        return list(malmend.read_facts(path or beside))
    return [fact for fact in malmend.read_facts(shipped("facts.jsonl")) if "test" in fact.tags]


def main() -> None:
    """Runs all three ways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", help="else those beside the project, or its own test facts")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--decode", type=int, default=20, help="facts asked free-running")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", help="for perplexity; else the lines the prior has not read")
    parser.add_argument("--editor", default="auto", help="as of malmend edit")
    parser.add_argument("--ways", nargs="+", default=["ledger", "naive", "ultraedit"])
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)

    loaded = malmend.load_model(given.model)
    facts = facts_of(given.facts)
    random.Random(given.seed).shuffle(facts)
    needed = given.batches * given.size
    if len(facts) < needed:
        parser.error(f"{needed:,} facts are needed and there are {len(facts):,}; lower --batches")
    batches = [facts[at : at + given.size] for at in range(0, needed, given.size)]

    folder = Path(tempfile.mkdtemp()) / "ledger"
    try:
        malmend.ledger.init(folder, loaded, editor=given.editor)
        editor = load_editor(folder / "editor").editor
        settings = editor.settings
        bench = lay_out(loaded, settings.sites_in(loaded.model), settings.end_of_answer)
        plain = unread(
            bench.encoder, read_text(shipped("text.txt")), CalibrationSettings().text_tokens
        )
        text = read_text(given.text) if given.text else plain.words
        with reading(folder) as held:
            weight_norm = held.about.weight_norm
        judge = Judge(bench, batches, text, weight_norm, given.decode)
        print(f"unedited: perplexity {perplexity(loaded, bench.trunk, text):.2f}", flush=True)
        ways = {
            "ledger": lambda: by_ledger(bench, folder, batches),
            "naive": lambda: by_naive(bench, editor, batches),
            "ultraedit": lambda: by_ultraedit(bench, batches),
        }
        results = run(judge, {name: ways[name] for name in given.ways}, given.out)
        print(markdown(results))
    finally:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
