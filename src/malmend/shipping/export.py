"""Writes an adapter or a merged model, reads it back, and says what it lost on the way.

Shape letters: V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from malmend.facts.fact import Fact
from malmend.models.load import LoadedModel, save_model
from malmend.numerics.truncation import relative_error, spectrum
from malmend.patch import Patch
from malmend.progress import Progress, silent
from malmend.shipping.adapter import read_adapter, write_adapter
from malmend.shipping.merged import merged, read_back, rounding
from malmend.shipping.truncate import cut, key_metric
from malmend.workbench import Workbench


@dataclass(frozen=True)
class Cutting:
    """What shifts of too large a rank are cut to, and what the cut spares.

    Attributes:
        rank: None cuts nothing.
        text: general text, a passage per line.
        facts: whose edit prompts count too.
        keys: what text and facts are called.
    """

    rank: int | None
    text: str
    facts: Sequence[Fact] = ()
    keys: str = "general text"


def export_adapter(
    bench: Workbench, patch: Patch, folder: Path, cutting: Cutting, progress: Progress = silent
) -> tuple[dict[str, Any], Patch]:
    """Writes a LoRA adapter; returns what it says of itself, and itself as read back.

    Per site the rank of the shift and two relative errors of what was read back: plain
    (Frobenius), and on the keys of :func:`key_metric`, which is None where nothing was cut.

    Args:
        bench: the base, cut at the patch's sites.
        patch: checked by :func:`malmend.shipping.layers.check_exportable`.
        folder: to write into.
        cutting: to which rank.
        progress: called with stage and share done.
    """
    spectra = {name: spectrum(factors) for name, factors in patch.factors.items()}
    ranks = {name: one.rank for name, one in spectra.items()}
    metric = {}
    if cutting.rank is not None and max(ranks.values()) > cutting.rank:
        metric = key_metric(bench, cutting.text, cutting.facts, progress)
        spectra = cut(spectra, metric, cutting.rank)
    kept = write_adapter(bench.loaded, bench.trunk.sites, spectra, folder)
    back = read_adapter(folder)
    about = {}
    for name, rank in ranks.items():
        shift_VK, kept_VK = patch.shift(name), back.shift(name)
        seen = relative_error(shift_VK, kept_VK, metric[name]) if metric else None
        plain = relative_error(shift_VK, kept_VK)
        about[name] = {"rank": rank, "error": plain, "error_on_keys": seen}
    keys = cutting.keys if metric else None
    return {"exact": not metric, "rank": kept, "keys": keys, "sites": about}, back


def export_merged(
    bench: Workbench, patch: Patch, folder: Path, dtype: str, progress: Progress = silent
) -> tuple[dict[str, Any], LoadedModel]:
    """Writes a whole model; returns what it says of itself, and itself as read back.

    Args:
        bench: the base, cut at the patch's sites.
        patch: checked by :func:`malmend.shipping.layers.check_exportable`.
        folder: to write into.
        dtype: of the weights in it.
        progress: called with stage and share done.

    Raises:
        ModelError: what was read back is not what was written.
    """
    progress("writing the model", 0.0)
    meant = merged(bench.loaded, patch, dtype)
    save_model(meant, folder)
    back = read_back(folder, meant, dtype)
    progress("writing the model", 1.0)
    sites = bench.trunk.sites
    return {
        "sites": {one.name: asdict(rounding(bench.loaded, back, patch, one)) for one in sites}
    }, back
