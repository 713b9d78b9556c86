"""What the blocks of a model run, watched in one pass over two prompts, and what stands against it.

A layer can be edited where it is a plain linear one that sees every token once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from malmend.errors import ModelError
from malmend.models.forms import KINDS, Stack, Unrun, cannot_run, form_of, probe, run, tried

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """The two known layouts; a subclass may pack or scale its weight, so it is tried out."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in PLAIN or weight.is_meta:
        return False
    key = torch.linspace(-1, 1, weight.shape[1]).to(weight).unsqueeze(0)
    plain = nn.functional.linear(key, weight, module.bias)
    try:
        return bool((module(key) - plain).norm() <= 2e-2 * plain.norm())  # as bfloat16 rounds
    except (RuntimeError, TypeError):  # a router may give more than its product
        return False


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself, not a child, keeps a weight of two or more dimensions."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.ndim >= 2 for tensor in own)


def check_runs(
    model: PreTrainedModel, name: str, stack: Stack, runs: Mapping[str, list[int]]
) -> None:
    """Raises ModelError unless a layer sees all that its block sees, as often as the block is run.

    ``runs`` as of :func:`run_matrices`.  An expert that happened to see all is told by its place.
    """
    block = ".".join(name.split(".")[: stack.prefix.count(".") + 2])
    if runs.get(name) != runs[block] or _is_one_of_several(model, name, block):
        raise ModelError(
            f"{name} does not see every token once (it may be an expert of a mixture, or be "
            "skipped), which editing needs; choose another layer with --sites, such as the "
            "attention's output."
        )


def _is_one_of_several(model: PreTrainedModel, name: str, block: str) -> bool:
    """Whether a list inside the block holds the layer's part beside others of its class."""
    parts = name.removeprefix(f"{block}.").split(".")
    for depth in range(len(parts) - 1):
        held = model.get_submodule(".".join([block, *parts[: depth + 1]]))
        kinds = [type(child) for child in held.children()]
        if (
            isinstance(held, nn.ModuleList | nn.ModuleDict)
            and kinds.count(type(held.get_submodule(parts[depth + 1]))) > 1
        ):
            return True
    return False


@torch.no_grad()
def run_matrices(model: PreTrainedModel, stacks: Sequence[Stack]) -> dict[str, list[int]]:
    """How many tokens the blocks and their modules with matrices see, each time they are run.

    Modules stand in the order in which they end, last runs counted.
    """
    form, runs, last = form_of(model), dict[str, list[int]](), list[Tensor]()
    if model.device.type == "meta":
        raise ModelError(f"{type(model).__name__} is offloaded; load it whole onto one device.")
    for name, module in model.named_modules():
        if inspect.ismethod(getattr(module, "weight", None)):  # torch.ao keeps no parameter
            raise ModelError(
                f"{name} is quantised ({type(module).__name__}); load the model unquantised."
            )

    def count(_module: nn.Module, args: Any, keywords: Any, _out: Any, name: str) -> None:
        seen = next((one for one in (*args, *keywords.values()) if torch.is_tensor(one)), None)
        tokens = 0 if seen is None else seen.numel() // seen.shape[-1]
        runs[name] = [*runs.pop(name, []), tokens]

    blocks = {f"{stack.prefix}.{i}" for stack in stacks for i in range(len(stack.blocks))}
    handles = [
        module.register_forward_hook(partial(count, name=name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in blocks
        or (name.startswith(tuple(f"{stack.prefix}." for stack in stacks)) and _has_matrix(module))
    ]
    final = stacks[-1].blocks[-1]
    handles.append(
        final.register_forward_hook(
            lambda _module, _args, out: last.append(out if isinstance(out, Tensor) else out[0])
        )
    )
    try:
        with tried():
            logits = run(model, probe(model, (0, 1), (0, 2))).logits.float()
    except Unrun as error:
        if form == "classes" and model.config.pad_token_id is None:
            raise _reads_rightwards(model) from error  # such a head looks for the last token
        raise cannot_run(model, error, "finding its layers") from error
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ModelError(
            f"{type(model).__name__} calls its blocks in a way that nothing can watch, which "
            f"editing needs; give {KINDS} of another make."
        )
    if not logits.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives NaN or infinity, expected finite logits; its weights "
            "are damaged, or need float32."
        )
    # Exactly alike, but for rounding, only where the first token sees no other: an encoder that
    # hardly tells these two prompts apart is one all the same.
    if form == "classes" and _same_start(last[0], 1e-6):
        raise _reads_rightwards(model)
    # Rounding may differ between the rows of a batch; a look ahead changes far more.
    if form == "causal" and not _same_start(logits, 1e-2):
        raise ModelError(
            f"{type(model).__name__} lets a token see the ones after it, expected {KINDS}; give "
            "another model, or fine-tune a classification head on it with malmend finetune."
        )
    return runs


def _reads_rightwards(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"{type(model).__name__} reads from left to right, so that its first token says no class, "
        f"expected {KINDS}."
    )


def _same_start(out_BTW: Tensor, share: float) -> bool:
    """Whether two prompts that begin alike give alike numbers at their first token."""
    one, other = out_BTW[:, 0]
    return torch.allclose(one, other, rtol=0, atol=share * out_BTW[:, 0].abs().max().item())
