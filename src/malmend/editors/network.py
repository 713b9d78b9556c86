"""The editor network of MEND and MALMEN: two residual low-rank blocks on (key, value gradient).

Shape letters: N tokens, K key width, V value width, F = K + V, R rank, S sites of this shape.

One network serves all sites of one shape; scale s and offset o are per site (MEND, section 3.1):

    placement "before":  out = x + sigma(s * (U V x + b) + o)                               (7)
    placement "after":   out = x + s * sigma(U V x + b) + o     (MALMEN's published code)   (8)

U starts at zero, s at one, o and b at zero, so the network starts as the identity.  V starts
Xavier-uniform (MEND's appendix A) or N(0, 1) (MALMEN's published code).  MEND's appendix A compares
with a U that starts Xavier-uniform too.

sigma is written ``clamp(min=0)``, never ``relu``: at U = 0 every pre-activation is exactly 0, where
relu's gradient in torch is 0 and clamp's is 1.  With relu the network never trains, and every
gradient check still passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malmend.given import check_fields, check_range

MOST_BLOCKS = 100  # published are two


@dataclass(frozen=True)
class NetworkSettings:
    """Size and start of the editor network.

    Attributes:
        rank: of the low-rank blocks; cut to K + V where that is smaller.
        blocks: residual blocks; 0 is the identity, an editor without a network.
        placement: where scale and offset stand, "before" or "after" the activation.
        start: how the first factor starts, "xavier" or "normal".
        identity: the second factor starts at zero, so that the network changes nothing; else it
            starts Xavier-uniform, which MEND's appendix A compares with.
        normalise: it reads keys and value gradients less their mean, in units of their deviation;
            else as they are, which MEND's appendix A compares with too.
    """

    rank: int = 512
    blocks: int = 2
    placement: Literal["before", "after"] = "before"
    start: Literal["xavier", "normal"] = "xavier"
    identity: bool = True
    normalise: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, ("rank",), 1, prefix="--network.")
        check_range(self, ("blocks",), 0, MOST_BLOCKS, prefix="--network.")


class _Block(nn.Module):
    """One residual block, equation (7) or (8)."""

    def __init__(self, width: int, sites: int, settings: NetworkSettings, seed: int):
        super().__init__()
        rank = min(settings.rank, width)
        generator = torch.Generator().manual_seed(seed)
        down_RF = torch.empty(rank, width)
        if settings.start == "xavier":
            nn.init.xavier_uniform_(down_RF, generator=generator)
        else:
            down_RF.normal_(generator=generator)
        self.placement = settings.placement
        self.down_RF = nn.Parameter(down_RF)
        up_FR = torch.zeros(width, rank)
        if not settings.identity:
            nn.init.xavier_uniform_(up_FR, generator=generator)
        self.up_FR = nn.Parameter(up_FR)
        self.bias_F = nn.Parameter(torch.zeros(width))
        self.scale_SF = nn.Parameter(torch.ones(sites, width))
        self.offset_SF = nn.Parameter(torch.zeros(sites, width))

    def forward(self, x_NF: Tensor, site: int) -> Tensor:
        low_NF = x_NF @ self.down_RF.T @ self.up_FR.T + self.bias_F
        scale_F, offset_F = self.scale_SF[site], self.offset_SF[site]
        if self.placement == "before":
            return x_NF + (scale_F * low_NF + offset_F).clamp(min=0)
        return x_NF + scale_F * low_NF.clamp(min=0) + offset_F


class EditorNetwork(nn.Module):
    """Maps normalised (key, value gradient) rows to pseudo rows, both N x (K + V).

    Args:
        width: K + V.
        sites: how many sites share this network.
        settings: size and start.
        seed: of the first factors; the same seed gives the same network.
    """

    def __init__(self, width: int, sites: int, settings: NetworkSettings, seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(width, sites, settings, seed + index) for index in range(settings.blocks)
        )

    def forward(self, x_NF: Tensor, site: int) -> Tensor:
        """Rows of the site with this index among the network's sites."""
        for block in self.blocks:
            x_NF = block(x_NF, site)
        return x_NF
