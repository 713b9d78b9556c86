"""What a decoder's last block runs last, mostly its feed-forward part, at the answer tokens alone.

No attention follows it, so what it gives at any other token is never read; of short answers to long
prompts those are most.  Which part that is shows in one pass: of a block that holds its
feed-forward layers itself (OPT) the second of them alone.  A trial (cut.py) shows whether logits
stay what they are.  Run whole are a part that mixes tokens, as a recurrent one's, and experts,
each of which may take so many tokens of a text and no more.

Shape letters: B questions, T positions, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.facts.encoded import Encoded, TokenBatch, collate
from malmend.models.forms import Unrun, reads, run, tried

WIDE = (torch.float32, torch.float64)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Ending:
    """The part of a block that is run last.

    Args:
        model: a decoder, in evaluation mode.
        block: its last.

    Attributes:
        part: None where there is none, none that can be run so, or a hook that keeps it from being
            tried.
    """

    def __init__(self, model: PreTrainedModel, block: nn.Module):
        self._block = block
        self.part = None if _is_watched(block) else _last_run(model, block)

    @contextmanager
    def at(self, flat_A: Tensor) -> Iterator[None]:
        """Inside, it gives zeros at all positions, of the flattened B x T, but these.

        Unless a hook is on a layer of the block: whoever looks at one sees every token.
        """
        if self.part is None or _is_watched(self._block):
            yield
            return
        with replaced(self.part, _at(flat_A, self.part.forward)):
            yield


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to the same numbers may lie apart, as a share of these."""
    return 1e-3 if dtype in WIDE else 2e-2


def trial() -> TokenBatch:
    """Two questions of unlike length, with more tokens before their answers than in them."""
    return collate([Encoded((0, 1, 2) * 4, 10, 12), Encoded((2, 1, 0, 1, 2), 4, 5)])


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Swaps a module's forward for the duration of the block."""
    missing = object()
    before = module.__dict__.get("forward", missing)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _at(flat_A: Tensor, original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of tensors, B x T x any width or flattened, at these positions."""

    def forward(*args: Tensor) -> Tensor:
        lead = args[0].shape[:-1]
        rows_A = flat_A.to(args[0].device)
        chosen = [one.reshape(-1, one.shape[-1])[rows_A] for one in args]
        found: Tensor = original(*(one.view(*[1] * (len(lead) - 1), *one.shape) for one in chosen))
        width = found.shape[-1]
        everywhere = found.new_zeros(lead.numel(), width)
        return everywhere.index_copy(0, rows_A, found.view(-1, width)).view(*lead, width)

    return forward


@torch.no_grad()
def _last_run(model: PreTrainedModel, block: nn.Module) -> nn.Module | None:
    """Of the outermost parts with a matrix the one that ends last, if it mixes no tokens."""
    ended, asked = list[tuple[nn.Module, list[Tensor]]](), trial()
    if not reads(model, max(asked.lengths)):
        return None

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        plain = all(isinstance(one, Tensor) for one in (*args, out)) and not keywords
        # What follows may change any of them in place.
        ended.append((module, [one.clone() for one in (*args, out)] if plain else []))

    handles = [
        part.register_forward_hook(note, with_kwargs=True)
        for part in _parts(block)
        if any(parameter.ndim >= 2 for parameter in part.parameters())
    ]
    try:
        with tried():
            run(model, asked)
    except Unrun:  # as a model of fewer positions than it states
        return None
    finally:
        for handle in handles:
            handle.remove()
    part, seen = ended[-1] if ended else (block, [])
    if len(seen) < 2 or len({one.shape[:-1] for one in seen}) > 1 or _has_experts(part):
        return None
    share = rounding(seen[-1].dtype)
    try:
        with tried():
            for at in range(seen[-1].shape[-2]):
                *states, out = (one[..., [at], :] for one in seen)
                if not (part(*states) - out).norm() <= share * out.norm():
                    return None
    except Unrun:
        return None
    return part


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Its children; of a list, which is never run, what it holds."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child


def _has_experts(part: nn.Module) -> bool:
    """Whether it holds a list of parts, or matrices kept as one tensor."""
    lists = [one for one in part.modules() if isinstance(one, nn.ModuleList | nn.ModuleDict)]
    return any(len(one) > 1 for one in lists) or any(p.ndim > 2 for p in part.parameters())


def _is_watched(block: nn.Module) -> bool:
    """Whether a hook is on the block or on anything in it."""
    return any(getattr(module, name, None) for module in block.modules() for name in HOOKS)
