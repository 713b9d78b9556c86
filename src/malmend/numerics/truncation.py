"""A shift as two factors: exact at its own rank, or cut to a smaller one where it costs least.

Shape letters: V value width, K key width, R rank.

    S = A diag(s) B,   A^T A = B B^T = I                                                       (S1)
    S_r = U_r U_r^T S,  U_r the r largest eigenvectors of S C S^T                               (S2)

S_r minimises |(S - S_r) C^(1/2)| over all matrices of rank r (Eckart and Young, with C^(1/2)
folded into S and out again), so no inverse of C is taken and C may be singular.  With C the second
moment of keys, |(S - S_r) C^(1/2)|^2 is the mean of |S k - S_r k|^2: what the cut changes of a
layer's output.  C = I gives the plain SVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32).eps  # what patches and adapters are kept in


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition of a shift, float64, without what is rounding."""

    left_VR: Tensor
    sizes_R: Tensor
    right_RK: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return len(self.sizes_R)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Factors V x R and R x K of equal size, whose product is the shift."""
        root_R = self.sizes_R.sqrt()
        return self.left_VR * root_R, root_R.unsqueeze(1) * self.right_RK


def spectrum(factors: Sequence[Tensor]) -> Spectrum:
    """Equation (S1) of a shift, or of a product (left, right) without forming it.

    Singular values that are lost when the shift is rounded to float32 are left out: those under
    :func:`rounding_floor` of the shift.

    Args:
        factors: the shift (V x K), or left (V x R) and right (R x K).
    """
    if len(factors) == 1:
        left_VR, sizes_R, right_RK = torch.linalg.svd(factors[0].double(), full_matrices=False)
    else:
        first, second = (one.double() for one in factors)
        outer_VR, inner_RR = torch.linalg.qr(first)
        outer_KR, other_RR = torch.linalg.qr(second.T)
        turn_RR, sizes_R, back_RR = torch.linalg.svd(inner_RR @ other_RR.T, full_matrices=False)
        left_VR, right_RK = outer_VR @ turn_RR, back_RR @ outer_KR.T
    floor = rounding_floor(sizes_R.norm().item(), (len(left_VR), right_RK.shape[1]), FLOAT32)
    kept = int((sizes_R > floor).sum())
    return Spectrum(left_VR[:, :kept], sizes_R[:kept], right_RK[:kept])


def within_rank(shift_VK: Tensor, rank: int) -> Spectrum:
    """Equation (S1) of a shift of no higher rank than this, from a projection to that many columns.

    Q spans S S^T S W of a random W, so it holds all that S gives, and of rounding in S beyond the
    rank hardly anything: S's own decomposition takes ten times as long (1,024 x 4,096, rank 256).
    """
    shift_VK = shift_VK.double()
    generator = torch.Generator().manual_seed(0)  # the same factors of the same shift
    drawn_KR = torch.randn(shift_VK.shape[1], rank, dtype=torch.float64, generator=generator)
    basis_VR = torch.linalg.qr(shift_VK @ drawn_KR.to(shift_VK.device))[0]
    basis_VR = torch.linalg.qr(shift_VK @ (shift_VK.T @ basis_VR))[0]
    turn_RR, sizes_R, right_RK = torch.linalg.svd(basis_VR.T @ shift_VK, full_matrices=False)
    return Spectrum(basis_VR @ turn_RR, sizes_R, right_RK)


def rounding_floor(norm: float, shape: tuple[int, int], eps: float) -> float:
    """What no singular value of a matrix's rounding noise exceeds:

        eps * |W| / sqrt(V K) * (sqrt(V) + sqrt(K))                                            (S3)

    the edge of the spectrum of independent noise (Marchenko and Pastur) of size eps * rms(W), with
    eps the spacing of the precision; rounding makes less than a third of that.

    Args:
        norm: |W|, Frobenius.
        shape: V and K.
        eps: of the precision that the matrix was rounded to.
    """
    rows, columns = shape
    return eps * norm / (rows * columns) ** 0.5 * (rows**0.5 + columns**0.5)


def truncated(whole: Spectrum, moment_KK: Tensor, rank: int) -> Spectrum:
    """Equation (S2), in float64; the shift itself where its rank is no larger.

    Args:
        whole: the shift.
        moment_KK: C, positive semidefinite.
        rank: of the result, 1 or more.
    """
    if whole.rank <= rank:
        return whole
    wide_RK = whole.sizes_R.unsqueeze(1) * whole.right_RK
    # In the shift's own column space, so that the eigenproblem is R x R.
    seen_RR = wide_RK @ moment_KK.double() @ wide_RK.T
    _, vectors_RR = torch.linalg.eigh((seen_RR + seen_RR.T) / 2)
    top_RR = vectors_RR[:, -rank:]
    return spectrum((whole.left_VR @ top_RR, top_RR.T @ wide_RK))


def relative_error(shift_VK: Tensor, kept_VK: Tensor, moment_KK: Tensor | None = None) -> float:
    """|(S - S_r) C^(1/2)| / |S C^(1/2)|, Frobenius; without C the plain |S - S_r| / |S|.  0 to 1.

    0 where S does nothing on C.
    """
    sizes = []
    for matrix in (shift_VK.double() - kept_VK.double(), shift_VK.double()):
        seen = matrix if moment_KK is None else matrix @ moment_KK.double()
        sizes.append((seen * matrix).sum().clamp(min=0).sqrt().item())
    return sizes[0] / sizes[1] if sizes[1] else 0.0
