"""What each stage costs, beside the published procedure and the matrix-product ceiling.

    make bench                                     # all of it; benchmarks/out/speed/rows.json
    python benchmarks/speed.py step solve          # some of it; step-solve.json beside

Every ratio is of two things measured in this run, one after the other.  Memory is anonymous memory
beyond what was held before the stage began: model, editor and questions are loaded by then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from straightforward import Straightforward, answered
from torch.utils.flop_counter import FlopCounterMode

import malmend
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.editor import Editor
from malmend.editors.metaloss import meta_loss
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, published
from malmend.editors.train_settings import TrainSettings, published_training
from malmend.editors.training import Trainer
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.replies import questions_of
from malmend.facts.encoded import collate
from malmend.facts.fact import Fact, FactSet
from malmend.files import written_beside
from malmend.material import calibrated
from malmend.memory import Room, peak_memory
from malmend.models.capture import capture
from malmend.models.store import ActivationStore
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.numerics.chunks import chunks
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor
from malmend.workbench import Workbench, encoder_for, lay_out, shipped

OUT = Path(__file__).resolve().parent / "out" / "speed"
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
FACTS = 256
KEEP = 4_000_000_000  # bytes of the store
ROOM = 500_000_000  # bytes of captured tensors in memory


@dataclass(frozen=True)
class Row:
    """One measurement: seconds and megabytes, and what they are set against."""

    what: str
    seconds: float
    megabytes: float | None = None
    beside: str = ""
    times: float | None = None  # how many times faster
    share: float | None = None  # of the matrix-product ceiling
    said: str = ""


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, megabytes and what came out."""
    with peak_memory() as taken:
        start = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - start
    return seconds, (taken.most or 0) / 1e6, found


def ceiling(lasts: float = 2.0) -> float:
    """Floating-point operations per second of float32 matrix products, over so many seconds.

    Not the best of a few: a stage takes seconds too, and a core's first burst does not last.
    """
    size, count = 3072, 0
    one, other, out = (torch.randn(size, size) for _ in range(3))
    start = time.perf_counter()
    while time.perf_counter() - start < lasts:
        torch.mm(one, other, out=out)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def rated(run: Callable[[], Any]) -> tuple[float, float, float]:
    """Seconds, megabytes, and the share of the ceiling that is measured before and after.

    The middle one of three: on a shared machine either may be slowed.
    """
    with FlopCounterMode(display=False) as counted:
        run()
    found, before = [], ceiling()
    for _ in range(3):
        seconds, megabytes, _ = timed(run)
        after = ceiling()
        share = counted.get_total_flops() / seconds / ((before + after) / 2)
        found.append((share, seconds, megabytes))
        before = after
    share, seconds, megabytes = sorted(found)[1]
    return seconds, megabytes, share


class Bench:
    """The model, facts and ceiling that all stages share."""

    def __init__(self, data: Path):
        self.loaded = malmend.load_model("smollm2-135m")
        self.ceiling = ceiling()
        self.facts = facts_of(data)

    def laid_out(self, settings: EditorSettings, keeps: bool = True) -> Workbench:
        """Cut at the sites, with a store of its own, empty."""
        bench = lay_out(self.loaded, settings.sites_in(self.loaded.model), settings.end_of_answer)
        folder = Path(tempfile.mkdtemp(prefix="malmend-speed-"))
        sites = bench.trunk.sites
        kept = TrunkSettings(store_bytes=KEEP if keeps else 0)
        return replace(bench, trunk=Trunk(self.loaded.model, sites, kept, folder))

    def paper(self) -> tuple[Workbench, Editor]:
        """The published editor: rank 1,920, last six second layers; a network that moved."""
        settings = replace(published(), eta=1e-3)
        bench = self.laid_out(settings)
        few = CalibrationSettings(moment_facts=64, search_facts=8, prior_facts=16, text_tokens=400)
        found = calibrated(bench, settings, self.facts[:64], None, few)
        editor = found.editor(settings, bench.trunk, 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in editor.networks.named_parameters():
                if "up_FR" in name:
                    parameter.normal_(std=1e-4, generator=generator)
        return bench, editor


def facts_of(data: Path) -> list[Fact]:
    """Facts in zsRE layout where they are there, else the project's own; each beside another."""
    path = data / "qa" / "train.json"
    facts = list(malmend.read_facts(path if path.is_file() else shipped("facts.jsonl")))
    random.Random(0).shuffle(facts)
    held = [fact for fact in facts if fact.unrelated or fact.neighbours]
    return [replace(f, paraphrases=f.paraphrases[:1]) for f in held]


def step(bench: Bench) -> list[Row]:
    """A training step of 256 facts: published, ours in the first epoch, ours later."""
    laid, editor = bench.paper()
    facts = bench.facts[:FACTS]
    settings = replace(published_training(), facts_per_step=FACTS, clip=1e12)
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(Path(folder) / "pairs", 1, laid.trunk.wide, KEEP)
        trainer = Trainer(editor, laid.trunk, laid.encoder, facts, (), settings, store)
        chosen, asked = trainer.draw(0)
        plain = Straightforward(editor, bench.loaded, laid.trunk.sites, laid.encoder, Path(folder))
        before = {name: p.detach().clone() for name, p in editor.named_parameters()}

        def reset() -> dict[str, torch.Tensor]:
            """The gradients of a step that was taken; the editor is then as before."""
            grads = {n: p.grad.clone() for n, p in editor.named_parameters() if p.grad is not None}
            editor.load_state_dict({**editor.state_dict(), **before})
            trainer.step = 0
            return grads

        def theirs() -> None:
            trainer.optimiser.zero_grad()
            plain.step(chosen, asked)
            torch.nn.utils.clip_grad_norm_(editor.parameters(), settings.clip)
            trainer.optimiser.step()

        for parameter in editor.parameters():  # Adam's moments are of the training, not of a step
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimiser.step()
        reset()
        trainer.optimiser.zero_grad()
        theirs_s, theirs_mb, _ = timed(theirs)
        wanted = reset()
        trainer.optimiser.zero_grad()
        first_s, first_mb, _ = timed(trainer.take_step)
        found = reset()
        trainer.optimiser.zero_grad()
        later_s, later_mb, _ = timed(trainer.take_step)
        again = reset()
        trainer.optimiser.zero_grad()
        with FlopCounterMode(display=False) as counted:
            theirs()
        twice = reset()
        share = counted.get_total_flops() / theirs_s / ceiling()
    (whole, worst), (own, _) = _apart(found, wanted), _apart(twice, wanted)
    apart = (
        f"gradient {whole:.1e}, worst parameter {worst:.1e}; the published from itself {own:.1e}"
    )
    assert all(torch.isfinite(grad).all() for grad in again.values())
    name = "published step"
    return [
        Row(f"{name}, {FACTS} facts", theirs_s, theirs_mb, share=share),
        Row("first epoch", first_s, first_mb, name, theirs_s / first_s, said=apart),
        Row(
            "later epochs",
            later_s,
            later_mb,
            name,
            theirs_s / later_s,
            said=f"memory {later_mb / theirs_mb:.2f} of it",
        ),
    ]


def _apart(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """How far two gradients are apart, relative: over all parameters, and of the worst one."""
    judged = [name for name in wanted if "log_eta" in name or "networks" in name]
    far = {name: (found[name] - wanted[name]).norm().item() for name in judged}
    long = {name: wanted[name].norm().clamp(min=1e-30).item() for name in judged}
    whole = math.hypot(*far.values()) / math.hypot(*long.values())
    return whole, max(far[name] / long[name] for name in judged)


def head(bench: Bench) -> list[Row]:
    """Forward and backward of the head: the meta-loss of edited facts, as in a later epoch."""
    laid, editor = bench.paper()
    store = ActivationStore(None, 1, laid.trunk.wide, 0)
    settings = TrainSettings(facts_per_step=FACTS)
    trainer = Trainer(editor, laid.trunk, laid.encoder, bench.facts[:FACTS], (), settings, store)
    _, asked = trainer.draw(0)
    judged = trainer.judged(asked)
    meta_loss(laid.trunk, judged)  # fills the store
    seconds, megabytes, share = rated(lambda: meta_loss(laid.trunk, judged))
    return [Row("head, forward and backward", seconds, megabytes, share=share)]


def capturing(bench: Bench) -> list[Row]:
    """Keys and value gradients of 256 facts, plain and descended."""
    rows = []
    for name, settings in (("plain", published()), ("descended", EditorSettings())):
        laid = bench.laid_out(settings)
        questions = laid.encoder.encode_all(fact.question for fact in bench.facts[:FACTS])

        def run(laid: Any = laid, questions: Any = questions, settings: Any = settings) -> None:
            capture(laid.trunk, questions, settings.tokens, settings.descent)

        first, _, _ = timed(run)
        seconds, megabytes, share = rated(run)
        rows.append(
            Row(f"capture, {name}", seconds, megabytes, "first time", first / seconds, share)
        )
    return rows


def network(bench: Bench) -> list[Row]:
    """The published network over 256 facts' answer tokens: once as it edits, once as it learns."""
    laid, editor = bench.paper()
    questions = laid.encoder.encode_all(fact.question for fact in bench.facts[:FACTS])
    captured = capture(laid.trunk, questions, editor.settings.tokens)
    chunk = published_training().chunk

    def run() -> None:
        editor.zero_grad(set_to_none=True)
        for site, pair in enumerate(captured):
            for rows in chunks(len(pair.keys_NK), chunk):
                with torch.no_grad():
                    editor.pseudo(site, pair.rows(rows))
                pseudo = editor.pseudo(site, pair.rows(rows))
                (pseudo.keys_NK.sum() + pseudo.grads_NV.sum()).backward()

    seconds, megabytes, share = rated(run)
    said = f"{len(captured[0].keys_NK)} tokens at {len(captured)} sites"
    return [Row("network, twice forward, once back", seconds, megabytes, share=share, said=said)]


def evaluation(bench: Bench) -> list[Row]:
    """Every question about 256 facts, teacher forced, beside the whole model on padded batches.

    An evaluation of a patch asks twice: what is read the first time is kept for the second.  The
    other makes logits at every position, as published code does.
    """
    laid = bench.laid_out(published())
    facts, asker = bench.facts[:FACTS], bench.loaded.model
    examiner = Examiner(bench.loaded, laid.trunk, laid.encoder)
    questions = list(dict.fromkeys(question for _, _, question in questions_of(facts)))

    @torch.no_grad()
    def whole() -> None:
        encoded = laid.encoder.encode_all(questions)
        for rows in chunks(len(encoded), 32):
            answered(asker, collate(encoded[rows])).argmax(-1)

    whole()
    theirs, theirs_mb, _ = timed(whole)
    first, first_mb, _ = timed(lambda: examiner.examine(facts, 0))
    again, again_mb, share = rated(lambda: examiner.examine(facts, 0))
    name, said = "whole model, padded", f"{len(questions)} questions"
    return [
        Row(name, theirs, theirs_mb, said=said),
        Row("evaluation, first time", first, first_mb, name, theirs / first),
        Row("evaluation, again", again, again_mb, name, theirs / again, share),
    ]


def solve(bench: Bench) -> list[Row]:
    """One factor and its two uses, beside a general LU of the K x K matrix solved twice."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for width, count in ((1536, 154), (1536, 1536), (1536, 6144), (4096, 410), (4096, 8192)):
        keys_NK = torch.randn(count, width, generator=generator)
        diffs_NV = torch.randn(count, 576, generator=generator)
        grad_VK = torch.randn(576, width, generator=generator)

        def ours(keys_NK: Any = keys_NK, diffs: Any = diffs_NV, grad: Any = grad_VK) -> Any:
            factor = RidgeFactor(keys_NK, Prior(ridge=1.0))
            shift = factor.shift(diffs)
            return shift, factor.backward(grad, diffs, shift).diffs_NV

        def general(keys_NK: Any = keys_NK, diffs: Any = diffs_NV, grad: Any = grad_VK) -> Any:
            wide_NK = keys_NK.double()
            normal_KK = wide_NK.T @ wide_NK + torch.eye(wide_NK.shape[1], dtype=torch.float64)
            shift = torch.linalg.solve(normal_KK, wide_NK.T @ diffs.double()).T
            return shift, wide_NK @ torch.linalg.solve(normal_KK, grad.double().T)

        ours()
        mine, megabytes, (shift, _) = timed(ours)
        theirs, _, (wanted, _) = timed(general)
        far = ((shift - wanted).norm() / wanted.norm()).item()
        form = "dual" if count < width else "primal"
        said = f"shift {far:.0e}"
        rows.append(
            Row(
                f"solve and back, N {count:,}, K {width:,} ({form})",
                mine,
                megabytes,
                "LU, twice",
                theirs / mine,
                said=said,
            )
        )
    return rows


def growth(bench: Bench) -> list[Row]:
    """Editing m facts without a network, one solve: time and memory as m grows.

    Captured tensors may take half a gigabyte of memory, and stand in files beyond it.
    """
    rows, spill = [], Path(tempfile.mkdtemp(prefix="malmend-speed-"))
    encoder = encoder_for(bench.loaded)
    usable = [f for f in bench.facts if not encoder.faults(FactSet("", (f,)))]
    for size in (16, 64, 256, 1024, 4096, 16384):
        chosen = [
            replace(usable[i % len(usable)], id=str(i), line=i, unrelated=(), neighbours=())
            for i in range(size)
        ]
        settings = replace(EditorSettings(), descent=None)
        laid = bench.laid_out(settings, keeps=False)
        trunk = laid.trunk.again(laid.trunk.settings, Room(ROOM, spill))
        laid = replace(laid, trunk=trunk)
        questions = laid.encoder.encode_all(fact.question for fact in chosen)

        def run(laid: Any = laid, questions: Any = questions) -> None:
            for pair in capture(laid.trunk, questions):
                RidgeFactor(pair.keys_NK, Prior(ridge=1.0)).shift(pair.value_grads_NV)

        seconds, megabytes, _ = timed(run)
        said = f"{1000 * seconds / size:.1f} ms a fact"
        rows.append(Row(f"capture and solve, {size:,} facts", seconds, megabytes, said=said))
    return rows


def editing(bench: Bench) -> list[Row]:
    """`malmend edit` of 1,024 facts by the shipped editor, one solve and as it is."""
    rows = []
    for name, passes in (("one solve", 1), ("by default", None)):
        refine = RefineSettings(passes=passes)
        facts = bench.facts[:1024]
        seconds, megabytes, _ = timed(
            lambda refine=refine, facts=facts: malmend.edit(bench.loaded, facts, refine=refine)
        )
        rows.append(Row(f"edit, {len(facts):,} facts, {name}", seconds, megabytes))
    return rows


STAGES: dict[str, Callable[[Bench], list[Row]]] = {
    "step": step,
    "head": head,
    "capture": capturing,
    "network": network,
    "solve": solve,
    "evaluation": evaluation,
    "growth": growth,
    "edit": editing,
}


def shown(rows: Sequence[Row], bench: Bench) -> Table:
    """As a table for a person."""
    said = f"{bench.ceiling / 1e9:.0f} GFLOP/s float32 matrix product, {torch.get_num_threads()}"
    table = Table(title=f"{said} threads, load {os.getloadavg()[0]:.1f}")
    for heading in ("stage", "s", "MB", "times faster", "than", "of the ceiling", ""):
        table.add_column(heading, justify="left" if heading in ("stage", "than", "") else "right")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.seconds:.2f}",
            "" if row.megabytes is None else f"{row.megabytes:,.0f}",
            "" if row.times is None else f"{row.times:.1f}",
            row.beside,
            "" if row.share is None else f"{row.share:.0%}",
            row.said,
        )
    return table


def main() -> None:
    """Measures the stages that were named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], default=[])
    parser.add_argument("--data", type=Path, default=BESIDE)
    given = parser.parse_args()
    bench, rows = Bench(given.data), []
    for name in given.stages or STAGES:
        rows += STAGES[name](bench)
        Console(width=130).print(shown(rows, bench))
    OUT.mkdir(parents=True, exist_ok=True)
    kept = {"ceiling": bench.ceiling, "rows": [asdict(row) for row in rows]}
    path = OUT / f"{'-'.join(given.stages) or 'rows'}.json"  # a part does not replace the whole
    with written_beside(path) as beside:
        beside.write_text(json.dumps(kept, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
