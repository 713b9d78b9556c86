"""Mean and variance per dimension over a stream of rows.

Shape letters: N rows, F features.

Chan's update of the mean and of M2, the sum of squared distances from it, in float64:

    delta = mean_b - mean,   mean += delta * n_b / n,   M2 += M2_b + delta^2 * n_a * n_b / n    (4)

The published code multiplies the *unbiased* variance of each chunk by its row count, which
inflates the result by n_b / (n_b - 1) and turns one-row chunks into NaN for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-3  # of a deviation, as a share of the root mean square of all


class RunningMoments:
    """Streaming mean and standard deviation: the same for any chunking, right for one row."""

    def __init__(self, width: int):
        self.count = 0
        self.mean_F = torch.zeros(width, dtype=torch.float64)
        self.m2_F = torch.zeros(width, dtype=torch.float64)

    def add(self, rows_NF: Tensor) -> None:
        """Takes in a chunk of rows (any floating dtype; an empty chunk changes nothing)."""
        rows_NF = rows_NF.to(torch.float64)
        count = rows_NF.shape[0]
        if count == 0:
            return
        mean_F = rows_NF.mean(0)
        delta_F = mean_F - self.mean_F
        total = self.count + count
        self.mean_F += delta_F * (count / total)
        self.m2_F += (rows_NF - mean_F).square().sum(0) + delta_F.square() * (
            self.count * count / total
        )
        self.count = total

    def std(self) -> Tensor:
        """Standard deviation, shape F, population form (divided by the row count).

        A dimension that hardly varies is given :data:`FLOOR` times the root mean square over
        all dimensions, so that dividing by it magnifies nothing.  Where none varies, or with
        fewer than two rows, the result is ones.
        """
        if self.count < 2:
            return torch.ones_like(self.m2_F)
        std_F = (self.m2_F / self.count).sqrt()
        varies_F = std_F > 1e-12 * self.mean_F.abs()  # below that it is rounding of the mean
        if not varies_F.any():
            return torch.ones_like(std_F)
        least = FLOOR * std_F.square().mean().sqrt()
        return torch.where(varies_F, std_F.clamp(min=least.item()), least)
