"""The file that a calibration is kept in, and the name that its inputs give it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from malmend.editors.calibration import Calibration, CalibrationSettings
from malmend.editors.editor import SiteStatistics
from malmend.editors.settings import EditorSettings
from malmend.facts.fact import Fact, Question
from malmend.files import written_beside
from malmend.models.trunk import Trunk
from malmend.numerics.moments import RunningMoments

FORMAT = 10


def calibration_key(
    digest: str,
    tokenizer: str,
    trunk: Trunk,
    editor_settings: EditorSettings,
    settings: CalibrationSettings,
    facts: Sequence[Fact],
    text: str,
    general: Sequence[Question] = (),
) -> str:
    """A name for the calibration that these inputs give.

    The first two are digests of the model and of what cuts its texts into tokens.
    """
    what = {
        "format": FORMAT,
        "model": [digest, tokenizer, str(trunk.model.dtype)],
        "sites": [site.name for site in trunk.sites],
        # Of the network what the statistics are read by, not its size.
        "editor": {**asdict(editor_settings), "network": editor_settings.network.normalise},
        **inputs_of(settings, facts, text, general),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def inputs_of(
    settings: CalibrationSettings, facts: Sequence[Fact], text: str, general: Sequence[Question]
) -> dict[str, Any]:
    """What a calibration reads, whatever its model and editor, as plain values."""

    def rows(questions: Sequence[Question]) -> list[tuple[str, str | None]]:
        return [(question.prompt, question.answer) for question in questions]

    used = [
        (f.prompt, f.answer, f.paraphrases, rows(f.neighbours), rows(f.unrelated)) for f in facts
    ]
    return {
        "settings": asdict(settings),
        "facts": used,
        "general": rows(general),
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a calibration to one safetensors file."""
    tensors = {}
    for name, known in calibration.statistics.items():
        for part, moments in (("key", known.keys), ("grad", known.value_grads)):
            tensors[f"{name}.{part}_mean"] = moments.mean_F
            tensors[f"{name}.{part}_m2"] = moments.m2_F
        for term, moment_KK in known.priors_KK.items():
            tensors[f"{name}.prior_{term}"] = moment_KK.contiguous()
    counts = {name: known.keys.count for name, known in calibration.statistics.items()}
    header = {
        "eta": calibration.eta,
        "weights": calibration.weights,
        "terms": list(next(iter(calibration.statistics.values())).priors_KK),
        "ridge": calibration.ridge,
        "tried": list(calibration.tried),
        "counts": counts,
    }
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata={"calibration": json.dumps(header)})


def load_calibration(path: Path) -> Calibration:
    """Reads what :func:`save_calibration` wrote."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["calibration"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    statistics = {}
    for name, count in header["counts"].items():
        moments = []
        for part in ("key", "grad"):
            one = RunningMoments(len(tensors[f"{name}.{part}_mean"]))
            one.count = count
            one.mean_F, one.m2_F = tensors[f"{name}.{part}_mean"], tensors[f"{name}.{part}_m2"]
            moments.append(one)
        priors_KK = {term: tensors[f"{name}.prior_{term}"] for term in header["terms"]}
        statistics[name] = SiteStatistics(moments[0], moments[1], priors_KK)
    return Calibration(
        statistics,
        header["eta"],
        tuple(header["weights"]),
        header["ridge"],
        tuple(header["tried"]),
    )
