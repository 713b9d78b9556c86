"""What an editor makes of a token: the one type that transforms and aggregations share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from malmend.numerics.ridge import PriorGrads


@dataclass(frozen=True)
class Pseudo:
    """Pseudo keys and pseudo gradients of N tokens; token j's own shift is -g~_j u~_j^T.

    ``grads_NV`` has the learning rate eta inside.
    """

    keys_NK: Tensor
    grads_NV: Tensor


class Received(NamedTuple):
    """What an aggregation finds on the way back, beside the rows of its proxy.

    ``weights_N`` is dL/dw_j of each row's weight in float64; None where rows have no weight.
    """

    prior: PriorGrads
    weights_N: Tensor | None
