"""Losses per token against the same written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from malmend.numerics import losses
from malmend.numerics.losses import answer_nll, kl_and_grad, kl_per_token, nll_and_grad

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of eleven terms
NARROW = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of eleven terms of size ten or less
A, W = 5, 11


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(A, W, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 10, 3, 3, 7])


def nll_by_hand(logits_AW: torch.Tensor) -> torch.Tensor:
    probabilities = functional.softmax(logits_AW.double(), dim=-1)
    return -probabilities[torch.arange(A), LABELS].log()


def kl_by_hand(before_AW: torch.Tensor, after_AW: torch.Tensor) -> torch.Tensor:
    p = functional.softmax(before_AW.double(), dim=-1)
    q = functional.softmax(after_AW.double(), dim=-1)
    return (p * (p / q).log()).sum(-1)


def test_nll_per_token():
    torch.testing.assert_close(answer_nll(logits(0), LABELS), nll_by_hand(logits(0)), **EXACT)


def test_nll_in_nats():
    flat = torch.zeros(1, 8, dtype=torch.float64)
    assert answer_nll(flat, torch.tensor([5])).item() == pytest.approx(math.log(8))


def test_nll_gradient():
    free = logits(0).requires_grad_()
    answer_nll(free, LABELS).sum().backward()
    expected = functional.softmax(logits(0), -1) - functional.one_hot(LABELS, W)
    torch.testing.assert_close(free.grad, expected, **EXACT)


def test_a_question_without_an_answer_costs_nothing():
    labels = torch.tensor([0, -100, 3, 3, 7])
    loss = answer_nll(logits(0), labels)
    assert loss[1] == 0
    assert torch.equal(loss[[0, 2, 3, 4]], answer_nll(logits(0), LABELS)[[0, 2, 3, 4]])


def test_kl_per_token_and_its_direction():
    before, after = logits(0), logits(1)
    found = kl_per_token(before, after)
    torch.testing.assert_close(found, kl_by_hand(before, after), **EXACT)
    library = functional.kl_div(
        functional.log_softmax(after, -1), functional.softmax(before, -1), reduction="none"
    )
    torch.testing.assert_close(found, library.sum(-1), **EXACT)
    assert not torch.allclose(found, kl_by_hand(after, before), rtol=0.05)


def test_kl_by_numbers():
    before = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    after = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log() + 3.0  # logits have no zero
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_per_token(before, after).item() == pytest.approx(expected)


def test_kl_gradient():
    after = logits(1).requires_grad_()
    kl_per_token(logits(0), after).sum().backward()
    expected = functional.softmax(logits(1), -1) - functional.softmax(logits(0), -1)
    torch.testing.assert_close(after.grad, expected, **EXACT)


def test_kl_of_a_model_with_itself_is_zero_and_so_is_its_gradient():
    after = logits(0).requires_grad_()
    loss = kl_per_token(logits(0), after)
    assert torch.equal(loss, torch.zeros(A, dtype=torch.float64))
    loss.sum().backward()
    # e^(log p) summed to 1 up to rounding
    torch.testing.assert_close(after.grad, torch.zeros(A, W, dtype=torch.float64), **EXACT)


def test_a_tiny_divergence_keeps_its_gradient():
    after = (logits(0) + 1e-9 * logits(1)).requires_grad_()
    kl_per_token(logits(0), after).sum().backward()
    assert after.grad.abs().max() > 1e-10


def test_extreme_logits_stay_finite():
    wide = torch.tensor([[1e4, 0.0, -1e4]])
    assert answer_nll(wide, torch.tensor([2])).item() == pytest.approx(2e4)
    assert kl_per_token(wide, wide.flip(1)).item() == pytest.approx(2e4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_computed_in_float32(dtype):
    before, after = logits(0).to(dtype), logits(1).to(dtype)
    loss, divergence = answer_nll(after, LABELS), kl_per_token(before, after)
    assert loss.dtype == divergence.dtype == torch.float32
    torch.testing.assert_close(loss.double(), nll_by_hand(after), **NARROW)
    torch.testing.assert_close(divergence.double(), kl_by_hand(before, after), **NARROW)


def test_float64_logits_stay_float64():
    assert answer_nll(logits(0), LABELS).dtype == torch.float64
    assert kl_per_token(logits(0), logits(1)).dtype == torch.float64


def test_nothing_in_nothing_out():
    empty = torch.zeros(0, W)
    assert answer_nll(empty, torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert kl_per_token(empty, empty).shape == (0,)


LABELLED = [LABELS, torch.tensor([0, -100, 3, -100, 7])]


@pytest.fixture(params=[1, 2, 100])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(losses, "IN_CACHE", request.param * logits(0).shape[1])


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("labels", LABELLED, ids=["all", "some without a label"])
def test_nll_and_its_derivative_are_autograds(labels):
    free = logits(0).requires_grad_()
    wanted = answer_nll(free, labels)
    wanted.sum().backward()
    before = free.detach().clone()
    loss, grad = nll_and_grad(free, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted.detach(), **EXACT)
    torch.testing.assert_close(grad, free.grad, **EXACT)
    assert torch.equal(free, before)  # it works in place, on what is its own


@pytest.mark.usefixtures("rows_at_once")
def test_kl_and_its_derivative_are_autograds():
    free, known = logits(1).requires_grad_(), logits(0)
    wanted = kl_per_token(known, free)
    wanted.sum().backward()
    before = free.detach().clone()
    loss, grad = kl_and_grad(known, free)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted.detach(), **EXACT)
    torch.testing.assert_close(grad, free.grad, **EXACT)
    assert torch.equal(free, before)
    assert torch.equal(known, logits(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_derivatives_of_narrow_logits_are_float32(dtype):
    before, after = logits(0).to(dtype), logits(1).to(dtype)
    for loss, grad in (nll_and_grad(after, LABELS), kl_and_grad(before, after)):
        assert loss.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), kl_by_hand(before, after), **NARROW)
    expected = functional.softmax(after.double(), -1) - functional.softmax(before.double(), -1)
    torch.testing.assert_close(grad.double(), expected, **NARROW)


def test_derivatives_of_extreme_logits_stay_finite():
    wide = torch.tensor([[1e4, 0.0, -1e4]])
    assert nll_and_grad(wide, torch.tensor([2]))[0].item() == pytest.approx(2e4)
    assert torch.isfinite(kl_and_grad(wide, wide.flip(1))[1]).all()


def test_on_an_accelerator_all_rows_are_one_pass(monkeypatch):
    """Each more is a few launches of small kernels."""
    monkeypatch.setattr(losses, "IN_CACHE", 2 * W)
    slices = {
        place: list(losses._few(torch.empty(5, W, device=place))) for place in ("cpu", "meta")
    }
    assert slices == {"cpu": [slice(0, 2), slice(2, 4), slice(4, 5)], "meta": [slice(0, 5)]}
