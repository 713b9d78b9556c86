"""A patch: one shift per site with its provenance, put on a model and taken off bit for bit.

Shape letters: V value width, K key width, R rank.

A shift is kept whole (V x K) or, where that is smaller, as left (V x R) and right (R x K) with
S = left @ right.  R is then its own rank bound min(tokens, K, V), so nothing is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import version
from threading import Lock, get_ident
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.errors import PatchError, nearest
from malmend.facts.entry import short
from malmend.facts.tokens import EndOfAnswer
from malmend.given import checked
from malmend.models.identity import configuration_of, unlike
from malmend.models.load import LoadedModel
from malmend.models.sites import Site, put_back, shared_with
from malmend.numerics.truncation import within_rank


@dataclass(eq=False)
class _On:
    """A patch on a model: what takes it off, and whether its block has ended."""

    off: ExitStack
    ended: bool = False


Given = ParamSpec("Given")
Result = TypeVar("Result")

# The patches on a model now, in the order in which they came, and the threads that use it.
_ON: WeakKeyDictionary[PreTrainedModel, list[_On]] = WeakKeyDictionary()
_USERS: WeakKeyDictionary[PreTrainedModel, list[int]] = WeakKeyDictionary()
_ENTERING = Lock()


@dataclass(frozen=True, eq=False)
class Patch:
    """Shifts by site name, float32, each kept as its factors.

    ``factors[name]`` is (S,) or (left, right).  ``provenance`` is what the file's header says:
    base fingerprint, method, settings, counts, metrics, versions.
    """

    factors: Mapping[str, tuple[Tensor, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = {name: self.provenance.get(name) for name in ("method", "facts", "model")}
        about = "".join(f", {name}={short(one)}" for name, one in said.items() if one)
        return f"Patch({len(self.factors)} layers{about}, base={self.base[:12]!r})"

    @property
    def base(self) -> str:
        """Fingerprint of the model that the patch was made for."""
        return str(self.provenance.get("base", ""))

    @property
    def end_of_answer(self) -> EndOfAnswer | None:
        """What an answer ends with, as it was edited in; None where the header does not say."""
        return self.provenance.get("settings", {}).get("end_of_answer")

    @property
    def aims(self) -> dict[str, bool]:
        """``alternative`` and ``away``: what stood for the facts' answers."""
        return {name: bool(self.provenance.get(name)) for name in ("alternative", "away")}

    def shape_VK(self, name: str) -> tuple[int, int]:
        """Of one site's shift."""
        factors = self.factors[name]
        return factors[0].shape[0], factors[-1].shape[1]

    def shift(self, name: str) -> Tensor:
        """S of one site, float32, V x K.  The same number whenever it is asked for."""
        first, *rest = self.factors[name]
        if not rest:
            return first
        # In float64, so that the product is one rounding away from exact in any summation order.
        return (first.double() @ rest[0].double()).float()


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Of what a patch is made with."""
    return {name: version(name) for name in ("malmend", "torch", "transformers")}


def make_patch(shifts: Mapping[str, Tensor], tokens: int, provenance: Mapping[str, Any]) -> Patch:
    """A patch from float64 shifts whose rank is at most ``tokens``; factored where smaller."""
    factors = {name: _factored(shift_VK, tokens) for name, shift_VK in shifts.items()}
    return Patch(factors, dict(provenance))


def _factored(shift_VK: Tensor, tokens: int) -> tuple[Tensor, ...]:
    rows, columns = shift_VK.shape
    rank = min(tokens, rows, columns)
    if rank * (rows + columns) >= rows * columns:
        return (shift_VK.float().contiguous(),)
    left_VR, right_RK = within_rank(shift_VK, rank).halves()
    return left_VR.float().contiguous(), right_RK.float().contiguous()


@contextmanager
def used(model: str | LoadedModel) -> Iterator[None]:
    """A loaded model is this thread's alone inside the block; blocks may be nested.

    An edit, training and an evaluation put shifts and hooks on it, which another thread would take
    for the model's own.  One that is given by name is loaded by the block itself.

    Raises:
        PatchError: another thread uses it.
    """
    if not isinstance(model, LoadedModel):
        yield
        return
    me = get_ident()
    with _ENTERING:
        _check_mine(model)
        users = _USERS.setdefault(model.model, [])
        users.append(me)
    try:
        yield
    finally:
        with _ENTERING:
            users.remove(me)


def by_one_thread(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function, with every loaded model that it is given :func:`used` while it runs."""

    @wraps(function)
    def run(*args: Given.args, **named: Given.kwargs) -> Result:
        with ExitStack() as claims:
            for one in (*args, *named.values()):
                if isinstance(one, LoadedModel):
                    claims.enter_context(used(one))
            return function(*args, **named)

    return run


def _check_mine(loaded: LoadedModel) -> None:
    if any(one != get_ident() for one in _USERS.get(loaded.model, ())):
        raise PatchError(
            f"The model {loaded.name} is used by another thread, in an edit, training or an "
            "evaluation, or with a patch on it; take turns, or load the model once for each thread."
        )


@checked()
@contextmanager
def applied(loaded: LoadedModel, patch: Patch, force: bool = False) -> Iterator[PreTrainedModel]:
    """The model with the patch on it; off again at the end, also after an exception.

    Each edited weight becomes W0 + S, added in float32 and cast to the weight's dtype.  W0 itself
    is set aside untouched and put back, so the weights come back bit for bit.  Blocks may be
    nested; where they overlap otherwise, a patch stays on until those that came after it are off.

    Raises:
        PatchError: the patch was made for another base, or for other layers; or another thread uses
            the model.
        ModelError: the weights are no longer those that were loaded.
    """
    with used(loaded):
        if not _ON.get(loaded.model):
            loaded.check_unchanged()
        check_base(loaded, patch, force)
        sites, on = sites_of(loaded.model, patch), _ON.setdefault(loaded.model, [])
        mine = _On(ExitStack())
        with _ENTERING:
            mine.off.enter_context(shifted(sites, {n: patch.shift(n) for n in patch.factors}))
            on.append(mine)
        try:
            yield loaded.model
        finally:
            mine.ended = True
            with _ENTERING:  # a block may be ended by another thread, as a generator's
                while on and on[-1].ended:
                    try:
                        on[-1].off.close()
                    finally:
                        on.pop()


def check_bare(loaded: LoadedModel) -> None:
    """Raises PatchError while a patch is on the model, or another thread uses it.

    What is found of a model is kept under the digest of it unedited.

    Raises:
        ModelError: its weights are no longer those that were loaded.
    """
    _check_mine(loaded)
    if _ON.get(loaded.model):
        raise PatchError(
            f"The model {loaded.name} cannot be used here while a patch is on it; leave the block "
            "of applied(...) first, or give the patch to eval."
        )
    loaded.check_unchanged()


@contextmanager
def shifted(sites: Sequence[Site], shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """Weights W0 + S at the sites inside the block, W0 itself afterwards."""
    kept = [site.weight.data for site in sites]

    def back() -> None:
        for site, before in zip(sites, kept, strict=True):
            site.weight.data = before

    with put_back(back):
        for site, before in zip(sites, kept, strict=True):
            if shifts[site.name].any():  # -0.0 + 0.0 is 0.0, which is another bit
                site.weight.data = edited(site, shifts[site.name]).to(before.dtype)
        yield


def edited(site: Site, shift_VK: Tensor) -> Tensor:
    """W0 + S as the weight lies, in float32, or in float64 where the weight is."""
    before = site.weight.data
    wide = torch.promote_types(before.dtype, torch.float32)
    return before.to(wide) + site.oriented(shift_VK).to(before.device, wide)


def check_base(loaded: LoadedModel, patch: Patch, force: bool = False) -> None:
    """Raises PatchError unless the patch was made for this model, or ``force`` is given."""
    if not force and (why := misfit(loaded, patch)):
        raise PatchError(f"{why}; use the base the patch names, or --force.")


def misfit(loaded: LoadedModel, patch: Patch) -> str:
    """Why a patch was not made for this model: other weights, or another configuration.

    Empty where it was, and of a configuration where the patch says none.
    """
    if patch.base != loaded.fingerprint:
        made, advice = patch.provenance.get("dtype", loaded.dtype), ""
        if made != loaded.dtype and "float16" in (made, loaded.dtype):
            advice = f"; load it in {made!s:.20}, as for it (float16 rounds to another fingerprint)"
        return (
            f"The patch was made for a base with fingerprint {patch.base[:12] or 'none'} "
            f"({patch.provenance.get('model', 'unknown')}), the model {loaded.name} has "
            f"{loaded.fingerprint[:12]}{advice}"
        )
    kept = patch.provenance.get("configuration", {})
    if differing := unlike(kept, configuration_of(loaded.model)):
        name, (there, here) = next(iter(differing.items()))
        return (
            f"The patch was made for a model whose configuration says {name} {short(there)}, "
            f"{loaded.name} has the same weights and {name} {short(here)}, so that it says other "
            "things"
        )
    return ""


def sites_of(model: PreTrainedModel, patch: Patch) -> list[Site]:
    """The sites that the patch shifts.

    Raises:
        PatchError: one is missing, of another shape, or shares its weight with another layer.
    """
    modules = dict(model.named_modules())
    sites = []
    for name in patch.factors:
        if getattr(getattr(modules.get(name), "weight", None), "ndim", 0) != 2:
            lacks = f"which this model lacks{nearest(name, modules) or '.'}"
            what = "which is no linear layer of this model." if name in modules else lacks
            raise PatchError(f"The patch shifts {name}, {what} It was made for another model.")
        site, wanted = Site(name, modules[name]), patch.shape_VK(name)
        if site.shape_VK != wanted:
            raise PatchError(
                f"The patch's shift of {name} is {wanted}, this model's layer is {site.shape_VK}; "
                "it was made for another model."
            )
        if shared := shared_with(model, site):
            raise PatchError(
                f"The patch shifts {name}, which shares its weight with {shared} here, so that "
                "both would move; give a model whose two are apart, or a patch without that layer."
            )
        sites.append(site)
    return sites
