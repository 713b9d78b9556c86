"""The least-squares solution against other ways to find it: stacked lstsq, autograd, differences.

Shape letters: N tokens, K key width, V value width.

The systems here have condition numbers below 1e4, so that two float64 methods agree to about
1e4 * 1e-16; EXACT leaves a factor of a hundred.  Wider tolerances state their reason.
"""

from __future__ import annotations

import pytest
import torch

from malmend.errors import MalmendError
from malmend.numerics import ridge
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor, residuals

EXACT = {"rtol": 1e-10, "atol": 1e-10}
K, V = 6, 4
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 3, 5, K, 9])
# Rank of each C_i and its weight; a rank below K is a singular matrix.
TERMS: dict[str, tuple[tuple[int, float], ...]] = {
    "identity": (),
    "full": ((3 * K, 1.7),),
    "singular": ((2, 1.7),),
    "two": ((3 * K, 1.7), (2, 0.4)),
    "three": ((2, 0.6), (3 * K, 1.7), (1, 5.0)),
    "one of weight zero": ((3 * K, 0.0),),
    "the first of weight zero": ((3 * K, 0.0), (2, 0.4)),
    "the middle one of weight zero": ((2, 0.6), (3 * K, 0.0), (1, 5.0)),
    "three of weight zero": ((2, 0.0), (3 * K, 0.0), (1, 0.0)),
}
PRIORS = pytest.mark.parametrize("prior_name", TERMS)


@pytest.fixture(autouse=True, params=[4, 1000], ids=["in blocks", "whole"])
def _blocks(request, monkeypatch):
    """K is far below the size of a block, and the Gram matrix is made in blocks."""
    monkeypatch.setattr(ridge, "BLOCK", request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(rank: int, seed: int = 7) -> torch.Tensor:
    rows = normal(rank, K, seed=seed)
    return rows.T @ rows / rank


def make_prior(name: str, ridge: float = 0.3) -> Prior:
    terms = TERMS[name]
    return Prior(
        ridge,
        tuple(weight for _, weight in terms),
        tuple(moment(rank, seed=7 + index) for index, (rank, _) in enumerate(terms)),
    )


def precision(prior: Prior) -> torch.Tensor:
    total = prior.ridge * torch.eye(K, dtype=torch.float64)
    for weight, matrix in zip(prior.weights, prior.matrices_KK, strict=True):
        total = total + weight * matrix
    return total


def problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys N x K, differences N x V, and a gradient of some loss with respect to the shift."""
    return normal(tokens, K, seed=1), normal(tokens, V, seed=2), normal(V, K, seed=3)


def stacked(keys_NK: torch.Tensor, diffs_NV: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """min |S U - D|^2 + tr(S P S^T) as one least-squares problem: rows of P^1/2 under the keys."""
    values, vectors = torch.linalg.eigh(matrix)
    root = (vectors * values.clamp(min=0).sqrt()).T
    targets = torch.cat([diffs_NV, torch.zeros(K, V, dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([keys_NK, root]), targets, driver="gelsd").solution.T


def solved(keys_NK, diffs_NV, ridge, weights, matrices_KK) -> torch.Tensor:
    """The shift by plain operations that autograd can follow."""
    matrix = keys_NK.T @ keys_NK + ridge * torch.eye(K, dtype=torch.float64)
    for weight, term in zip(weights, matrices_KK, strict=True):
        matrix = matrix + weight * term
    return torch.linalg.solve(matrix, keys_NK.T @ diffs_NV).T


def padded(keys_NK: torch.Tensor) -> torch.Tensor:
    """The same problem in at least K tokens, so in the primal form: zero keys ask for nothing."""
    return torch.cat([keys_NK, torch.zeros(K, K, dtype=keys_NK.dtype)])


# --- the shift


@TOKENS
@PRIORS
def test_shift_solves_the_stacked_problem(tokens, prior_name):
    keys, diffs, _ = problem(tokens)
    prior = make_prior(prior_name)
    factor = RidgeFactor(keys, prior)
    expected = stacked(keys, diffs, precision(prior))
    assert factor.is_dual == (tokens < (K if prior.is_identity else K / 2))
    assert factor.shift(diffs).dtype == torch.float64
    torch.testing.assert_close(factor.shift(diffs), expected, **EXACT)


@pytest.mark.parametrize("prior_name", ["full", "three"])
@pytest.mark.parametrize("tokens", [4, 9])
def test_shift_is_the_minimum(tokens, prior_name):
    keys, diffs, _ = problem(tokens)
    prior = make_prior(prior_name)

    def objective(shift_VK):
        penalty = (shift_VK @ precision(prior) * shift_VK).sum()
        return (shift_VK @ keys.T - diffs.T).square().sum() + penalty

    best = RidgeFactor(keys, prior).shift(diffs)
    for seed in range(5):
        assert objective(best + 1e-3 * normal(V, K, seed=seed)) > objective(best)


@TOKENS
@PRIORS
def test_primal_equals_dual(tokens, prior_name):
    keys, diffs, grad = problem(tokens)
    prior = make_prior(prior_name)
    one, other = RidgeFactor(keys, prior), RidgeFactor(padded(keys), prior)
    more = torch.cat([diffs, torch.zeros(K, V, dtype=torch.float64)])
    assert not other.is_dual
    torch.testing.assert_close(one.shift(diffs), other.shift(more), **EXACT)
    here = one.backward(grad, diffs, one.shift(diffs))
    there = other.backward(grad, more, other.shift(more))
    torch.testing.assert_close(here.diffs_NV, there.diffs_NV[:tokens], **EXACT)
    assert here.prior.ridge == pytest.approx(there.prior.ridge, rel=1e-10)
    assert here.prior.weights == pytest.approx(there.prior.weights, rel=1e-10)


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_no_ridge_and_few_tokens_give_the_shortest_exact_shift(tokens):
    keys, diffs, _ = problem(tokens)
    shift = RidgeFactor(keys, Prior(0.0)).shift(diffs)
    torch.testing.assert_close(shift, (torch.linalg.pinv(keys) @ diffs).T, **EXACT)
    torch.testing.assert_close(keys @ shift.T, diffs, **EXACT)


def test_no_ridge_and_many_tokens_give_plain_least_squares():
    keys, diffs, _ = problem(20)
    shift = RidgeFactor(keys, Prior(0.0)).shift(diffs)
    torch.testing.assert_close(shift, (torch.linalg.pinv(keys) @ diffs).T, **EXACT)


@pytest.mark.parametrize("tokens", [5, 20])
def test_float32_keys_of_very_different_size(tokens):
    """An attention sink (squared norm 5e6) beside a direction that text hardly uses (1e-2)."""
    scales = torch.tensor([1, 1, 1, 1, 0.3, 0.1 / tokens**0.5], dtype=torch.float64)
    turn, _ = torch.linalg.qr(normal(K, K, seed=5))
    keys = normal(tokens, K, seed=1) * scales @ turn
    keys[0] *= 5e6**0.5 / keys[0].norm()
    keys, diffs = keys.float(), normal(tokens, V, seed=2).float()
    prior = Prior(1e-3)
    expected = stacked(keys.double(), diffs.double(), precision(prior))

    shift = RidgeFactor(keys, prior).shift(diffs)
    # Condition number 5e6 / 1e-3 of the normal equations, times 1e-16, is 5e-7 of the norm.
    assert (shift - expected).norm() < 1e-6 * expected.norm()

    # The case is hard enough: the same formula in float32 is wrong in the first digits.
    narrow = torch.linalg.solve(keys.T @ keys + 1e-3 * torch.eye(K), keys.T @ diffs).T
    assert (narrow - expected).norm() > 1e-2 * expected.norm()


# --- gradients


@TOKENS
@PRIORS
def test_gradients_equal_autograd(tokens, prior_name):
    keys, diffs, grad = problem(tokens)
    prior = make_prior(prior_name)
    free = diffs.clone().requires_grad_()
    ridge = torch.tensor(prior.ridge, dtype=torch.float64, requires_grad=True)
    weights = [
        torch.tensor(weight, dtype=torch.float64, requires_grad=True) for weight in prior.weights
    ]
    shift = solved(keys, free, ridge, weights, prior.matrices_KK)
    (grad * shift).sum().backward()

    factor = RidgeFactor(keys, prior)
    found = factor.backward(grad, diffs, factor.shift(diffs))
    assert found.weights_N is None
    torch.testing.assert_close(found.diffs_NV, free.grad, **EXACT)
    grads = found.prior
    assert grads.ridge == pytest.approx(ridge.grad.item(), rel=1e-10)
    by_weights = [weight.grad.item() for weight in weights]
    assert len(by_weights) == len(TERMS[prior_name])
    assert all(abs(by) > 1e-6 for by in by_weights), "a weight of zero has a gradient all the same"
    assert grads.weights == pytest.approx(tuple(by_weights), rel=1e-10)


@TOKENS
@PRIORS
def test_prior_gradients_equal_differences(tokens, prior_name):
    keys, diffs, grad = problem(tokens)
    prior = make_prior(prior_name)
    step = 1e-5

    def loss(ridge: float, weights: tuple[float, ...]) -> float:
        factor = RidgeFactor(keys, Prior(ridge, weights, prior.matrices_KK))
        return (grad * factor.shift(diffs)).sum().item()

    def moved(index: int, by: float) -> tuple[float, ...]:
        return (*weights[:index], weights[index] + by, *weights[index + 1 :])

    ridge, weights = prior.ridge, prior.weights
    factor = RidgeFactor(keys, prior)
    grads = factor.backward(grad, diffs, factor.shift(diffs)).prior
    # Central differences: step^2 of the third derivative plus 1e-16 / step of rounding.  P stays
    # positive where a weight of zero goes below it: lambda is 0.3.
    by_ridge = (loss(ridge + step, weights) - loss(ridge - step, weights)) / (2 * step)
    assert grads.ridge == pytest.approx(by_ridge, rel=1e-6, abs=1e-8)
    assert len(grads.weights) == len(weights)
    for index, found in enumerate(grads.weights):
        higher, lower = loss(ridge, moved(index, step)), loss(ridge, moved(index, -step))
        assert found == pytest.approx((higher - lower) / (2 * step), rel=1e-6, abs=1e-8)


def test_ridge_gradient_at_no_ridge():
    keys, diffs, _ = problem(3)
    grad = normal(V, 3, seed=4) @ keys  # in the span of the keys, where the derivative exists
    step = 1e-6
    factors = [RidgeFactor(keys, Prior(ridge)) for ridge in (0.0, step, 2 * step)]
    low, middle, high = [(grad * factor.shift(diffs)).sum().item() for factor in factors]
    # One-sided differences of second order: step^2 of truncation plus 1e-16 / step of rounding.
    expected = (4 * middle - high - 3 * low) / (2 * step)
    found = factors[0].backward(grad, diffs, factors[0].shift(diffs))
    assert found.prior.ridge == pytest.approx(expected, rel=1e-6)


# --- what is refused


def test_dependent_key_dimensions_without_ridge_are_refused():
    keys = normal(9, K, seed=1)
    keys[:, 2] = 0.0  # no rounding: this pivot is exactly 0
    with pytest.raises(MalmendError, match=r"size 6 is singular.*use lambda > 0"):
        RidgeFactor(keys, Prior(0.0))


def test_a_repeated_key_without_ridge_is_refused():
    with pytest.raises(MalmendError, match="size 2 is singular"):
        RidgeFactor(torch.eye(K)[[0, 0]], Prior(0.0))


@pytest.mark.parametrize("repeated", ["key", "dimension"])
def test_dependence_up_to_rounding_without_ridge_is_refused(repeated):
    refused = []
    for seed in range(60):
        keys = normal(9, K, seed=seed) if repeated == "dimension" else normal(5, K, seed=seed)
        if repeated == "dimension":
            keys[:, -1] = keys[:, 0]
        else:
            keys[-1] = keys[0]
        try:
            RidgeFactor(keys, Prior(0.0))
        except MalmendError:
            refused.append(seed)
    assert refused == list(range(60))


def test_a_singular_matrix_alone_holds_nothing():
    flat = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0]))
    for prior in (Prior(0.0, (1.0,), (flat,)), Prior(0.0, (1.0, 0.0), (flat, torch.eye(K)))):
        with pytest.raises(MalmendError, match="singular"):
            RidgeFactor(normal(2, K), prior)
    # Two singular matrices may hold together what neither holds alone.
    rest = torch.diag(torch.tensor([0.0, 0, 0, 0, 0, 1]))
    keys, diffs, _ = problem(3)
    together = Prior(0.0, (2.0, 2.0), (flat, rest))
    torch.testing.assert_close(
        RidgeFactor(keys, together).shift(diffs),
        RidgeFactor(keys, Prior(2.0)).shift(diffs),
        **EXACT,
    )


@TOKENS
@PRIORS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(tokens, prior_name, bad):
    keys, _, _ = problem(tokens)
    keys[-1, 2] = bad
    with pytest.raises(MalmendError, match="NaN or infinity"):
        RidgeFactor(keys, make_prior(prior_name))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("ridge", [0.0, 1e-300, 1e-20])
@pytest.mark.parametrize("tokens", [2, 4])
def test_what_neither_keys_nor_matrices_hold_is_refused_in_both_forms(tokens, ridge, seed):
    """Keys and a matrix that both have one dimension twice, but for rounding."""
    keys, rows = normal(tokens, K, seed=seed), normal(9, K, seed=seed + 100)
    RidgeFactor(keys, Prior(ridge, (1.7,), (rows.T @ rows,)))
    keys[:, -1], rows[:, -1] = keys[:, 0], rows[:, 0]
    with pytest.raises(MalmendError, match="size 6 is singular"):
        RidgeFactor(keys, Prior(ridge, (1.7,), (rows.T @ rows,)))


# --- residual


def test_residuals_equal_a_loop():
    keys, diffs, shift = problem(5)
    diffs[2] = 0.0
    ratios = []
    for key, diff in zip(keys.tolist(), diffs.tolist(), strict=True):
        size = sum(value**2 for value in diff) ** 0.5
        if size == 0:
            continue
        reached = [sum(w * k for w, k in zip(row, key, strict=True)) for row in shift.tolist()]
        miss = sum((r - d) ** 2 for r, d in zip(reached, diff, strict=True)) ** 0.5
        ratios.append(miss / size)
    assert len(ratios) == 4
    assert residuals(shift, keys, diffs) == (pytest.approx(sum(ratios), rel=1e-12), 4)


def test_residuals_of_nothing_done_of_all_done_and_of_nothing_asked():
    keys, diffs, _ = problem(3)
    assert residuals(torch.zeros(V, K), keys.float(), diffs.float()) == (pytest.approx(3.0), 3)
    exact = RidgeFactor(keys, Prior(0.0)).shift(diffs)
    assert residuals(exact, keys, diffs)[0] < 1e-12
    assert residuals(exact, keys, torch.zeros(3, V)) == (0.0, 0)


# --- inputs


@TOKENS
@PRIORS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_are_not_changed(tokens, prior_name, dtype):
    # float64 is where a conversion returns the caller's own tensor
    keys, diffs, grad = [tensor.to(dtype) for tensor in problem(tokens)]
    template = make_prior(prior_name)
    matrices = tuple(matrix.to(dtype) for matrix in template.matrices_KK)
    given = [keys, diffs, grad, *matrices]
    before = [tensor.clone() for tensor in given]

    prior = Prior(template.ridge, template.weights, matrices)
    factor = RidgeFactor(keys, prior)
    shift = factor.shift(diffs)
    given.append(shift)
    before.append(shift.clone())
    factor.backward(grad, diffs, shift)
    residuals(grad, keys, diffs)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


# --- weights of rows, and rows that are read a few at a time


@TOKENS
@PRIORS
@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_weighted_rows_by_autograd(tokens, prior_name, at_once, monkeypatch):
    """Equation (14) by LU in the graph: the shift, dL/dD and dL/dw, however many rows at once."""
    monkeypatch.setattr(ridge, "ROWS", at_once)
    keys, diffs, grad = problem(tokens)
    prior = make_prior(prior_name)
    weights = normal(tokens, seed=8).exp().requires_grad_(True)
    asked = diffs.clone().requires_grad_(True)
    weighted = keys.T * weights
    shift = torch.linalg.solve(weighted @ keys + precision(prior), weighted @ asked).T
    (shift * grad).sum().backward()
    factor = RidgeFactor(keys, prior, weights.detach())
    torch.testing.assert_close(factor.shift(diffs), shift.detach(), **EXACT)
    found = factor.backward(grad, diffs, factor.shift(diffs))
    torch.testing.assert_close(found.diffs_NV, asked.grad, **EXACT)
    torch.testing.assert_close(found.weights_N, weights.grad, **EXACT)
    miss = (keys @ shift.detach().T - diffs).norm(dim=1) / diffs.norm(dim=1)
    assert residuals(shift.detach(), keys, diffs) == (pytest.approx(miss.sum().item()), tokens)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_prior_of_nothing_has_a_shift_but_no_gradient_by_its_weights(weighted):
    """Any weight above 0 picks another of the shifts that fit, however small it is."""
    keys, diffs, grad = problem(2)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64) if weighted else None
    nothing = RidgeFactor(keys, Prior(0.0, (0.0,), (moment(3 * K),)), weights)
    shift = nothing.shift(diffs)
    torch.testing.assert_close(shift, RidgeFactor(keys, Prior(0.0), weights).shift(diffs), **EXACT)
    little = RidgeFactor(keys, Prior(0.0, (1e-9,), (moment(3 * K),)), weights).shift(diffs)
    assert (little - shift).norm() > 0.1 * shift.norm()
    with pytest.raises(MalmendError, match="no gradient by them with 2 tokens, expected 6 or more"):
        nothing.backward(grad, diffs, shift)
