"""A stack whose blocks are skipped: how they return their states, and what they hand down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from malmend.models.forms import Stack


class Lane:
    """A stack's blocks, and how they return their states: alone, or first of a tuple.

    ``hands_down`` says that the second block is given something that the first one made.
    """

    def __init__(self, stack: Stack):
        self.blocks = list(stack.blocks)
        self.length = 0
        self.hands_down = False
        self._rest: tuple[Any, ...] = ()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Learns from the pass that is run inside."""
        rest: list[Any] = []

        def first(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, tuple | list):
                self.length = len(output)
                rest.extend(one for one in output[1:] if isinstance(one, Tensor))

        def second(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            self.hands_down = any(one is made for one in given for made in rest)

        handles = [self.blocks[0].register_forward_hook(first)]
        handles += [b.register_forward_pre_hook(second, with_kwargs=True) for b in self.blocks[1:2]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def returned(self, states: Tensor) -> Any:
        """States as this stack's blocks return them."""
        if self._rest:
            return (states, *self._rest)
        return (states, *[None] * (self.length - 1)) if self.length else states

    def skipped(self, index: int, hand_down: bool = True) -> Callable[..., Any]:
        """A forward that passes its input through."""
        original = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index == 0:
                runs = self.hands_down and hand_down
                self._rest = original(*args, **kwargs)[1:] if runs else ()
            return self.returned(args[0] if args else kwargs["hidden_states"])

        return forward
