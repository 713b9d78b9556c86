"""A second moment in little room: its largest eigenvectors in half precision, and a diagonal.

Shape letters: K width, R rank.

    C  ~  F F^T + diag(r),    F = V_R sqrt(Lambda_R),    r = max(0, diag(C - F F^T))           (16)

with V_R, Lambda_R the R largest eigenpairs.  What stands for C is positive semidefinite again, and
has its diagonal to half precision, so the sum over directions of what a shift costs is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from malmend.errors import MalmendError


def compressed(moment_KK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """F (K x R, float16) and r (K, float32) of equation (16); R is ``rank``, or K if less.

    Raises:
        MalmendError: float16 does not hold the root of an eigenvalue.
    """
    values_K, vectors_KK = torch.linalg.eigh(moment_KK.double())
    kept = slice(max(0, len(values_K) - rank), None)
    factor_KR = (vectors_KK[:, kept] * values_K[kept].clamp(min=0).sqrt()).half()
    if factor_KR.isinf().any():
        most = torch.finfo(torch.float16).max ** 2
        raise MalmendError(
            f"The second moment has an eigenvalue of {values_K[-1]:.1e}, expected {most:.1e} at "
            "most, whose root float16 holds; save the editor in full (slim=False)."
        )
    rest_K = (moment_KK.double() - _square(factor_KR)).diagonal().clamp(min=0)
    return factor_KR.contiguous(), rest_K.float()


def restored(factor_KR: Tensor, rest_K: Tensor) -> Tensor:
    """F F^T + diag(r), K x K, float32."""
    return (_square(factor_KR) + rest_K.double().diag()).float()


def _square(factor_KR: Tensor) -> Tensor:
    wide_KR = factor_KR.double()
    return wide_KR @ wide_KR.T
