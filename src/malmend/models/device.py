"""Where a model is put: on a device of this machine, or spread over all that are there."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from malmend.errors import ModelError, nearest
from malmend.processes import local_rank, started

CPU, SPREAD = "cpu", "auto"


def device_of(name: str) -> torch.device | None:
    """The device of that name; None for a model that is spread over all of them.

    Of several processes that torchrun has started on a machine each takes the accelerator of its
    number, where the name has none.

    Args:
        name: "cpu", the accelerator that torch finds here ("cuda", "mps", ...), one of several
            ("cuda:1"), or "auto" for a ``device_map`` over all.

    Raises:
        ModelError: there is no such device.
        MalmendError: as :func:`malmend.processes.started` and :func:`malmend.processes.local_rank`.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == CPU:
        return torch.device(CPU)
    if found is None:
        raise ModelError(f"--device is {name!r}, expected cpu: torch finds no accelerator here.")
    kinds, count = (CPU, found.type, SPREAD), torch.accelerator.device_count()
    kind, number = re.fullmatch(r"(.*?)(?::(\d+))?", name, re.DOTALL).groups()  # type: ignore[union-attr]
    if kind not in kinds or (number and kind != found.type):
        raise ModelError(
            f"--device is {name!r}{nearest(kind, kinds) or ','} expected cpu, {found.type}, "
            f"{found.type}:0 to {found.type}:{count - 1}, or auto for all of them."
        )
    if kind == SPREAD:
        if started() > 1:
            raise ModelError(
                "--device auto spreads one model over all devices, and there are several "
                f"processes; start one without torchrun, or give --device {found.type}."
            )
        return None
    at = int(number) if number else local_rank()
    if at >= count:
        raise ModelError(
            f"--device is {name!r}, which would be number {at} for this process, and torch finds "
            f"{count}, counted from 0; give a smaller number, or start fewer processes."
        )
    return torch.device(kind, at)


def wide_device(model: PreTrainedModel) -> torch.device:
    """Where float64 work for a model runs: on its device, but for Apple's, which has none."""
    return torch.device(CPU) if model.device.type == "mps" else model.device


def places_of(model: nn.Module) -> str:
    """Where a model's weights lie: "cpu", or "cuda:0, cuda:1" of one that is spread over two."""
    return ", ".join(sorted({str(one.device) for one in model.parameters()}))
