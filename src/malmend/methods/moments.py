"""Second moments of keys over the project's own text, which MEMIT asks not to move."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from malmend.editors.keymoments import text_moment
from malmend.files import written_beside
from malmend.kept import kept
from malmend.material import MOST_KEPT, general_text
from malmend.models.source import cached
from malmend.progress import Progress, silent
from malmend.workbench import Workbench

MOMENTS = 1  # of how they are taken; a change makes those that are kept anew


def general_moments(bench: Workbench, tokens: int, progress: Progress = silent) -> list[Tensor]:
    """C_text of every site over the project's own text, from the cache folder or made now.

    Args:
        bench: the model, unedited.
        tokens: of the text.
        progress: called with stage and share done.

    Returns:
        K x K in float64 for each site (:func:`malmend.editors.keymoments.text_moment`).
    """
    lines = general_text(bench.encoder, tokens)
    names = [site.name for site in bench.trunk.sites]
    said = [MOMENTS, bench.loaded.digest, str(bench.trunk.model.dtype), names]
    key = hashlib.sha256(repr([*said, [line.ids for line in lines]]).encode()).hexdigest()

    def save(moments: list[Tensor], path: Path) -> None:
        with written_beside(path) as beside:
            save_file(dict(zip(names, moments, strict=True)), beside)

    return kept(
        cached("calibrations") / f"moments-{key[:24]}.safetensors",
        lambda path: [load_file(path)[name] for name in names],
        lambda: text_moment(bench.trunk, lines, tokens, progress),
        save,
        MOST_KEPT,
    )
