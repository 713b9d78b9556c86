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
from typing import NamedTuple

import torch
from torch import Tensor

from malmend.errors import MalmendError
from malmend.numerics.chunks import chunks
from malmend.numerics.prior import Prior, PriorGrads, cholesky

Summed = Callable[[Tensor], Tensor]
ROWS = 4096  # that are made float64 at once
BLOCK = 384  # rows or columns of a K x K matrix that are taken at once


class RidgeGrads(NamedTuple):
    """What depends on G = dL/dS, all in float64.

    Attributes:
        diffs_NV: dL/dD^T, where the rows are.
        weights_N: dL/dw_j of the rows' weights; None where these are ones.
        prior: of lambda and of the prior's weights.
    """

    diffs_NV: Tensor
    weights_N: Tensor | None
    prior: PriorGrads


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
            self._factor = cholesky(gram_KK, prior.ridge)
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
        self._factor = cholesky(gram_NN, prior.ridge if prior.is_identity else 1.0)

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

    def backward(self, shift_grad_VK: Tensor, diffs_NV: Tensor, shift_VK: Tensor) -> RidgeGrads:
        """All that S depends on, from G = dL/dS.  With M = G A^-1:

            dL/dd_j = w_j M u_j (Theorem 1),       dL/dw_j = <d_j - S u_j, M u_j> of a row,
            dL/dlambda = -<M, S> (Theorem 2),      dL/dw_i = -<M C_i, S> of the prior

        Algorithm 2 of the paper prints tr(M S) for the third, which misses a transpose.

        Args:
            shift_grad_VK: G.
            diffs_NV: D^T, as :meth:`shift` was given it.
            shift_VK: S, as it found it.

        Raises:
            MalmendError: nothing regularises, so that the shift jumps where a weight leaves 0.
        """
        grad_VK, shift_VK = self._wide(shift_grad_VK), self._wide(shift_VK)
        if not self.is_dual:
            adjoint_KV = torch.cholesky_solve(grad_VK.T, self._factor)
            by_row = self._by_row(diffs_NV, shift_VK, lambda _, keys_NK: keys_NK @ adjoint_KV)
            return RidgeGrads(*by_row, self._by_prior(adjoint_KV, shift_VK))
        # Rows sqrt(w_j) M u_j.
        rooted_NV = torch.cholesky_solve(self._readout_NK @ grad_VK.T, self._factor)
        asks_NV = rooted_NV if self._weights_N1 is None else rooted_NV / self._weights_N1.sqrt()
        by_row = self._by_row(diffs_NV, shift_VK, lambda rows, _: asks_NV[rows])
        if not self.prior.matrices_KK:
            # -<dL/dD (U^T U + lambda)^-1, D>: defined at lambda = 0 too.
            again_NV = torch.cholesky_solve(rooted_NV, self._factor)
            by_ridge = -(again_NV * self._rooted(diffs_NV)).sum().item()
            return RidgeGrads(*by_row, PriorGrads((), by_ridge))
        if self.prior.is_zero:
            raise MalmendError(
                f"A prior whose lambda and weights are all 0 has no gradient by them with "
                f"{len(self.keys_NK)} tokens, expected {self.keys_NK.shape[1]} or more, the keys' "
                "width; use lambda > 0 or a weight above 0."
            )
        # M P = G - (dL/dD) U^T, because A = U U^T + P.
        rest_KV = grad_VK.T - self._wide(self.keys_NK).T @ self._rooted(rooted_NV)
        adjoint_KV = (
            rest_KV / self.prior.ridge
            if self.prior.is_identity
            else torch.cholesky_solve(rest_KV, self.prior.factor_KK)
        )
        return RidgeGrads(*by_row, self._by_prior(adjoint_KV, shift_VK))

    def _by_row(
        self, diffs_NV: Tensor, shift_VK: Tensor, asks: Callable[[slice, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """dL/dD^T and, where rows have weights, dL/dw_j; ``asks`` gives M u_j of some rows."""
        by_diff_NV = self.keys_NK.new_empty(diffs_NV.shape, dtype=torch.float64)
        by_weight_N = by_diff_NV.new_empty(len(diffs_NV))
        for rows in chunks(len(diffs_NV), ROWS):
            keys_NK = self._wide(self.keys_NK[rows])
            asks_NV = asks(rows, keys_NK)
            by_diff_NV[rows] = self._back(self._weighted(asks_NV, rows))
            if self._weights_N1 is not None:
                missed_NV = self._wide(diffs_NV[rows]) - keys_NK @ shift_VK.T
                by_weight_N[rows] = self._back((missed_NV * asks_NV).sum(1))
        return by_diff_NV, None if self._weights_N1 is None else by_weight_N

    def _by_prior(self, adjoint_KV: Tensor, shift_VK: Tensor) -> PriorGrads:
        """dL/dlambda and dL/dw_i, from M^T and <M C_i, S> = <C_i, M^T S>: one product for all."""
        if not self.prior.matrices_KK:
            return PriorGrads((), -(adjoint_KV * shift_VK.T).sum().item())
        cross_KK = adjoint_KV @ shift_VK
        weights = tuple(
            -sum(
                (self._wide(matrix_KK[rows]) * cross_KK[rows]).sum().item()
                for rows in chunks(len(cross_KK), BLOCK)
            )
            for matrix_KK in self.prior.matrices_KK
        )
        return PriorGrads(weights, -cross_KK.trace().item())


def solved(gram_KK: Tensor, cross_VK: Tensor, prior: Prior) -> Tensor:
    """S of equation (2) in float64, shape V x K, from the sums U U^T and D U^T (float64).

    Raises:
        MalmendError: as :class:`RidgeFactor`.
    """
    factor = cholesky(prior.add_to(gram_KK.clone()), prior.ridge)
    return torch.cholesky_solve(cross_VK.T, factor).T


def residuals(shift_VK: Tensor, keys_NK: Tensor, diffs_NV: Tensor) -> tuple[float, int]:
    """The sum over tokens of |S u_j - d_j| / |d_j| (MALMEN, section 5.2), and of how many.

    Tokens with d = 0 are left out of both.  It is found where the shift is.
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
    return total, count
