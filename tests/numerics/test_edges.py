"""Both sides of a bound, and what rounding leaves beyond one, by hand."""

from __future__ import annotations

import pytest
import torch

from malmend.numerics.lowrank import compressed, restored
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor

K = 8


@pytest.mark.parametrize("is_identity", [True, False])
def test_few_tokens_are_fewer_than_K_or_with_matrices_than_half_of_it(is_identity):
    generator = torch.Generator().manual_seed(0)
    prior = Prior(0.3) if is_identity else Prior(0.3, (1.0,), (torch.eye(K, dtype=torch.float64),))
    duals = [
        tokens
        for tokens in range(1, 2 * K)
        if RidgeFactor(torch.randn(tokens, K, generator=generator).double(), prior).is_dual
    ]
    assert duals == list(range(1, K if is_identity else K // 2))


@pytest.mark.parametrize("rank", [1, 2])
def test_what_rounding_left_below_zero_of_a_moment_is_nothing(rank):
    """As an eigenvalue, and as what the diagonal has beside the largest ones."""
    moment_KK = torch.tensor([4.0, -0.25], dtype=torch.float64).diag()
    assert torch.equal(restored(*compressed(moment_KK, rank)), torch.tensor([4.0, 0.0]).diag())
