"""Free text (MEND's generation setting): ten tokens after a passage are edited in.

    python benchmarks/free_text.py              # SmolLM2-135M, 16, 64 and 256 passages

Passages and their continuations are of the first half of ``--data``'s ``wikitext/valid.txt``;
locality is perplexity on its second half, which no edit has seen: edited over unedited, less one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import malmend
from malmend.commands.continuations import continuations
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import training_free
from malmend.facts.readers import read_text
from malmend.files import written_beside

OUT = Path(__file__).resolve().parent / "out" / "free-text"
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES, CHARACTERS = (16, 64, 256), 80_000
REFINE = RefineSettings(frames=())  # a passage is no question that could be framed


def main() -> None:
    """One row per size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=BESIDE)
    parser.add_argument("--model", default="smollm2-135m")
    given = parser.parse_args()
    source = given.data / "wikitext" / "valid.txt"
    if not source.is_file():
        print(f"There is no text in {given.data}; name its folder with --data.")
        return
    OUT.mkdir(parents=True, exist_ok=True)
    words = read_text(source)
    first, held = OUT / "first.txt", OUT / "held.txt"
    first.write_text(words[: len(words) // 2], encoding="utf-8")
    held.write_text(words[len(words) // 2 :][:CHARACTERS], encoding="utf-8")
    loaded = malmend.load_model(given.model)
    facts = continuations(loaded, first, OUT / "facts.jsonl", limit=4 * max(SIZES)).facts
    settings = replace(training_free(), end_of_answer="none")
    rows = []
    for size in SIZES:
        chosen = list(facts[:: len(facts) // size][:size])
        patch = malmend.edit(loaded, chosen, settings=settings, refine=REFINE).patch
        report = malmend.eval(loaded, chosen, patch, decode_facts=0, text=held)
        before, after = report.unedited["ES"], report.edited["ES"]
        surprise = report.perplexity
        rows.append(
            {
                "passages": size,
                "tokens right": [before.token_ratio, after.token_ratio],
                "all ten right": [before.exact, after.exact],
                "perplexity": [surprise["unedited"], surprise["edited"]],
                "drawdown": surprise["edited"] / surprise["unedited"] - 1,
            }
        )
        print(rows[-1], flush=True)
    with written_beside(OUT / "rows.json") as beside:
        beside.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
