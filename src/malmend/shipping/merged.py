"""A base with a patch in its weights, as a whole model of its own; what rounding took of the shift.

Shape letters: V value width, K key width.

    stored = round(W_0 + S),    lost = |(stored - round(W_0)) - S| / |S|                       (S5)

round is the cast to the dtype that is written; W_0 + S is taken in the wider one that is loaded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.errors import ModelError
from malmend.models.load import DTYPES, LoadedModel, load_config, load_model, name_of, prepared
from malmend.models.sites import Site
from malmend.patch import Patch, edited, sites_of


@dataclass(frozen=True)
class Rounding:
    """What a dtype took of one site's shift.

    Attributes:
        lost: (S5), relative; 0 is nothing.
        unmoved: share of the weights that the shift should move and that stayed as they were.
    """

    lost: float
    unmoved: float


def base_dtype(model: str | LoadedModel) -> str:
    """The name of the dtype that a base is kept in; float32 where it does not say."""
    if isinstance(model, LoadedModel):
        named = model.dtype
    else:
        named = name_of(getattr(load_config(model), "dtype", None))
    return named if named in DTYPES else "float32"


def merged(loaded: LoadedModel, patch: Patch, dtype: str) -> LoadedModel:
    """A copy of the model with the patch in its weights, each rounded once; the model stays.

    Raises:
        ModelError: a weight that is too large for the dtype.
    """
    whole = _copied(loaded.model, DTYPES[dtype])
    for site in sites_of(loaded.model, patch):
        shift_VK = patch.shift(site.name)
        if shift_VK.any():
            weight = whole.get_submodule(site.name).weight
            weight.data = _cast(f"{site.name}.weight", edited(site, shift_VK), weight.dtype)
    return prepared(whole, loaded.tokenizer, loaded.name)


def cast_copy(loaded: LoadedModel, dtype: str) -> LoadedModel:
    """A copy of the model itself as it is when loaded in a dtype."""
    return prepared(_copied(loaded.model, DTYPES[dtype]), loaded.tokenizer, loaded.name)


def _copied(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy whose weights, and what is saved with them, are of a dtype.

    Each is cast as it is copied, so that no second model in the wider dtype is held.  Not by
    ``model.to``, which would round what a load computes anew (the angles of rotary positions).
    """
    saved = model.state_dict()
    instead: dict[int, torch.Tensor] = {
        id(one): nn.Parameter(_cast(name, one.detach(), dtype), requires_grad=False)
        for name, one in model.named_parameters()
        if one.is_floating_point()
    }
    instead |= {
        id(one): one.detach().to(dtype, copy=True)
        for name, one in model.named_buffers()
        if name in saved and one.is_floating_point()
    }
    whole = copy.deepcopy(model, instead)
    whole.config.dtype = dtype
    return whole


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight in a dtype.

    Raises:
        ModelError: it holds numbers that the dtype has not, which would be infinite.
    """
    found = weight.to(dtype, copy=True)
    over = found.isinf()
    if weight[over].isfinite().any():
        raise ModelError(
            f"{name} holds numbers that {name_of(dtype)} has not, so nothing was exported; give "
            "--dtype bfloat16 or float32."
        )
    return found


def read_back(folder: Path, meant: LoadedModel, dtype: str) -> LoadedModel:
    """The model as any reader of the folder gets it.

    Raises:
        ModelError: it is not what was meant to be written.
    """
    found = load_model(str(folder), dtype)
    written = dict(found.model.named_parameters())
    for name, weight in meant.model.named_parameters():
        # A few layers of a few models are loaded wider than they are kept.
        if name not in written or not torch.equal(written[name].to(weight), weight):
            raise ModelError(
                f"{name} was read back from {folder} as other numbers than were written; the disk "
                "or the model's own saving is at fault, and nothing was exported."
            )
    return found


def rounding(loaded: LoadedModel, whole: LoadedModel, patch: Patch, site: Site) -> Rounding:
    """Equation (S5) of one site.

    Args:
        loaded: the base.
        whole: the merged model.
        patch: what was merged.
        site: of the base.
    """
    kept = whole.model.get_submodule(site.name).weight
    base = site.weight.detach().to(kept).double()
    moved_VK = site.oriented(kept.detach().double() - base)
    shift_VK = patch.shift(site.name).double()
    asked = shift_VK != 0
    size, wanted = shift_VK.norm().item(), int(asked.sum())
    return Rounding(
        lost=(moved_VK - shift_VK).norm().item() / size if size else 0.0,
        unmoved=int((asked & (moved_VK == 0)).sum()) / wanted if wanted else 0.0,
    )
