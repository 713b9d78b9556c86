"""Devices that are not there: tensors that say they are on one, and refuse what a real one would.

No test machine has an accelerator, so what runs on one and what forgets to move a tensor look the
same.  Here a tensor that was moved to ``device(n)`` computes on the CPU but names that device, and
an operation over tensors of two devices raises, as CUDA's do: but for a number (a tensor of no
dimension, from the CPU), indices from the CPU, and ``copy_``.  So does ``numpy`` of what was not
brought back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from malmend.models import blocks, sites
from malmend.models.forms import find_stacks

CPU = torch.device("cpu")
KIND = "xla"  # any kind that no branch of the code under test asks for
ACROSS = ("copy_", "_to_copy")  # operations that move


def device(number: int) -> torch.device:
    """One of the devices that are not there."""
    return torch.device(KIND, number)


class Elsewhere(Tensor):
    """A tensor that says it is on ``place``."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(
        cls, given: Tensor, place: torch.device | None = None, requires_grad: bool | None = None
    ) -> Elsewhere:
        wants = given.requires_grad if requires_grad is None else requires_grad
        held = _held(given).detach()
        new = Tensor._make_subclass(cls, held, wants)
        new.held, new.place = held, place or given.device
        return new

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def data(self) -> Tensor:
        return _there(self.held, self.place)

    @data.setter
    def data(self, other: Tensor) -> None:
        if other.device != self.place:
            raise RuntimeError(f"data: tensors on {self.place} and on {other.device}")
        self.held.set_(_held(other))
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} on {self.place}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert a tensor on {args[0].place} to numpy")
        if func is Tensor.__repr__:
            return args[0].__repr__()
        if func is Tensor.tolist:
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        place = _place_of(name, args, kwargs)
        plain = tree_map(_held, (args, kwargs))
        if plain[1].get("device") is not None:
            plain[1]["device"] = CPU
        out = func(*plain[0], **plain[1])
        wrapped = tree_map(lambda one: _there(one, place), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _place_of(name: str, args: Any, kwargs: Any) -> torch.device:
    """Of an operation's result."""
    found = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
    if name in ACROSS:
        return found[0].device
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [one for one in tree_flatten(args[1])[0] if isinstance(one, Tensor)]
        found = [one for one in found if not (one.device == CPU and any(one is i for i in indices))]
    if any(one.ndim for one in found):
        found = [one for one in found if one.ndim or one.device != CPU]
    places = list(dict.fromkeys(one.device for one in found))
    if len(places) > 1:
        raise RuntimeError(f"{name}: tensors on {places[0]} and on {places[1]}")
    return places[0]


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Elsewhere) else one


def _there(one: Any, place: torch.device) -> Any:
    if not isinstance(one, Tensor) or isinstance(one, Elsewhere) or place == CPU:
        return one
    return Elsewhere(one, place)


class _Moved(torch.autograd.Function):
    """A copy on another device; its gradient goes back."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, place: torch.device) -> Tensor:
        ctx.place = source.device
        return _there(_held(source).clone(), place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Moved.apply(grad, ctx.place), None


class _Devices(TorchFunctionMode):
    """Catches what names a device, before torch looks for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cpu", "type_as") and args and isinstance(args[0], Tensor):
            return _brought(name, args, kwargs)
        if name == "pad_sequence":  # which makes its result inside torch, beside what it is given
            first, *more = args
            return _there(func([_held(one) for one in first], *more, **kwargs), first[0].device)
        if kwargs.get("is_causal") and not torch.backends.cuda.flash_sdp_enabled():  # so does this
            causal = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool).tril()
            kwargs |= {"is_causal": False, "attn_mask": _there(causal, args[0].device)}
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        place = torch.device(kwargs["device"])
        return _there(func(*map(_held, args), **(kwargs | {"device": CPU})), place)


def _brought(name: str, args: Any, kwargs: Any) -> Tensor:
    """A tensor after ``to``, ``cpu`` or ``type_as``."""
    (source, *rest), place = args, kwargs.pop("device", None)
    kept: list[Any] = []
    for one in rest:
        if isinstance(one, Tensor):
            place = one.device
            kept.append(one.dtype)
        elif isinstance(one, str | torch.device):
            place = one
        elif one is not None:
            kept.append(one)
    place = CPU if name == "cpu" else source.device if place is None else torch.device(place)
    dtypes = [one for one in [*kept, kwargs.get("dtype")] if isinstance(one, torch.dtype)]
    if dtypes and dtypes[0] != source.dtype:  # before it crosses, as CUDA's copies are made
        source = source.to(dtypes[0])
    if place != source.device:
        return _Moved.apply(source, place)
    return source.clone() if kwargs.get("copy") else source


def _type_of(one: Any) -> type:
    return nn.Parameter if isinstance(one, Elsewhere) else type(one)


@contextmanager
def devices() -> Iterator[None]:
    """Inside, ``device(n)`` can be named wherever torch takes a device."""
    with _Devices(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Of norm as torch does it for tensors of a class of their own.
        warnings.filterwarnings("ignore", "at::frobenius_norm is deprecated")
        for module in (blocks, sites):  # which take no weights of a class of their own
            patch.setattr(module, "type", _type_of, raising=False)
        # Where a module moves, its parameters are others afterwards, and not other data.
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        yield


def spread(model: nn.Module, second: int) -> nn.Module:
    """Every stack's blocks from ``second`` on are on another device, by accelerate's own hooks."""
    stacks = find_stacks(model)  # type: ignore[arg-type]
    parts: dict[str, Any] = {}

    def lay(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            stack = next((one for one in stacks if one.prefix == prefix + name), None)
            if stack is not None:
                places = [device(int(index >= second)) for index in range(len(stack.blocks))]
                parts.update({f"{prefix}{name}.{i}": place for i, place in enumerate(places)})
            elif any(one.prefix.startswith(f"{prefix}{name}.") for one in stacks):
                lay(child, f"{prefix}{name}.")
            else:
                parts[prefix + name] = device(0)

    lay(model, "")
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(tuple(parts)):
            parts[name] = device(0)
    with warnings.catch_warnings():  # of a buffer's name, as of BART's final_logits_bias
        warnings.filterwarnings("ignore", "The following device_map keys do not match")
        return accelerate.dispatch_model(model, parts, main_device=device(0), force_hooks=True)
