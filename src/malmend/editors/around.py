"""The prior of layers that settle beside an editor's own, of which no editor knows (equation 30).

It has the terms of the editor's (equation 1), at the first weights that a calibration tries.

Shape letters: K key width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malmend.editors.calibration import CalibrationSettings
from malmend.editors.editor import by_tokens
from malmend.files import written_beside
from malmend.numerics.prior import Prior


@dataclass(frozen=True, eq=False)
class Around:
    """What the prior of these layers is made of: by site, C_t (K x K, float64) of each term.

    ``settings`` has the weights.
    """

    moments: Mapping[str, Mapping[str, Tensor]]
    settings: CalibrationSettings = CalibrationSettings()

    def prior(self, name: str, tokens: int, device: torch.device) -> Prior:
        """P of one site, for an edit of so many tokens (N of equation 13)."""
        known, settings = self.moments[name], self.settings
        weights = settings.weights(list(known), settings.alphas[0])
        text_KK = known.get("text")
        ridge = 1.0 if text_KK is None else weights[0] * text_KK.diagonal().mean().item()
        return Prior(
            ridge=settings.ridge * ridge,
            weights=by_tokens(weights, list(known), tokens),
            matrices_KK=tuple(known.values()),
            device=device,
        )


def save_around(around: Around, path: Path) -> None:
    """Writes the moments to one safetensors file."""
    tensors = {
        f"{term} {name}": moment_KK.contiguous()
        for name, known in around.moments.items()
        for term, moment_KK in known.items()
    }
    with written_beside(path) as beside:
        save_file(tensors, beside)


def load_around(
    path: Path, names: list[str], terms: tuple[str, ...], settings: CalibrationSettings
) -> Around:
    """What :func:`save_around` wrote, of these sites and terms."""
    tensors = load_file(path)
    rows = {name: {term: tensors[f"{term} {name}"] for term in terms} for name in names}
    return Around(rows, settings)
