"""The precision of the prior of a shift, and the factor of a positive definite matrix.

    P = sum_i w_i C_i + lambda * I                                        of equation (1), ridge.py

Shape letters: K key width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from malmend.errors import MalmendError

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Prior:
    """The precision P = sum_i w_i C_i + lambda * I of equation (1).

    Each C_i (K x K, positive semidefinite) is the mean of k k^T over keys that the shift should
    leave alone, each weight w_i >= 0 a plain number, and ``ridge`` is lambda >= 0.  No matrix at
    all is MALMEN as published.  ``device`` is where systems with it are solved; it has float64.
    """

    ridge: float
    weights: tuple[float, ...] = ()
    matrices_KK: tuple[Tensor, ...] = ()
    device: torch.device = CPU

    @property
    def is_identity(self) -> bool:
        """Whether P is a multiple of the identity."""
        return not any(self.weights)

    @property
    def is_zero(self) -> bool:
        """Whether nothing regularises."""
        return self.is_identity and self.ridge == 0.0

    def add_to(self, gram_KK: Tensor) -> Tensor:
        """``gram_KK`` (float64, overwritten) plus P."""
        for weight, matrix_KK in zip(self.weights, self.matrices_KK, strict=True):
            if weight != 0.0:
                there_KK = matrix_KK.to(gram_KK.device)  # narrow over the bus
                gram_KK.add_(there_KK.to(gram_KK.dtype), alpha=weight)
        gram_KK.diagonal().add_(self.ridge)
        return gram_KK

    def factor(self) -> Tensor:
        """The lower Cholesky factor of P, K x K; of matrices."""
        zeros_KK = self.matrices_KK[0].new_zeros(
            self.matrices_KK[0].shape, dtype=torch.float64, device=self.device
        )
        return cholesky(self.add_to(zeros_KK), self.ridge)

    @cached_property
    def factor_KK(self) -> Tensor:
        """:meth:`factor`, kept for the dual form."""
        return self.factor()


@dataclass(frozen=True)
class PriorGrads:
    """dL/dw_i and dL/dlambda: ordinary derivatives, not with respect to the logarithms."""

    weights: tuple[float, ...]
    ridge: float

    def shared(self, count: int) -> PriorGrads:
        """The part that each of ``count`` processes adds, where all have found the whole."""
        return PriorGrads(tuple(one / count for one in self.weights), self.ridge / count)


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The lower factor of a symmetric positive definite float64 matrix.

    Where ``ridge``, which is on its diagonal, is lost in rounding, a tiny positive pivot may stand
    where the exact one is 0; then pivots that are nothing beside their own diagonal entry count as
    0 too.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)  # reads the lower triangle alone
    if info.item() != 0 or not torch.isfinite(factor).all():
        _check_finite(matrix)
    diagonal, eps = matrix.diagonal(), torch.finfo(torch.float64).eps
    least = 8 * matrix.shape[0] * eps * diagonal
    unheld = bool(ridge <= eps * diagonal.max())
    lost = unheld and bool((factor.diagonal().square() <= least).any())
    if info.item() != 0 or lost:
        raise MalmendError(
            f"The least-squares system of size {matrix.shape[0]} is singular: its keys depend on "
            "one another and the prior does not hold them; use lambda > 0 or a covariance prior."
        )
    return factor


def _check_finite(matrix: Tensor) -> None:
    if not torch.isfinite(matrix).all():
        raise MalmendError(
            "The captured keys hold NaN or infinity, expected finite numbers; "
            "load the model in float32, or leave out the layers that overflow."
        )
