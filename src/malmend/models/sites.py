"""Which linear layers can be edited, found from the module structure.

A *site* is a linear layer with weight W (V x K) that an editor shifts.  This file is the only one
that knows how a weight is stored: ``nn.Linear`` keeps V x K, GPT-2's ``Conv1D`` keeps K x V.

Shape letters: V value width (output), K key width (input).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from malmend.errors import ModelError, nearest
from malmend.files import reason


@dataclass(frozen=True, eq=False)
class Site:
    """One editable linear layer."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The layer's own parameter, in its own orientation."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """Whether the layer stores K x V."""
        return isinstance(self.module, Conv1D)

    @property
    def shape_VK(self) -> tuple[int, int]:
        """(V, K)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    def oriented(self, matrix: Tensor) -> Tensor:
        """From the layer's orientation to V x K, or back: a view."""
        return matrix.T if self.is_transposed else matrix


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's stack of like blocks: the longest list of modules of one class.

    Raises:
        ModelError: there is none.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == getattr(model.config, "num_hidden_layers", len(module))
        and len({type(block) for block in module}) == 1
    ]
    if model.config.is_encoder_decoder or not stacks:
        raise ModelError(
            f"{type(model).__name__} has no single stack of decoder blocks, which editing needs; "
            "give a decoder such as Llama or GPT-2."
        )
    return max(stacks, key=lambda stack: len(stack[1]))


def find_sites(
    model: PreTrainedModel, layers: int = 6, pattern: str | None = None
) -> tuple[Site, ...]:
    """The second linear layer of the last ``layers`` feed-forward blocks, lowest first.

    Found by running two tokens: of what a block multiplies by, the layer that is run last, which
    must be a linear layer that gives the block's width.  ``pattern`` (a module name, or a shell
    pattern such as ``*.mlp.c_proj``) chooses by name instead; ``layers`` then does not apply.

    Raises:
        ModelError: no such layer, or one that cannot be edited, with the reason.
    """
    if pattern is not None:
        return _named_sites(model, pattern)
    prefix, blocks = find_blocks(model)
    if not 1 <= layers <= len(blocks):
        raise ModelError(
            f"{layers} layers were to be edited, expected 1 to {len(blocks)}, the number of blocks "
            "of this model; change --layers."
        )
    order = _executed_matrices(model, prefix)
    sites = []
    for index in range(len(blocks) - layers, len(blocks)):
        start = f"{prefix}.{index}."
        width = model.config.get_text_config().hidden_size
        mine = [name for name in order if name.startswith(start)]
        last = model.get_submodule(mine[-1]) if mine else None
        if last is None or not _is_linear(last) or Site("", last).shape_VK[0] != width:
            raise ModelError(
                f"Block {prefix}.{index} does not end in a plain linear layer of output width "
                f"{width} (mixture-of-experts, fused and quantised layers cannot be edited); "
                "choose layers by name with --sites."
            )
        sites.append(_checked_site(model, mine[-1]))
    return tuple(sites)


def _named_sites(model: PreTrainedModel, pattern: str) -> tuple[Site, ...]:
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    chosen = fnmatch.filter(linears, pattern)
    if not chosen:
        raise ModelError(
            f"No linear layer is named {pattern!r}{nearest(pattern, linears) or '.'} "
            "Give a name, or a pattern with *, from `malmend inspect`."
        )
    inside = f"{find_blocks(model)[0]}."
    for name in chosen:
        if not name.startswith(inside):
            raise ModelError(f"{name} lies outside the blocks {inside}*, choose a layer in them.")
    return tuple(_checked_site(model, name) for name in chosen)


def _checked_site(model: PreTrainedModel, name: str) -> Site:
    site = Site(name, model.get_submodule(name))
    weight = site.weight
    shared = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and other != f"{name}.weight"
    ]
    if shared:
        raise ModelError(
            f"{name} shares its weight with {shared[0]}, so that an edit would change both; "
            "choose another layer with --sites."
        )
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(
            f"{name} keeps its weight as {weight.dtype} of shape {tuple(weight.shape)} (quantised?)"
            ", expected a floating-point matrix; load the model unquantised."
        )
    return site


def _is_linear(module: nn.Module) -> bool:
    """Exactly the two known layouts: a subclass may pack or scale its weight."""
    return type(module) in (nn.Linear, Conv1D)


def _has_matrix(module: nn.Module) -> bool:
    """Whether the module itself, not a child, keeps a weight of two or more dimensions."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.ndim >= 2 for tensor in own)


@torch.no_grad()
def _executed_matrices(model: PreTrainedModel, prefix: str) -> list[str]:
    """Names of the modules with matrices inside the blocks, in the order in which they end."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.") and _has_matrix(module)
    ]
    try:
        ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    except RuntimeError as error:
        raise ModelError(
            f"{type(model).__name__} cannot run ({reason(error)}), which finding its layers needs; "
            "load it whole and unquantised."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not logits.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives NaN or infinity, expected finite logits; its weights "
            "are damaged, or need float32."
        )
    # Rounding may differ between the rows of a batch; a look ahead changes far more.
    if not torch.allclose(logits[0], logits[1], rtol=0, atol=1e-2 * logits.abs().max().item()):
        raise ModelError(
            f"{type(model).__name__} lets a token see the ones after it, expected a decoder, which "
            "reads from left to right; give another model."
        )
    return order
