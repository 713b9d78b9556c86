"""What edited layers read, and the gradients at their outputs, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from malmend.models.sites import Site


class Trace:
    """One site's last input and output gradient, positions flattened: filled by :func:`tracing`.

    Both lie where the layer does, which need not be where the model's input is given.
    """

    def __init__(self, site: Site):
        self.site = site
        self.keys: Tensor
        self.value_grads: Tensor
        self.added: Tensor | None = None

    def keys_at(self, flat_Q: Tensor) -> Tensor:
        """Its inputs at these of the flattened positions, on their device."""
        return self.keys[flat_Q.to(self.keys.device)].to(flat_Q.device)

    def grads_at(self, flat_Q: Tensor) -> Tensor:
        """The gradients at its outputs there, on their device."""
        return self.value_grads[flat_Q.to(self.value_grads.device)].to(flat_Q.device)


@contextmanager
def tracing(sites: Sequence[Site], grads: bool = True) -> Iterator[list[Trace]]:
    """Records each site's input and, with ``grads``, the gradient at its output.

    The weights need no gradient: the first site's output is made the start of the graph.  What a
    trace holds in ``added`` is added to the site's output (same flattened shape).
    """
    traces = [Trace(site) for site in sites]

    def hook(trace: Trace) -> Callable[..., Tensor | None]:
        def record(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            trace.keys = args[0].detach().reshape(-1, args[0].shape[-1])
            if not grads:
                return None
            if trace.added is not None:
                output = output + trace.added.to(output.device).view_as(output)
            if not output.requires_grad:
                # Not a leaf itself: a block of parts side by side may add to it in place.
                output = output + output.new_zeros(()).requires_grad_(True)

            def keep(grad: Tensor) -> None:
                trace.value_grads = grad.reshape(-1, grad.shape[-1])

            output.register_hook(keep)
            return output

        return record

    handles = [trace.site.module.register_forward_hook(hook(trace)) for trace in traces]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()
