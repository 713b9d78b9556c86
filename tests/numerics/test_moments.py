"""Streaming moments against torch on all rows at once.

Both ways are float64 with a few hundred rows, so they agree to about 1e-14 of the size of the
rows; EXACT leaves a factor of a hundred.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from malmend.numerics.moments import RunningMoments

EXACT = {"rtol": 1e-12, "atol": 1e-12}
F = 3


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 20.0, 0.3], dtype=torch.float64)
    rows = torch.randn(count, F, generator=generator, dtype=torch.float64)
    return rows * scale + torch.tensor([0.0, -5.0, 2.0], dtype=torch.float64)


def streamed(*chunks: torch.Tensor) -> RunningMoments:
    moments = RunningMoments(chunks[0].shape[1])
    for chunk in chunks:
        moments.add(chunk)
    return moments


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), seed=st.integers(0, 2**32))
@example(sizes=[1, 1], seed=0)
@example(sizes=[0, 2, 0], seed=0)
def test_any_chunking_equals_all_rows_at_once(sizes, seed):
    rows = rows_of(sum(sizes), seed)
    moments = streamed(*rows.split(sizes))
    assert moments.count == len(rows)
    if len(rows) == 0:
        return
    torch.testing.assert_close(moments.mean_F, rows.mean(0), **EXACT)
    variance = torch.var(rows, dim=0, unbiased=False)
    torch.testing.assert_close(moments.m2_F / moments.count, variance, **EXACT)
    if len(rows) > 1:
        least = 1e-3 * variance.mean().sqrt()
        torch.testing.assert_close(moments.std(), variance.sqrt().clamp(min=least), **EXACT)


def test_chunks_of_one_row():
    rows = rows_of(40)
    moments = streamed(*rows.split(1))
    torch.testing.assert_close(moments.std(), rows.std(0, unbiased=False), **EXACT)


@pytest.mark.parametrize("count", [0, 1])
def test_deviation_of_one_row_or_none_is_one(count):
    moments = streamed(rows_of(count))
    assert moments.count == count
    assert torch.equal(moments.std(), torch.ones(F, dtype=torch.float64))


def test_mean_of_one_row_and_of_none():
    row = rows_of(1)
    assert torch.equal(streamed(row).mean_F, row[0])
    assert torch.equal(streamed(row[:0]).mean_F, torch.zeros(F, dtype=torch.float64))


def test_an_empty_chunk_changes_nothing():
    rows = rows_of(7)
    moments = streamed(rows)
    mean, m2 = moments.mean_F.clone(), moments.m2_F.clone()
    moments.add(rows[:0])
    assert moments.count == 7
    assert torch.equal(moments.mean_F, mean)
    assert torch.equal(moments.m2_F, m2)


def test_a_constant_dimension_gets_the_floor():
    rows = rows_of(50)
    rows[:, 2] = 4.0
    spread = rows.var(0, unbiased=False)
    least = spread.mean().sqrt()
    std = streamed(*rows.split(20)).std()
    torch.testing.assert_close(std[:2], spread[:2].sqrt(), **EXACT)
    torch.testing.assert_close(std[2], 1e-3 * least, **EXACT)


def test_rows_that_do_not_vary_have_deviation_one():
    rows = torch.full((6, F), 4.0)
    assert torch.equal(streamed(rows[:2], rows[2:]).std(), torch.ones(F, dtype=torch.float64))


def test_rows_that_do_not_vary_but_by_rounding_have_deviation_one():
    rows = torch.full((3, F), 0.1, dtype=torch.float64)
    assert torch.equal(streamed(rows).std(), torch.ones(F, dtype=torch.float64))


def test_nor_where_their_mean_is_below_zero_and_rounded_chunk_by_chunk():
    rows = torch.full((34, F), -0.1, dtype=torch.float64)
    moments = streamed(*rows.split([3, 7, 11, 13]))
    assert (moments.m2_F > 0).all()  # which is rounding
    assert torch.equal(moments.std(), torch.ones(F, dtype=torch.float64))


def test_an_offset_of_a_million():
    rows = rows_of(300) + 1e6
    expected = (rows - 1e6).std(0, unbiased=False)  # this difference is exact
    # Rows near 1e6 are whole multiples of 1e-10; a sum of squares would be off by 1e-3.
    for size in (1, 7, 300):
        moments = streamed(*rows.split(size))
        torch.testing.assert_close(moments.std(), expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(moments.mean_F - 1e6, (rows - 1e6).mean(0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_rows_are_added_up_in_float64_and_left_alone(dtype):
    rows = (rows_of(200) + 30).to(dtype)
    before = rows.clone()
    moments = streamed(*rows.split(30))
    assert torch.equal(rows, before)
    torch.testing.assert_close(moments.mean_F, rows.double().mean(0), **EXACT)
    torch.testing.assert_close(moments.std(), rows.double().std(0, unbiased=False), **EXACT)


def test_float64_rows_are_left_alone():
    rows = rows_of(9)
    before = rows.clone()
    streamed(*rows.split(4))
    assert torch.equal(rows, before)
