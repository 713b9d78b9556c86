"""What an editor makes of a token: the one type that transforms and aggregations share.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from malmend.numerics.prior import PriorGrads


@dataclass(frozen=True, eq=False)
class Pseudo:
    """Pseudo keys and pseudo gradients of N tokens; token j's own shift is -g~_j u~_j^T.

    ``grads_NV`` has the learning rate eta inside.
    """

    keys_NK: Tensor
    grads_NV: Tensor


def value_diffs(keys_NK: Tensor, pseudo: Pseudo) -> Tensor:
    """d_j = S_j u_j of equation (9) as rows where ``pseudo`` is: what a token asks of its value."""
    gain_N = torch.einsum("nk,nk->n", pseudo.keys_NK, keys_NK.to(pseudo.keys_NK.device))
    return -gain_N.unsqueeze(1) * pseudo.grads_NV


class Received(NamedTuple):
    """What an aggregation finds on the way back, beside the rows of its proxy.

    ``weights_N`` is dL/dw_j of each row's weight in float64; None where rows have no weight.
    """

    prior: PriorGrads
    weights_N: Tensor | None
