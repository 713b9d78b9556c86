"""The least-squares solution against other ways to find it: stacked lstsq, autograd, differences.

Shape letters: N tokens, K key width, V value width.

The systems here have condition numbers below 1e4, so that two float64 methods agree to about
1e4 * 1e-16; EXACT leaves a factor of a hundred.  Wider tolerances state their reason.
"""

from __future__ import annotations

import pytest
import torch

from malmend.errors import MalmendError
from malmend.numerics.ridge import Prior, RidgeFactor, mean_residual

EXACT = {"rtol": 1e-10, "atol": 1e-10}
K, V = 6, 4
TOKENS = pytest.mark.parametrize("tokens", [1, 3, K, 9])
PRIORS = pytest.mark.parametrize("prior_name", ["identity", "full", "singular"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def covariance(rank: int) -> torch.Tensor:
    rows = normal(rank, K, seed=7)
    return rows.T @ rows / rank


def make_prior(name: str, ridge: float = 0.3, alpha: float = 1.7) -> Prior:
    if name == "identity":
        return Prior(ridge)
    return Prior(ridge, alpha, covariance(3 * K if name == "full" else 2))


def precision(prior: Prior) -> torch.Tensor:
    identity = prior.ridge * torch.eye(K, dtype=torch.float64)
    return identity if prior.covariance_KK is None else identity + prior.alpha * prior.covariance_KK


def problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys N x K, differences N x V, and a gradient of some loss with respect to the shift."""
    return normal(tokens, K, seed=1), normal(tokens, V, seed=2), normal(V, K, seed=3)


def stacked(keys_NK: torch.Tensor, diffs_NV: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """min |S U - D|^2 + tr(S P S^T) as one least-squares problem: rows of P^1/2 under the keys."""
    values, vectors = torch.linalg.eigh(matrix)
    root = (vectors * values.clamp(min=0).sqrt()).T
    targets = torch.cat([diffs_NV, torch.zeros(K, V, dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([keys_NK, root]), targets, driver="gelsd").solution.T


def solved(keys_NK, diffs_NV, ridge, alpha, covariance_KK) -> torch.Tensor:
    """The shift by plain operations that autograd can follow."""
    matrix = keys_NK.T @ keys_NK + ridge * torch.eye(K, dtype=torch.float64)
    if covariance_KK is not None:
        matrix = matrix + alpha * covariance_KK
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
    assert factor.is_dual == (tokens < K)
    assert factor.shift(diffs).dtype == torch.float64
    torch.testing.assert_close(factor.shift(diffs), expected, **EXACT)


def test_shift_is_the_minimum():
    keys, diffs, _ = problem(4)
    prior = make_prior("full")

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
    torch.testing.assert_close(one.diff_grads(grad), other.diff_grads(grad)[:tokens], **EXACT)
    here, there = one.prior_grads(grad, diffs), other.prior_grads(grad, more)
    assert here.ridge == pytest.approx(there.ridge, rel=1e-10)
    assert here.alpha == pytest.approx(there.alpha, rel=1e-10)


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
    alpha = torch.tensor(prior.alpha, dtype=torch.float64, requires_grad=True)
    shift = solved(keys, free, ridge, alpha, prior.covariance_KK)
    (grad * shift).sum().backward()

    factor = RidgeFactor(keys, prior)
    torch.testing.assert_close(factor.diff_grads(grad), free.grad, **EXACT)
    grads = factor.prior_grads(grad, diffs)
    assert grads.ridge == pytest.approx(ridge.grad.item(), rel=1e-10)
    by_alpha = 0.0 if alpha.grad is None else alpha.grad.item()
    assert (by_alpha != 0) == (prior_name != "identity")
    assert grads.alpha == pytest.approx(by_alpha, rel=1e-10)


@TOKENS
@PRIORS
def test_prior_gradients_equal_differences(tokens, prior_name):
    keys, diffs, grad = problem(tokens)
    prior = make_prior(prior_name)
    step = 1e-5

    def loss(ridge: float, alpha: float) -> float:
        factor = RidgeFactor(keys, Prior(ridge, alpha, prior.covariance_KK))
        return (grad * factor.shift(diffs)).sum().item()

    ridge, alpha = prior.ridge, prior.alpha
    by_ridge = (loss(ridge + step, alpha) - loss(ridge - step, alpha)) / (2 * step)
    by_alpha = (loss(ridge, alpha + step) - loss(ridge, alpha - step)) / (2 * step)
    grads = RidgeFactor(keys, prior).prior_grads(grad, diffs)
    # Central differences: step^2 of the third derivative plus 1e-16 / step of rounding.
    assert grads.ridge == pytest.approx(by_ridge, rel=1e-6, abs=1e-8)
    assert grads.alpha == pytest.approx(by_alpha, rel=1e-6, abs=1e-8)


def test_ridge_gradient_at_no_ridge():
    keys, diffs, _ = problem(3)
    grad = normal(V, 3, seed=4) @ keys  # in the span of the keys, where the derivative exists
    step = 1e-6
    factors = [RidgeFactor(keys, Prior(ridge)) for ridge in (0.0, step, 2 * step)]
    low, middle, high = [(grad * factor.shift(diffs)).sum().item() for factor in factors]
    # One-sided differences of second order: step^2 of truncation plus 1e-16 / step of rounding.
    expected = (4 * middle - high - 3 * low) / (2 * step)
    assert factors[0].prior_grads(grad, diffs).ridge == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokens", [3, 9])
def test_alpha_gradient_at_alpha_zero(tokens):
    keys, diffs, grad = problem(tokens)
    alpha = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    (grad * solved(keys, diffs, 0.3, alpha, covariance(2))).sum().backward()
    grads = RidgeFactor(keys, Prior(0.3, 0.0, covariance(2))).prior_grads(grad, diffs)
    assert grads.alpha == pytest.approx(alpha.grad.item(), rel=1e-10)


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


def test_a_singular_covariance_alone_holds_nothing():
    prior = Prior(0.0, 1.0, torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0])))
    with pytest.raises(MalmendError, match="singular"):
        RidgeFactor(normal(3, K), prior)


@TOKENS
@PRIORS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(tokens, prior_name, bad):
    keys, _, _ = problem(tokens)
    keys[-1, 2] = bad
    with pytest.raises(MalmendError, match="NaN or infinity"):
        RidgeFactor(keys, make_prior(prior_name))


# --- residual


def test_mean_residual_equals_a_loop():
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
    assert mean_residual(shift, keys, diffs) == pytest.approx(sum(ratios) / 4, rel=1e-12)


def test_mean_residual_of_nothing_done_of_all_done_and_of_nothing_asked():
    keys, diffs, _ = problem(3)
    assert mean_residual(torch.zeros(V, K), keys.float(), diffs.float()) == pytest.approx(1.0)
    exact = RidgeFactor(keys, Prior(0.0)).shift(diffs)
    assert mean_residual(exact, keys, diffs) < 1e-12
    assert mean_residual(exact, keys, torch.zeros(3, V)) == 0.0


# --- inputs


@TOKENS
@PRIORS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_are_not_changed(tokens, prior_name, dtype):
    # float64 is where a conversion returns the caller's own tensor
    keys, diffs, grad = [tensor.to(dtype) for tensor in problem(tokens)]
    template = make_prior(prior_name)
    matrix = None if template.covariance_KK is None else template.covariance_KK.to(dtype)
    given = [keys, diffs, grad] + ([] if matrix is None else [matrix])
    before = [tensor.clone() for tensor in given]

    prior = Prior(template.ridge, template.alpha, matrix)
    factor = RidgeFactor(keys, prior)
    factor.shift(diffs)
    factor.diff_grads(grad)
    factor.prior_grads(grad, diffs)
    mean_residual(grad, keys, diffs)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)
