"""Splits a decoder into a trunk, which no edit changes, and a head, which is run again and again.

The cut lies *inside* the first edited block, at the input of its edited layer: everything below is
the same in every step and every experiment, so it is computed once and kept.  With u the edited
layer's input and r = (block output) - (layer output), the head starts from

    block output = r + layer(u)                                                                (5)

which holds where the layer's output is added to the residual as it is.  A probe checks that; where
it fails (a norm after the layer, low precision), the cut is at the block's input.

Nothing here knows an architecture: the head runs the model's own forward with the blocks below the
cut passing their input through, so masks, positions and whatever else the model prepares are its
own.  Logits are computed only where an answer token needs them.

Shape letters: B questions, T positions, H hidden width, K key width, A answer tokens, W vocabulary,
F stored width (K + H, or H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.errors import MalmendError
from malmend.facts.tokens import Encoded, TokenBatch, collate
from malmend.models.sites import Site, find_blocks
from malmend.models.store import ActivationStore


@dataclass(frozen=True)
class TrunkSettings:
    """How questions are grouped and what is kept of the trunk.

    Attributes:
        batch_tokens: positions in one micro-batch, padding included.
        store_bytes: disk budget for trunk activations; 0 keeps none.
    """

    batch_tokens: int = 1024
    store_bytes: int = 6_000_000_000

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("store_bytes", 0)):
            if getattr(self, name) < least:
                raise MalmendError(
                    f"{name} is {getattr(self, name)}, expected {least} or more; "
                    f"change --trunk.{name.replace('_', '-')}."
                )


class _Stop(Exception):
    """Ends a forward pass at the cut."""


class Trunk:
    """A decoder cut at its first edited layer.

    Args:
        model: in evaluation mode, parameters not requiring gradients.
        sites: the layers to be edited, in any order.
        settings: grouping and budget.
        store_folder: where activations are kept; None keeps none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        settings: TrunkSettings = TrunkSettings(),
        store_folder: Path | None = None,
    ):
        self.model, self.sites, self.settings = model, tuple(sites), settings
        prefix, blocks = find_blocks(model)
        indices = [int(site.name[len(prefix) + 1 :].split(".")[0]) for site in sites]
        self.below: list[nn.Module] = list(blocks[: min(indices)])
        self.block = blocks[min(indices)]
        inside = [site for site, index in zip(sites, indices, strict=True) if index == min(indices)]
        self.first = inside[0]
        self._tuple_length = 0
        self._cut_inside = self._adds_plainly() and len(inside) == 1
        hidden = model.config.get_text_config().hidden_size
        kind = "site" if self._cut_inside else "block"
        width = hidden + self.first.shape_VK[1] if self._cut_inside else hidden
        folder = None if store_folder is None else store_folder / f"{self.first.name}-{kind}"
        states = None if store_folder is None else store_folder / "unedited-states"
        self.store = ActivationStore(folder, width, model.dtype, settings.store_bytes)
        read = model.get_output_embeddings().weight.shape[1]  # some project to another width first
        self._states = ActivationStore(states, read, model.dtype, settings.store_bytes)

    @property
    def wide(self) -> torch.dtype:
        """What captured tensors are kept in: float64 for a float64 model, else float32."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def batches(self, questions: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Micro-batches of like length, longest first, with the indices of their questions."""
        order = sorted(range(len(questions)), key=lambda i: -len(questions[i].ids))
        start = 0
        while start < len(order):
            width = len(questions[order[start]].ids)
            count = max(1, self.settings.batch_tokens // width)
            chosen = order[start : start + count]
            start += count
            yield chosen, self.batch([questions[i] for i in chosen])

    def batch(self, questions: Sequence[Encoded]) -> Batch:
        """One micro-batch with its trunk activations, from the store where they are there."""
        rows = [self.store.get(question.ids) for question in questions]
        missing = [i for i, found in enumerate(rows) if found is None]
        if missing:
            fresh = self._activations(collate([questions[i] for i in missing]))
            for i, found in zip(missing, fresh, strict=True):
                rows[i] = found
                self.store.put(questions[i].ids, found)
        tokens = collate(questions)
        padded = nn.utils.rnn.pad_sequence([row for row in rows if row is not None], True)
        return Batch(tokens, padded.to(self.model.device))

    def logits(self, batch: Batch) -> Tensor:
        """The head's logits at the batch's answer tokens, shape A x W."""
        return self._run_head(batch, lambda states_AH: states_AH)

    def final_states(self, batch: Batch) -> Tensor:
        """What the output layer reads at the batch's answer tokens, shape A x H."""
        kept: list[Tensor] = []

        def keep(states_AH: Tensor) -> Tensor:
            kept.append(states_AH)
            return states_AH[:1]

        self._run_head(batch, keep)
        return kept[0]

    @torch.no_grad()
    def unedited_states(self, questions: Sequence[Encoded]) -> list[Tensor]:
        """Final states of the unedited model per question, each A x H, kept in the store.

        Call while the weights are the unedited ones.
        """
        known = {question: self._states.get(question.place) for question in questions}
        missing = [question for question, states_AH in known.items() if states_AH is None]
        for indices, batch in self.batches(missing):
            split = self.final_states(batch).cpu().split(batch.tokens.sources)
            for index, states_AH in zip(indices, split, strict=True):
                known[missing[index]] = states_AH.clone()
                self._states.put(missing[index].place, states_AH)
        return [states_AH for q in questions if (states_AH := known[q]) is not None]

    def logits_of(self, states_AH: Tensor) -> Tensor:
        """Logits of :meth:`final_states`, shape A x W, through the model's own output code."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with ExitStack() as stack:
            for block in [*self.below, *self._from_cut()]:
                stack.enter_context(_replaced(block, self._pass_through))
            stack.enter_context(_output_reads(self.model, lambda _: states_AH))
            return self.model(input_ids=ids, use_cache=False).logits[0]

    def _from_cut(self) -> list[nn.Module]:
        return list(find_blocks(self.model)[1][len(self.below) :])

    def _run_head(self, batch: Batch, read: Callable[[Tensor], Tensor]) -> Tensor:
        tokens, stored = batch.tokens, batch.stored_BTF

        def choose(states_BTH: Tensor) -> Tensor:
            flat = states_BTH.reshape(-1, states_BTH.shape[-1])
            return read(flat[tokens.flat_sources_A.to(flat.device)])

        with ExitStack() as stack:
            for block in self.below:
                stack.enter_context(_replaced(block, self._pass_through))
            stack.enter_context(_replaced(self.block, self._head_block(stored)))
            stack.enter_context(_output_reads(self.model, choose))
            return self._forward(tokens).logits[0]

    def _head_block(self, stored_BTF: Tensor) -> Callable[..., Any]:
        if self._cut_inside:
            key_width = self.first.shape_VK[1]

            def from_site(*_args: Any, **_kwargs: Any) -> Any:
                value = self.first.module(stored_BTF[..., :key_width])
                return self._wrapped(stored_BTF[..., key_width:] + value)

            return from_site
        original = self.block.forward

        def from_input(*args: Any, **kwargs: Any) -> Any:
            if args:
                return original(stored_BTF, *args[1:], **kwargs)
            return original(**{**kwargs, "hidden_states": stored_BTF})

        return from_input

    @torch.no_grad()
    def _activations(self, tokens: TokenBatch) -> list[Tensor]:
        if self._cut_inside:
            key, value, out = self._run_first_block(tokens)
            stored = torch.cat([key.view(*out.shape[:2], -1), out - value.view_as(out)], dim=-1)
        else:
            stored = self._block_input(tokens)
        return [row[:length].clone() for row, length in zip(stored, tokens.lengths, strict=True)]

    def _block_input(self, tokens: TokenBatch) -> Tensor:
        seen: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        self._run_until_stop(tokens, self.block.register_forward_pre_hook(stop, with_kwargs=True))
        return seen[0]

    def _run_first_block(
        self, tokens: TokenBatch, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The edited layer's input and output, and the block's output."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            seen.extend([args[0], output])
            return None if added is None else output + added.view_as(output)

        def stop(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._tuple_length = len(output) if isinstance(output, tuple) else 0
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        handles = [
            self.first.module.register_forward_hook(keep),
            self.block.register_forward_hook(stop),
        ]
        self._run_until_stop(tokens, *handles)
        return seen[0], seen[1], seen[2]

    @torch.no_grad()
    def _adds_plainly(self) -> bool:
        """Whether equation (5) holds: the layer's output reaches the block's output as it is."""
        probe = collate([Encoded((0, 1, 2), 3, 3)])
        _, value, out = self._run_first_block(probe)
        if self.model.dtype not in (torch.float32, torch.float64):
            return False  # taking the layer's output off again would round
        if value.numel() != out.numel():
            return False
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(out.shape, generator=generator).to(out)
        added *= value.abs().mean() + 1e-3 * out.abs().mean()
        moved = self._run_first_block(probe, added)[2] - out
        # The last token only: a sink token's residual is so large that it rounds the change away.
        return bool((moved - added)[:, -1].norm() < 1e-3 * added[:, -1].norm())

    def _run_until_stop(self, tokens: TokenBatch, *handles: Any) -> None:
        try:
            self._forward(tokens)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, tokens: TokenBatch) -> Any:
        device = self.model.device
        ids, mask = tokens.ids_BT.to(device), tokens.mask_BT.to(device)
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _pass_through(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(args[0] if args else kwargs["hidden_states"])

    def _wrapped(self, states: Tensor) -> Any:
        """As this model's blocks return their output: alone, or first of a tuple."""
        return (states, *[None] * (self._tuple_length - 1)) if self._tuple_length else states


@dataclass(frozen=True)
class Batch:
    """Tokens of a micro-batch and where the head starts from."""

    tokens: TokenBatch
    stored_BTF: Tensor


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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


@contextmanager
def _output_reads(model: PreTrainedModel, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets ``choose`` pick the hidden states that the output layer reads."""
    layer = model.get_output_embeddings()
    assert layer is not None
    handle = layer.register_forward_pre_hook(lambda _, args: (choose(args[0]).unsqueeze(0),))
    try:
        yield
    finally:
        handle.remove()
