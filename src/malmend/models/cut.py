"""Cuts a model into a trunk, which no edit changes, and a head, which is run again and again.

Three places, the first that holds of:

    site     at the input u of the first edited layer.  With r = (block output) - (layer output),

                 block output = r + layer(u)                                                   (5)

             which holds where the layer's output is added to the residual as it is; not where a
             norm follows it, nor in low precision, where taking the output off again would round
    block    at the input of the first edited block
    encoder  at the end of an encoder-decoder's encoder, where only the decoder is edited: the
             decoder reads a few answer tokens, so it is run whole

Nothing here knows an architecture: the head runs the model's own forward with the blocks below the
cut passing their input through, so masks, positions and whatever else the model prepares are its
own.  What a first block hands down beside its states (T5's position bias) is computed again.  A
trial run shows whether head and whole model agree; where not, the cut moves below every block.

Shape letters: B questions, T positions, H hidden width, K key width, A answer tokens, W vocabulary,
F stored width (K + H, or H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from malmend.errors import ModelError
from malmend.facts.encoded import TokenBatch
from malmend.models.ending import WIDE, Ending, replaced, rounding, trial
from malmend.models.forms import (
    Unrun,
    at_places,
    cannot_run,
    find_stacks,
    form_of,
    output_reads,
    probe,
    run,
    tried,
    without_cudnn,
)
from malmend.models.lane import Lane
from malmend.models.sites import Site, stack_of


class _Stop(Exception):
    """Ends a forward pass at the cut."""


class Cut:
    """A model cut at its first edited layer.

    Args:
        model: in evaluation mode, parameters not requiring gradients.
        sites: the layers to be edited, in any order; without any, every block is in the head.

    Attributes:
        place: as above.
        name: of what is kept, for a store.
        width: F.

    Raises:
        ModelError: the model's blocks cannot be skipped.
    """

    place: Literal["site", "block", "encoder"]

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]):
        self.model, self.form = model, form_of(model)
        self._ending: Ending | None = None
        stacks = find_stacks(model)
        self._lanes = [Lane(stack) for stack in stacks]
        self._try_out()
        owners = [stack_of(model, site.name).prefix for site in sites]
        # The encoder runs first, so where it is edited, the decoder is in the head.
        at = next((i for i, stack in enumerate(stacks) if stack.prefix in owners), 0)
        self._lane, stack = self._lanes[at], stacks[at]
        blocks = {
            site: stack.number_of(site.name)
            for site, owner in zip(sites, owners, strict=True)
            if owner == stack.prefix
        }
        self.index = min(blocks.values(), default=0)
        self._inside = [site for site, index in blocks.items() if index == self.index]
        self.place = "encoder" if at > 0 else "block"
        if self.place == "block":
            is_first = self.index == 0 and self._lane.hands_down
            if len(self._inside) == 1 and not is_first and self._adds_plainly():
                self.place = "site"
            if not self._agrees():
                self.place, self.index = "block", 0
        if not self._agrees():
            raise ModelError(
                f"{type(model).__name__} cannot be edited: its blocks need more than the states "
                "of the block below, so that no part of it can be run alone."
            )
        if self.form == "causal":  # of the others all tokens are read, or one for all
            ending = Ending(model, stacks[-1].blocks[-1])
            self._ending = ending if ending.part is not None else None
            if self._ending is not None and not self._agrees(trial()):
                self._ending = None

    @property
    def first(self) -> Site:
        """The first edited layer, where one is."""
        return self._inside[0]

    @property
    def block(self) -> nn.Module:
        """The first block that is in the head."""
        return self._lane.blocks[self.index]

    @property
    def below(self) -> list[nn.Module]:
        """The blocks that the head skips."""
        return self._lane.blocks if self.place == "encoder" else self._lane.blocks[: self.index]

    @property
    def name(self) -> str:
        """Of what is kept, for a store."""
        at = f"-{self.index}" if self.place == "block" else ""
        whose = self.first.name if self._inside else "whole"
        return "encoder" if self.place == "encoder" else f"{whose}-{self.place}{at}"

    @property
    def width(self) -> int:
        """F."""
        hidden = int(self.model.config.get_text_config().hidden_size)
        return hidden + self.first.shape_VK[1] if self.place == "site" else hidden

    @torch.no_grad()
    def activations(self, tokens: TokenBatch) -> list[Tensor]:
        """What the trunk gives for each question, T x F without padding."""
        if self.place == "site":
            key, value, out = self._run_first_block(tokens)
            stored = torch.cat([key.view(*out.shape[:2], -1), out - value.view_as(out)], dim=-1)
        elif self.place == "block":
            stored = self._block_input(tokens)
        else:
            device = self.model.device
            ids, mask = tokens.ids_BT.to(device), tokens.mask_BT.to(device)
            with without_cudnn():
                stored = self.model.get_encoder()(ids, attention_mask=mask).last_hidden_state
        return [row[:length].clone() for row, length in zip(stored, tokens.lengths, strict=True)]

    def head(
        self, tokens: TokenBatch, stored_BTF: Tensor, read: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The head's logits at the answer tokens, A x W.

        ``read`` sees what the output layer is about to read, A x H, and may change it; of "classes"
        it sees the logits.
        """

        def choose(states_BTH: Tensor) -> Tensor:
            return read(at_places(states_BTH, tokens.flat_sources_A))

        with self.heading(stored_BTF):
            if self.form == "classes":
                return read(run(self.model, tokens).logits)
            encoded = stored_BTF if self.place == "encoder" else None
            with self.ending_at(tokens.flat_sources_A), output_reads(self.model, choose):
                return run(self.model, tokens, encoded).logits.squeeze(0)

    @contextmanager
    def heading(self, stored_BTF: Tensor) -> Iterator[None]:
        """Inside, the model starts from what the trunk gave, whatever tokens it is given."""
        with ExitStack() as stack:
            if self.place != "encoder":
                for index in range(self.index):
                    skipped = self._lane.skipped(index)
                    stack.enter_context(replaced(self._lane.blocks[index], skipped))
                stack.enter_context(replaced(self.block, self._head_block(stored_BTF)))
            yield

    def ending_at(self, flat_A: Tensor) -> AbstractContextManager[None]:
        """Inside, what is run last of a decoder is run at these positions alone, if it can be."""
        return self._ending.at(flat_A) if self._ending else nullcontext()

    def logits_of(self, states_AH: Tensor) -> Tensor:
        """Logits, A x W, of what an output layer read, through the model's own output code."""
        if self.form == "classes":
            return states_AH
        with ExitStack() as stack:
            for lane in self._lanes:
                for index, block in enumerate(lane.blocks):
                    stack.enter_context(replaced(block, lane.skipped(index, hand_down=False)))
            stack.enter_context(output_reads(self.model, lambda _: states_AH))
            return run(self.model, probe(self.model, (0,))).logits.squeeze(0)

    def _head_block(self, stored_BTF: Tensor) -> Callable[..., Any]:
        if self.place == "site":
            key_width = self.first.shape_VK[1]

            def from_site(*_args: Any, **_kwargs: Any) -> Any:
                value = self.first.module(stored_BTF[..., :key_width])
                return self._lane.returned(stored_BTF[..., key_width:].to(value.device) + value)

            return from_site
        original = self.block.forward

        def from_input(*args: Any, **kwargs: Any) -> Any:
            if args:
                return original(stored_BTF, *args[1:], **kwargs)
            return original(**{**kwargs, "hidden_states": stored_BTF})

        return from_input

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
            seen.extend([args[0].clone(), output.clone()])  # what follows may change them in place
            return None if added is None else output + added.view_as(output)

        def stop(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple | list) else output)
            raise _Stop

        handles = [
            self.first.module.register_forward_hook(keep),
            self.block.register_forward_hook(stop),
        ]
        self._run_until_stop(tokens, *handles)
        return seen[0], seen[1], seen[2]

    @torch.no_grad()
    def _try_out(self) -> None:
        """Learns how every stack returns its states."""
        with ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.watched())
            try:
                with tried():
                    run(self.model, probe(self.model, (0, 1, 2)))
            except Unrun as error:
                raise cannot_run(self.model, error, "cutting it") from error

    @torch.no_grad()
    def _adds_plainly(self) -> bool:
        """Whether equation (5) holds: the layer's output reaches the block's output as it is."""
        trial = probe(self.model, (0, 1, 2))
        _, value, out = self._run_first_block(trial)
        if self.model.dtype not in WIDE or value.numel() != out.numel():
            return False
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(out.shape, generator=generator).to(out)
        added *= value.abs().mean() + 1e-3 * out.abs().mean()
        moved = self._run_first_block(trial, added)[2] - out
        # The last token only: a sink token's residual is so large that it rounds the change away.
        return bool((moved - added)[:, -1].norm() < 1e-3 * added[:, -1].norm())

    @torch.no_grad()
    def _agrees(self, tokens: TokenBatch | None = None) -> bool:
        """Whether trunk and head together give what the whole model gives, on a trial batch."""
        tokens = tokens or probe(self.model, (0, 1, 2), (2, 1))
        try:
            with tried():
                whole = run(self.model, tokens).logits
                if self.form != "classes":
                    whole = at_places(whole, tokens.flat_sources_A)
                stored = nn.utils.rnn.pad_sequence(self.activations(tokens), batch_first=True)
                found = self.head(tokens, stored.to(self.model.device), lambda states_AH: states_AH)
        except Unrun:
            return False  # as a block that lacks what the skipped ones would have made
        return self.agree(found, whole)

    def agree(self, found: Tensor, whole: Tensor) -> bool:
        """Whether logits are those of the whole model, up to the rounding of its dtype.

        NaN, which some models give beside padding, agrees with nothing.
        """
        share = rounding(self.model.dtype)
        most = whole.abs().max().item()
        return math.isfinite(most) and torch.allclose(found, whole, rtol=0, atol=share * most)

    def _run_until_stop(self, tokens: TokenBatch, *handles: Any) -> None:
        try:
            run(self.model, tokens)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
