"""Draws the loss curve of a trained editor: python scripts/plot_training.py EDITOR OUT.png"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(editor: str, out: str) -> None:
    about = json.loads((Path(editor) / "editor.json").read_text())
    curve = about["curve"]
    steps = [row["step"] for row in curve]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, label in (
        ("gen", "generality: -log p(answer | paraphrase)"),
        ("loc", "locality: KL"),
    ):
        values = [row[name] for row in curve]
        (line,) = axes.plot(steps, values, alpha=0.35, linewidth=1)
        smooth = [
            sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1])
            for i in range(len(values))
        ]
        axes.plot(steps, smooth, color=line.get_color(), label=f"{label} (mean of 5 steps)")
    facts = about["training"]["facts_per_step"]
    axes.set(xlabel=f"step ({facts} facts each)", ylabel="nats per fact", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
