"""Rows a few at a time, and rows of unlike lengths padded together."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malmend.numerics.chunks import APART, chunks, padded_chunks, two_sided_chunks


def test_chunks_cover_all_rows():
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(chunks(0, 3)) == []


def cost(lengths, ends, most):
    """Of slices that end there: positions, and what each costs beside them."""
    starts = (0, *ends[:-1])
    sizes = [(end - start) * lengths[start] for start, end in zip(starts, ends, strict=True)]
    singles = [end - start == 1 for start, end in zip(starts, ends, strict=True)]
    if any(size > most and not single for size, single in zip(sizes, singles, strict=True)):
        return float("inf")
    return sum(size + APART * most for size in sizes)


@pytest.mark.parametrize("most", [1, 12, 20, 60])
@pytest.mark.parametrize("seed", range(12))
def test_padded_chunks_are_the_cheapest_of_all_that_could_be_cut(seed, most):
    """Of all ways to cut up to nine rows, also where a slice is not full and lengths are equal."""
    draw = random.Random(seed)
    lengths = sorted((draw.randint(1, 15) for _ in range(draw.randint(1, 9))), reverse=True)
    found = [rows.stop for rows in padded_chunks(lengths, most)]
    inner = range(1, len(lengths))
    ways = itertools.chain.from_iterable(
        itertools.combinations(inner, count) for count in range(len(lengths))
    )
    best = min(cost(lengths, (*way, len(lengths)), most) for way in ways)
    assert cost(lengths, found, most) == pytest.approx(best)


def test_rows_of_one_length_fill_their_slices_and_nothing_is_nothing():
    assert list(padded_chunks([4] * 7, 12)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(padded_chunks([], 12)) == []


def test_short_rows_do_not_stand_beside_a_long_one():
    lengths = [100, *[10] * 20]
    assert list(padded_chunks(lengths, 400)) == [slice(0, 1), slice(1, 21)]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=20), st.integers(1, 90))
def test_of_two_sides_a_slice_holds_what_both_are_padded_to(lengths, most):
    covered = []
    for rows in two_sided_chunks(lengths, most):
        covered += range(*rows.indices(len(lengths)))
        one, other = (max(side) for side in zip(*lengths[rows], strict=True))
        count = rows.stop - rows.start
        assert count == 1 or count * (one + other) <= most
        if rows.stop < len(lengths):  # and is as large as it may be
            one, other = max(one, lengths[rows.stop][0]), max(other, lengths[rows.stop][1])
            assert (count + 1) * (one + other) > most
    assert covered == list(range(len(lengths)))
