"""Least squares with a prior: from keys and value differences to one weight shift, and back.

Shape letters: N tokens, K key width (the layer's input), V value width (its output).

The problem (MALMEN, section 4.1, with the prior precision P in place of lambda * I):

    minimise over S    |S U - D|^2 + tr(S P S^T),     P = sum_i w_i C_i + lambda * I       (1)

with U = keys_NK^T and D = diffs_NV^T.  Its solution, with A = U U^T + P, is

    S = D U^T A^-1                                        the primal form, one K x K factor  (2)
      = D (I + U^T P^-1 U)^-1 U^T P^-1                    the dual form, one N x N factor    (3)

and, for P = lambda * I, S = D (U^T U + lambda * I)^-1 U^T, which at lambda = 0 is the
minimum-norm solution where the primal form is singular.  The primal is used when N >= K, with
matrices, whose factor the dual needs besides, when N >= K / 2, and where the tokens are spread over
processes: A and D U^T are sums over tokens, so each process adds its own and all solve the same
system.

Everything here is float64, whatever comes in: squared key norms of 5e6 beside eigenvalues of 1e-2
(an attention-sink token beside a direction that text hardly uses) exceed what float32 holds.
It runs on the prior's device; rows stay where they are and come a few thousand at a time, and what
is found goes back to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.numerics.chunks import chunks

Summed = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")
ROWS = 4096  # that are made float64 at once
BLOCK = 384  # columns of a block of the Gram matrix


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
                gram_KK.add_(matrix_KK.to(gram_KK), alpha=weight)
        gram_KK.diagonal().add_(self.ridge)
        return gram_KK

    @cached_property
    def factor_KK(self) -> Tensor:
        """The lower Cholesky factor of P, for the dual form with matrices."""
        zeros_KK = self.matrices_KK[0].new_zeros(
            self.matrices_KK[0].shape, dtype=torch.float64, device=self.device
        )
        return _cholesky(self.add_to(zeros_KK), self.ridge)


@dataclass(frozen=True)
class PriorGrads:
    """dL/dw_i and dL/dlambda: ordinary derivatives, not with respect to the logarithms."""

    weights: tuple[float, ...]
    ridge: float

    def shared(self, count: int) -> PriorGrads:
        """The part that each of ``count`` processes adds, where all have found the whole."""
        return PriorGrads(tuple(one / count for one in self.weights), self.ridge / count)


class RidgeFactor:
    """One Cholesky factor that serves the edit and its meta-gradient.

    The published code factorises the same matrix twice per step by LU; here it is made once.

    Args:
        keys_NK: U^T, any floating dtype, at least one row; of the tokens of this process.
        prior: P of equation (1).
        weights_N: of the rows, w_j > 0 of equation (14), float64; None for ones.
        summed: the sum of a tensor over processes; None where all tokens are here.

    In the primal form rows are made float64 a few at a time: beside the keys that are given, memory
    does not grow with N.

    Raises:
        MalmendError: the system is singular (lambda = 0 with dependent keys and no prior), or the
            keys hold NaN or infinity.
    """

    def __init__(
        self,
        keys_NK: Tensor,
        prior: Prior,
        weights_N: Tensor | None = None,
        summed: Summed | None = None,
    ):
        count, width = keys_NK.shape
        self.keys_NK, self.prior = keys_NK, prior
        self._weights_N1 = None if weights_N is None else self._wide(weights_N).unsqueeze(1)
        self._summed = summed or (lambda tensor: tensor)
        few = count < width if prior.is_identity else 2 * count < width
        self.is_dual = few and summed is None
        if not self.is_dual:
            gram_KK = prior.add_to(self._summed(self._lower_gram()))
            self._factor = _cholesky(gram_KK, prior.ridge)
            return
        # Rows sqrt(w_j) u_j.  Rows of whitened_NK are P^-1/2 times these; for P = lambda * I the
        # scaling is left out, so that lambda = 0 is allowed: U^T U + lambda * I in place of
        # I + U^T U / lambda.
        rows_NK = self._rooted(keys_NK)
        if prior.is_identity:
            self._readout_NK = rows_NK
            gram_NN = rows_NK @ rows_NK.T
            gram_NN.diagonal().add_(prior.ridge)
        else:
            whitened_KN = torch.linalg.solve_triangular(prior.factor_KK, rows_NK.T, upper=False)
            gram_NN = whitened_KN.T @ whitened_KN
            gram_NN.diagonal().add_(1.0)
            self._readout_NK = torch.linalg.solve_triangular(
                prior.factor_KK.T, whitened_KN, upper=True
            ).T
        self._factor = _cholesky(gram_NN, prior.ridge if prior.is_identity else 1.0)

    def _wide(self, part: Tensor) -> Tensor:
        """In float64, where the system is solved."""
        return part.to(self.prior.device).to(torch.float64)  # narrow over the bus

    def _back(self, found: Tensor) -> Tensor:
        """Where the rows are."""
        return found.to(self.keys_NK.device)

    def _weighted(self, part_NX: Tensor, rows: slice) -> Tensor:
        """Rows times w_j; the same tensor where all weights are one."""
        return part_NX if self._weights_N1 is None else part_NX * self._weights_N1[rows]

    def _rooted(self, all_NX: Tensor) -> Tensor:
        """Rows times sqrt(w_j), in float64."""
        wide_NX = self._wide(all_NX)
        return wide_NX if self._weights_N1 is None else wide_NX * self._weights_N1.sqrt()

    def _lower_gram(self) -> Tensor:
        """sum_j w_j u_j u_j^T, K x K, in float64: a factor reads no more than its lower triangle.

        What lies above the blocks of the diagonal stays zero, a third of the work and more.
        """
        width = self.keys_NK.shape[1]
        total_KK = torch.zeros(width, width, dtype=torch.float64, device=self.prior.device)
        for rows in chunks(len(self.keys_NK), ROWS):
            plain_NK = self._wide(self.keys_NK[rows])
            weighted_KN = self._weighted(plain_NK, rows).T
            for start in range(0, width, BLOCK):
                block = slice(start, start + BLOCK)
                total_KK[start:, block].addmm_(weighted_KN[start:], plain_NK[:, block])
        return total_KK

    def _sum_with(self, others_NV: Tensor) -> Tensor:
        """The sum over rows of w_j u_j x_j^T, K x V, in float64."""
        shape = self.keys_NK.shape[1], others_NV.shape[1]
        total_KV = torch.zeros(shape, dtype=torch.float64, device=self.prior.device)
        for rows in chunks(len(self.keys_NK), ROWS):
            weighted_NV = self._weighted(self._wide(others_NV[rows]), rows)
            total_KV.addmm_(self._wide(self.keys_NK[rows]).T, weighted_NV)
        return total_KV

    def shift(self, diffs_NV: Tensor) -> Tensor:
        """S of equation (2) or (3) in float64, shape V x K."""
        return self._back(self._shift(diffs_NV))

    def _shift(self, diffs_NV: Tensor) -> Tensor:
        if self.is_dual:
            asked_NV = self._rooted(diffs_NV)
            return torch.cholesky_solve(asked_NV, self._factor).T @ self._readout_NK
        asked_KV = self._summed(self._sum_with(diffs_NV))
        return torch.cholesky_solve(asked_KV, self._factor).T

    def diff_grads(self, shift_grad_VK: Tensor) -> Tensor:
        """dL/dD^T, shape N x V, from G = dL/dS: with M = G A^-1, rows w_j M u_j (Theorem 1)."""
        grad_VK = self._wide(shift_grad_VK)
        if self.is_dual:
            solved_NV = torch.cholesky_solve(self._readout_NK @ grad_VK.T, self._factor)
            return self._back(self._rooted(solved_NV))
        adjoint_KV = torch.cholesky_solve(grad_VK.T, self._factor)
        shape = len(self.keys_NK), len(grad_VK)
        grads_NV = self.keys_NK.new_empty(shape, dtype=torch.float64)
        for rows in chunks(len(self.keys_NK), ROWS):
            plain_NV = self._wide(self.keys_NK[rows]) @ adjoint_KV
            grads_NV[rows] = self._back(self._weighted(plain_NV, rows))
        return grads_NV

    def weight_grads(self, diff_grads_NV: Tensor, diffs_NV: Tensor) -> Tensor:
        """dL/dw_j = <d_j - S u_j, M u_j>, shape N (equation 14), from :meth:`diff_grads`."""
        shift_KV = self._shift(diffs_NV).T
        parts = []
        for rows in chunks(len(diffs_NV), ROWS):
            said_NV = self._wide(self.keys_NK[rows]) @ shift_KV
            missed_NV = self._wide(diffs_NV[rows]) - said_NV
            parts.append((missed_NV * self._wide(diff_grads_NV[rows])).sum(1))
        by_row_N = torch.cat(parts)
        if self._weights_N1 is not None:
            by_row_N = by_row_N / self._weights_N1.squeeze(1)
        return self._back(by_row_N)

    def prior_grads(self, shift_grad_VK: Tensor, diffs_NV: Tensor) -> PriorGrads:
        """dL/dlambda = -<M, S> (Theorem 2) and dL/dw_i = -<M C_i, S>.

        Algorithm 2 of the paper prints tr(M S) for the first, which misses a transpose.
        """
        grad_VK = self._wide(shift_grad_VK)
        if self.is_dual and self.prior.is_identity and not self.prior.matrices_KK:
            # -<dL/dD (U^T U + lambda)^-1, D>: defined at lambda = 0 too.
            by_row_NV = torch.cholesky_solve(self._readout_NK @ grad_VK.T, self._factor)
            solved_NV = torch.cholesky_solve(by_row_NV, self._factor)
            asked_NV = self._rooted(diffs_NV)
            return PriorGrads((), -(solved_NV * asked_NV).sum().item())
        shift_VK = self._shift(diffs_NV)
        if self.is_dual:
            # M P = G - (dL/dD) U^T, because A = U U^T + P.
            asked_NV = self._wide(self.diff_grads(grad_VK))
            rest_VK = grad_VK - asked_NV.T @ self._wide(self.keys_NK)
            adjoint_VK = (
                rest_VK / self.prior.ridge
                if self.prior.is_identity
                else torch.cholesky_solve(rest_VK.T, self.prior.factor_KK).T
            )
        else:
            adjoint_VK = torch.cholesky_solve(grad_VK.T, self._factor).T
        weights = tuple(
            -(adjoint_VK @ self._wide(matrix_KK) * shift_VK).sum().item()
            for matrix_KK in self.prior.matrices_KK
        )
        return PriorGrads(weights, -(adjoint_VK * shift_VK).sum().item())


def solved(gram_KK: Tensor, cross_VK: Tensor, prior: Prior) -> Tensor:
    """S of equation (2) in float64, shape V x K, from the sums U U^T and D U^T (float64).

    Raises:
        MalmendError: as :class:`RidgeFactor`.
    """
    factor = _cholesky(prior.add_to(gram_KK.clone()), prior.ridge)
    return torch.cholesky_solve(cross_VK.T, factor).T


def mean_residual(shift_VK: Tensor, keys_NK: Tensor, diffs_NV: Tensor) -> float:
    """Mean over tokens of |S u_j - d_j| / |d_j| (MALMEN, section 5.2); d = 0 is left out.

    It is found where the shift is.
    """
    total, count, shift_KV = 0.0, 0, shift_VK.to(torch.float64).T
    for rows in chunks(len(keys_NK), ROWS):
        asked_NV = diffs_NV[rows].to(shift_KV.device).to(torch.float64)
        keys_RK = keys_NK[rows].to(shift_KV.device).to(torch.float64)
        miss_N = (keys_RK @ shift_KV - asked_NV).norm(dim=1)
        size_N = asked_NV.norm(dim=1)
        asked = size_N > 0
        total += (miss_N[asked] / size_N[asked]).sum().item()
        count += int(asked.sum())
    return total / count if count else 0.0


def _cholesky(matrix: Tensor, ridge: float) -> Tensor:
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
