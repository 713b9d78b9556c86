"""Cosines and overlaps against principal angles and random spaces."""

from __future__ import annotations

import pytest
import torch

from malmend.numerics.subspaces import cosine, overlap, overlap_by_chance


def basis(dimension, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    one, other = basis(10, 4), basis(10, 3, seed=1)
    cosines = torch.linalg.svdvals(one.T @ other)
    assert overlap(one, other) == pytest.approx(cosines.square().mean().item())
    assert overlap(other, one) == pytest.approx(overlap(one, other))


def test_the_ends_of_the_scale():
    whole = basis(10, 6)
    assert overlap(whole, whole[:, :2]) == pytest.approx(1.0)  # one holds the other
    assert overlap(whole[:, :2], whole[:, 3:]) == pytest.approx(0.0, abs=1e-12)
    assert overlap(whole[:, :0], whole) == 0


def test_an_empty_space_meets_none_by_chance_either():
    """0.0 beside a chance of 0.25 read as if two patches kept out of each other's way."""
    empty = torch.zeros(12, 0, dtype=torch.float64)
    assert overlap(empty, basis(12, 3)) == overlap_by_chance(empty, basis(12, 3)) == 0.0


def test_chance_is_what_random_spaces_have():
    found = [overlap(basis(12, 5, seed), basis(12, 3, seed + 5000)) for seed in range(400)]
    mean = sum(found) / len(found)
    assert mean == pytest.approx(overlap_by_chance(basis(12, 5), basis(12, 3)), abs=0.02)


def test_cosines_of_matrices():
    one = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert cosine(one, -2 * one) == pytest.approx(-1.0)
    assert cosine(one, torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 0
    assert cosine(one, torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.6)
    assert cosine(one, torch.zeros(2, 2)) == 0
