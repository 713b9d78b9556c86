"""What an editor makes of a token: the one type that transforms and aggregations share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pseudo:
    """Pseudo keys and pseudo gradients of N tokens; token j's own shift is -g~_j u~_j^T.

    ``grads_NV`` has the learning rate eta inside.
    """

    keys_NK: Tensor
    grads_NV: Tensor
