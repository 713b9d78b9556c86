"""Exact factors, and the truncation against whitening, competitors and the plain SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malmend.numerics.truncation import (
    FLOAT32,
    relative_error,
    rounding_floor,
    spectrum,
    truncated,
    within_rank,
)

ROWS, COLUMNS = 9, 14


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(seed=0, rank=COLUMNS, spread=3.0):
    """A second moment whose eigenvalues span orders of magnitude."""
    basis = torch.linalg.qr(random(COLUMNS, COLUMNS, seed=seed + 100))[0]
    values = torch.logspace(0, -spread, COLUMNS, dtype=torch.float64)
    values[rank:] = 0
    return basis @ values.diag() @ basis.T


def product(one):
    left, right = one.halves()
    return left @ right


def cost(shift, kept, metric):
    """|(S - S_r) C^(1/2)|^2, by the definition: the trace."""
    return ((shift - kept) @ metric @ (shift - kept).T).trace().item()


@given(st.integers(1, 6), st.integers(0, 50))
@settings(max_examples=25)
def test_the_spectrum_of_factors_is_that_of_their_product(rank, seed):
    left, right = random(ROWS, rank, seed=seed), random(rank, COLUMNS, seed=seed + 1)
    found = spectrum((left, right))
    whole = torch.linalg.svd(left @ right)
    assert found.rank == rank
    torch.testing.assert_close(found.sizes_R, whole.S[:rank], rtol=1e-10, atol=0)
    torch.testing.assert_close(product(found), left @ right, rtol=0, atol=1e-12)
    for basis in (found.left_VR, found.right_RK.T):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    first, second = found.halves()
    torch.testing.assert_close(first.norm(dim=0), second.norm(dim=1))  # balanced


def test_a_product_of_more_columns_than_the_matrix_has_is_one_too():
    left, right = random(ROWS, 30), random(30, COLUMNS, seed=1)
    found = spectrum((left, right))
    assert found.rank == ROWS
    torch.testing.assert_close(product(found), left @ right)


def test_factors_that_cancel_do_so_in_float64():
    # Two huge directions that nearly cancel: a product of float32 matrices would lose the rest.
    left = torch.cat([1e6 * random(ROWS, 1), -1e6 * random(ROWS, 1) + random(ROWS, 1, seed=2)], 1)
    right = random(1, COLUMNS, seed=3).expand(2, -1)
    wanted = random(ROWS, 1, seed=2) @ random(1, COLUMNS, seed=3)
    torch.testing.assert_close(product(spectrum((left, right))), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rank", [0, 1, 4, ROWS])
def test_rounding_to_float32_adds_no_rank(rank):
    shift = random(ROWS, rank) @ random(rank, COLUMNS, seed=1)
    assert spectrum((shift.float(),)).rank == rank


@pytest.mark.parametrize(("rows", "columns"), [(40, 300), (200, 200), (1, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_noise_stays_under_the_floor_and_is_not_far_under(rows, columns, dtype):
    whole = random(rows, columns)
    noise = torch.linalg.svdvals(whole.to(dtype).double() - whole)[0].item()
    floor = rounding_floor(whole.norm().item(), (rows, columns), torch.finfo(dtype).eps)
    assert floor / 20 < noise < floor / 2


def test_the_floor_by_hand():
    """2^-7 * 5 / sqrt(4 * 100) * (2 + 10), whichever of the two is the longer."""
    assert rounding_floor(5.0, (4, 100), 2**-7) == pytest.approx(3 / 128, rel=1e-15)
    assert rounding_floor(5.0, (100, 4), 2**-7) == pytest.approx(3 / 128, rel=1e-15)


@given(st.integers(1, ROWS - 1), st.integers(0, 50))
@settings(max_examples=25)
def test_truncation_is_the_svd_between_whitening_and_its_inverse(rank, seed):
    shift, metric = random(ROWS, COLUMNS, seed=seed), moment(seed)
    values, basis = torch.linalg.eigh(metric)
    root = basis @ values.sqrt().diag() @ basis.T
    back = basis @ values.rsqrt().diag() @ basis.T
    left, sizes, right = torch.linalg.svd(shift @ root, full_matrices=False)
    wanted = left[:, :rank] @ sizes[:rank].diag() @ right[:rank] @ back
    found = truncated(spectrum((shift,)), metric, rank)
    assert found.rank == rank
    torch.testing.assert_close(product(found), wanted, rtol=0, atol=1e-8)
    # and its cost is the sum of what is left out
    wanted_cost = sizes[rank:].square().sum().item()
    assert cost(shift, product(found), metric) == pytest.approx(wanted_cost, rel=1e-8)


def test_no_competitor_of_the_same_rank_costs_less():
    rank, shift, metric = 4, random(ROWS, COLUMNS, seed=5), moment(5)
    found = truncated(spectrum((shift,)), metric, rank)
    least = cost(shift, product(found), metric)
    left, right = found.halves()
    plain = truncated(spectrum((shift,)), torch.eye(COLUMNS, dtype=torch.float64), rank)
    assert least < 0.9 * cost(shift, product(plain), metric)  # else the metric would not matter
    for seed in range(200):
        size = 10.0 ** -(seed % 5)
        near = (left + size * random(*left.shape, seed=seed)) @ (
            right + size * random(*right.shape, seed=seed + 1000)
        )
        assert cost(shift, near, metric) > least
        # a random column space, with the best right factor for it
        basis = torch.linalg.qr(random(ROWS, rank, seed=seed))[0]
        assert cost(shift, basis @ basis.T @ shift, metric) > least


def test_without_a_metric_it_is_the_plain_svd():
    shift = random(ROWS, COLUMNS)
    left, sizes, right = torch.linalg.svd(shift, full_matrices=False)
    found = truncated(spectrum((shift,)), torch.eye(COLUMNS, dtype=torch.float64), 3)
    torch.testing.assert_close(product(found), left[:, :3] @ sizes[:3].diag() @ right[:3])


def test_a_singular_metric_costs_nothing_where_it_sees_all():
    shift, metric = random(ROWS, COLUMNS), moment(rank=3)
    found = truncated(spectrum((shift,)), metric, 3)
    assert cost(shift, product(found), metric) < 1e-12
    assert relative_error(shift, product(found), metric) < 1e-6
    assert relative_error(shift, product(found)) > 0.1


def test_a_shift_of_no_larger_rank_is_left_as_it_is():
    shift = random(ROWS, 2) @ random(2, COLUMNS, seed=1)
    whole = spectrum((shift,))
    for rank in (2, 5):
        assert truncated(whole, moment(), rank) is whole


def test_relative_errors_by_their_definition():
    shift, kept, metric = random(ROWS, COLUMNS), random(ROWS, COLUMNS, seed=1), moment()
    values, basis = torch.linalg.eigh(metric)
    root = basis @ values.clamp(min=0).sqrt().diag()
    wanted = ((shift - kept) @ root).norm() / (shift @ root).norm()
    assert relative_error(shift, kept, metric) == pytest.approx(wanted.item())
    plain = (shift - kept).norm() / shift.norm()
    assert relative_error(shift, kept) == pytest.approx(plain.item())
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert rounding_floor(0.0, (2, 2), FLOAT32) == 0


def test_rounding_where_no_key_sees_a_shift_makes_no_nan():
    """Its mean square on the keys is rounding then, and of either sign."""
    signs, nothing = set(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for seed in range(20):
        basis_KK = torch.linalg.qr(random(COLUMNS, COLUMNS, seed=seed))[0]
        keys, others = basis_KK[:, :3], basis_KK[:, 3:5]
        shift, metric = random(ROWS, 2, seed=seed) @ others.T, keys @ keys.T
        signs.add(((shift @ metric) * shift).sum().item() < 0)
        assert relative_error(shift, nothing, metric) in (0.0, 1.0)
    assert signs == {True, False}


# --- a projection to a known rank


def of_rank(rank, decay=0.0, noise=0.0, rows=40, columns=70):
    """Singular values over ``decay`` orders of magnitude; of ``noise`` the share, of full rank."""
    sizes = torch.logspace(0, -decay, rank, dtype=torch.float64)
    exact = random(rows, rank, seed=1) * sizes @ random(rank, columns, seed=2)
    other = random(rows, columns, seed=3)
    return exact + noise * exact.norm() / other.norm() * other


@pytest.mark.parametrize(
    ("shift", "bound"),
    [
        (of_rank(12), 12),
        (of_rank(12, decay=10), 12),
        (of_rank(5), 12),
        (of_rank(5, decay=6), 12),
        (of_rank(12, noise=1e-7), 12),
        (of_rank(12, decay=6, noise=1e-9), 12),
        (of_rank(1), 1),
    ],
    ids=["whole", "spread", "deficient", "both", "noise", "spread noise", "one"],
)
def test_within_rank_is_the_decomposition_cut(shift, bound):
    """Against LAPACK's of the whole shift, as float32 halves too: what a patch keeps."""
    left, sizes, right = (one.double() for one in torch.linalg.svd(shift, full_matrices=False))
    found = within_rank(shift, bound)
    assert found.rank == bound
    assert torch.allclose(found.sizes_R, sizes[:bound], rtol=1e-9, atol=1e-12 * sizes[0])
    eye = torch.eye(bound, dtype=torch.float64)
    assert torch.allclose(found.left_VR.T @ found.left_VR, eye, atol=1e-12)
    assert torch.allclose(found.right_RK @ found.right_RK.T, eye, atol=1e-12)
    root = sizes[:bound].sqrt()
    theirs = (left[:, :bound] * root).float(), (root.unsqueeze(1) * right[:bound]).float()
    ours = [one.float() for one in found.halves()]
    error, best = (
        relative_error(shift, one[0].double() @ one[1].double()) for one in (ours, theirs)
    )
    assert error <= 1.05 * best


def test_within_rank_of_nothing():
    for shift, bound in ((torch.zeros(9, 14), 4), (random(9, 14), 0)):
        left, right = within_rank(shift, bound).halves()
        assert left.shape == (9, bound)
        assert right.shape == (bound, 14)
        assert not (left @ right).any()


def test_within_rank_is_the_same_each_time():
    first, again = (within_rank(of_rank(6), 6).halves() for _ in range(2))
    assert all(map(torch.equal, first, again))
