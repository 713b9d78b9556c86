"""One training step: Algorithm 2, and the editor in the model's graph (MALMEN, Figure 9).

    python benchmarks/concatenated.py                  # m = 16 to 256, on the project's own facts
    python benchmarks/concatenated.py --sizes 32 64

MEND trains with its network concatenated to the language model: one graph reaches from the loss of
all facts through the edited weights into the network.  Both forms here start from the same captured
pairs of the shipped editor and the same questions, each in a process of its own.  Printed are the
memory and the time of the step beyond what was loaded, and how far the two gradients of the network
lie apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import malmend
from malmend.editors.checkpoint import load_editor
from malmend.editors.editor import Editor, log_size
from malmend.editors.metaloss import Judged, meta_loss
from malmend.editors.pseudo import value_diffs
from malmend.facts.fact import Question
from malmend.files import written_beside
from malmend.memory import peak_memory
from malmend.models.capture import Captured, capture
from malmend.models.sites import Site
from malmend.models.trunk import Trunk
from malmend.numerics.losses import answer_nll, kl_per_token
from malmend.patch import shifted
from malmend.workbench import lay_out, shipped, shipped_editor

OUT = Path(__file__).resolve().parent / "out" / "concatenated"
SIZES = (16, 32, 64, 128, 256)
FORMS = ("decoupled", "concatenated")


def decoupled(
    editor: Editor, trunk: Trunk, captured: Sequence[Captured], judged: Sequence[Judged]
) -> None:
    """As malmend trains: no graph holds network and model together."""
    aggregations = editor.aggregate(captured)
    shifts = {name: one.shift() for name, one in zip(editor.names, aggregations, strict=True)}
    with shifted(list(trunk.sites), shifts):
        loss = meta_loss(trunk, judged)
    editor.backward(captured, aggregations, loss.shift_grads)


def concatenated(
    editor: Editor, trunk: Trunk, captured: Sequence[Captured], judged: Sequence[Judged]
) -> None:
    """As MEND trains: one graph, one backward pass."""
    shifts = [in_graph(editor, site, pair) for site, pair in enumerate(captured)]
    with grafted(trunk.sites, shifts):
        wordings = trunk.batch([one.equivalent for one in judged])
        loss = answer_nll(trunk.logits(wordings), wordings.tokens.labels_A).sum()
        others = trunk.batch([one.unrelated for one in judged if one.unrelated])
        known = [one.unedited_AH for one in judged if one.unedited_AH is not None]
        with torch.no_grad():
            before_AW = trunk.logits_of(torch.cat(known))
        loss = loss + kl_per_token(before_AW, trunk.logits(others)).sum()
        (loss / len(judged)).backward()


def in_graph(editor: Editor, site: int, pair: Captured) -> Tensor:
    """Equations (14) and (15) of one site with everything learned in the graph, by LU."""
    keys_NK = pair.keys_NK.double()
    diffs_NV = value_diffs(pair.keys_NK, editor.pseudo(site, pair)).double()
    weights = editor.log_weights_SP[site] + editor.powers_SP[site] * log_size(len(keys_NK))
    gram_KK = editor.log_ridge_S[site].exp() * torch.eye(keys_NK.shape[1], dtype=torch.float64)
    for term, weight in zip(editor.terms, weights.exp(), strict=True):
        times = len(keys_NK) if term == "wording" else 1
        gram_KK = gram_KK + times * weight * getattr(editor, f"prior_{term}_{site}").double()
    weights_N = editor.row_weights(site, pair)
    assert weights_N is not None, "the shipped editor trains an end of answer"
    weighted_NK = keys_NK * weights_N.unsqueeze(1)
    return torch.linalg.solve(gram_KK + keys_NK.T @ weighted_NK, weighted_NK.T @ diffs_NV).T


@contextmanager
def grafted(sites: Sequence[Site], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Weights that are tensors of the graph, in place of parameters."""
    plain = [site.module._parameters.pop("weight") for site in sites]
    try:
        for site, weight, shift_VK in zip(sites, plain, shifts, strict=True):
            site.module.weight = weight + site.oriented(shift_VK).to(weight)
        yield
    finally:
        for site, weight in zip(sites, plain, strict=True):
            del site.module.weight
            site.module._parameters["weight"] = weight


def one_step(form: str, size: int, grads: Path) -> dict[str, float]:
    """One step's cost; the network's gradient is left in a file."""
    loaded = malmend.load_model("smollm2-135m")
    folder = shipped_editor(loaded.fingerprint)
    assert folder is not None, "the package ships an editor for this model"
    editor = load_editor(folder).editor
    bench = lay_out(loaded, editor.settings.sites_in(loaded.model))
    encoder = bench.encoder
    facts = list(malmend.read_facts(shipped("facts.jsonl"), size))
    edits = encoder.encode_all(fact.question for fact in facts)
    captured = capture(bench.trunk, edits, editor.settings.tokens, editor.settings.descent)
    unrelated = encoder.encode_all(Question(f.neighbours[0].prompt, f.answer) for f in facts)
    states = bench.trunk.unedited_states(unrelated)
    wordings = encoder.encode_all(fact.equivalents[0] for fact in facts)
    judged = [Judged(*known) for known in zip(wordings, unrelated, states, strict=True)]
    for one in (*wordings, *unrelated):  # what lies below the cut is read once, and kept
        bench.trunk.batch([one])
    start = time.perf_counter()
    with peak_memory() as taken:
        (decoupled if form == "decoupled" else concatenated)(editor, bench.trunk, captured, judged)
    seconds = time.perf_counter() - start
    found = {n: p.grad for n, p in editor.named_parameters() if p.grad is not None}
    save_file({name: grad.contiguous() for name, grad in found.items()}, grads)
    return {"m": size, "megabytes": (taken.most or 0) / 1e6, "seconds": seconds}


def apart(one: Path, other: Path) -> float:
    """The largest distance of two gradients of a tensor, beside the gradient's length."""
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    return max(
        ((mine[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30)).item()
        for name in mine
    )


def measured(size: int, folder: Path) -> dict[str, dict[str, float]]:
    """Both forms of one step, each in a process of its own."""
    rows = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--form", form, "--sizes", str(size)]
        done = subprocess.run(
            [*command, "--grads", str(folder / form)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            rows[form] = {"m": size, "failed": done.returncode}
            print(done.stderr[-400:], file=sys.stderr)
        else:
            rows[form] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> None:
    """Measures every size and prints a table; with --form one step of one size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--grads", type=Path)
    given = parser.parse_args()
    if given.form:
        print(json.dumps(one_step(given.form, given.sizes[0], given.grads)))
        return
    table = Table("m", "decoupled MB", "s", "concatenated MB", "s", "gradients apart")
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            both = measured(size, Path(folder))
            whole = all("seconds" in row for row in both.values())
            far = apart(*(Path(folder) / form for form in FORMS)) if whole else None
        rows.append({**both, "apart": far})
        cells = [
            f"{both[form][key]:,.0f}" if key in both[form] else "failed"
            for form in FORMS
            for key in ("megabytes", "seconds")
        ]
        table.add_row(str(size), *cells, "" if far is None else f"{far:.1e}")
    Console().print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    with written_beside(OUT / "rows.json") as beside:
        beside.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
