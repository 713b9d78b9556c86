"""A second moment in little room, against the best approximation there is."""

from __future__ import annotations

import pytest
import torch

from malmend.errors import MalmendError
from malmend.numerics.lowrank import compressed, restored


def moment(width: int = 40, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows_NK = torch.randn(200, width, generator=generator, dtype=torch.float64)
    rows_NK *= torch.logspace(0, -2, width, dtype=torch.float64)  # a spectrum that falls
    return scale * rows_NK.T @ rows_NK / 200


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_it_is_as_near_as_the_truncated_singular_values(rank):
    """Eckart and Young: off the diagonal nothing of this rank is much nearer."""
    moment_KK = moment()
    left, values, right = torch.linalg.svd(moment_KK)
    best_KK = left[:, :rank] * values[:rank] @ right[:rank]
    found_KK = restored(*compressed(moment_KK, rank)).double()
    most = (best_KK - moment_KK).norm() + 2**-9 * moment_KK.norm()
    assert (found_KK - moment_KK).norm() < most


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rank", [5, 40, 100])
def test_diagonal_and_definiteness_are_kept(rank, scale):
    moment_KK = moment(scale=scale)
    factor_KR, rest_K = compressed(moment_KK, rank)
    assert factor_KR.shape == (40, min(rank, 40))
    found_KK = restored(factor_KR, rest_K)
    assert found_KK.dtype == torch.float32
    wanted_K = moment_KK.diagonal()
    assert (found_KK.double().diagonal() - wanted_K).abs().max() < 2**-9 * wanted_K.max()
    assert torch.linalg.eigvalsh(found_KK.double()).min() > -1e-6 * wanted_K.max()


def test_of_full_rank_it_is_the_moment():
    moment_KK = moment()
    found_KK = restored(*compressed(moment_KK, 40)).double()
    assert (found_KK - moment_KK).norm() < 2**-9 * moment_KK.norm()


def test_an_eigenvalue_whose_root_float16_does_not_hold_is_refused():
    # It became infinity, and the moment NaN.
    held_KK = torch.diag(torch.tensor([4.2e9, 1.0, 1.0], dtype=torch.float64))
    found_KK = restored(*compressed(held_KK, 2)).double()
    torch.testing.assert_close(found_KK, held_KK, rtol=2**-9, atol=0)
    with pytest.raises(MalmendError, match=r"eigenvalue of 5\.0e\+09, expected 4\.3e\+09 at most"):
        compressed(torch.diag(torch.tensor([5e9, 1.0, 1.0], dtype=torch.float64)), 2)


def test_what_is_left_of_the_diagonal_is_never_below_0():
    """Half precision rounds some of F's rows up, beyond the diagonal."""
    moment_KK = moment()
    factor_KR, rest_K = compressed(moment_KK, 40)
    over_K = factor_KR.double().square().sum(1) - moment_KK.diagonal()
    assert (over_K > 1e-9).any()
    assert (over_K < -1e-9).any()
    assert (rest_K >= 0).all()
