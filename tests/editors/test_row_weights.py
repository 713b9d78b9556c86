"""Equation (14): the weight of end-of-answer tokens, by least squares written out in float64.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

import pytest
import torch
from support import encoder

from malmend.editors.malmen import Malmen
from malmend.editors.pseudo import Pseudo
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.facts.fact import Question
from malmend.models.capture import ends_of
from malmend.numerics.ridge import Prior

K, V = 6, 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def aggregated(keys_NK, weights_N, ridge=0.3):
    """What Malmen makes of random pseudo rows, and the value differences they ask for."""
    count = len(keys_NK)
    pseudo = Pseudo(normal(count, K, seed=2), normal(count, V, seed=3))
    found = Malmen(keys_NK, V, Prior(ridge), weights_N)
    found.add(slice(0, count), pseudo)
    gains = torch.tensor([k @ u for k, u in zip(pseudo.keys_NK, keys_NK, strict=True)])
    return found, -gains[:, None] * pseudo.grads_NV


@pytest.mark.parametrize("count", [3, 11])
def test_a_weight_counts_as_so_many_equal_rows(count):
    """Rows of weight 3 beside rows of weight 1 are three equal rows each."""
    keys = normal(count, K, seed=1)
    times = torch.tensor([3 if index % 2 else 1 for index in range(count)])
    found, diffs = aggregated(keys, times.double())
    rows, asked = keys.repeat_interleave(times, 0), diffs.repeat_interleave(times, 0)
    root = 0.3**0.5 * torch.eye(K, dtype=torch.float64)
    zeros = torch.zeros(K, V, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([rows, root]), torch.cat([asked, zeros])).solution.T
    torch.testing.assert_close(found.shift(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [3, 11])
def test_the_gradient_of_each_weight_by_differences(count):
    keys, grad = normal(count, K, seed=1), normal(V, K, seed=4)
    weights = 0.5 + normal(count, seed=5).abs()
    received = aggregated(keys, weights)[0].receive(grad)
    assert received.weights_N is not None
    step = 1e-6
    for index in range(count):
        moved = []
        for sign in (1, -1):
            other = weights.clone()
            other[index] += sign * step
            moved.append((aggregated(keys, other)[0].shift() * grad).sum().item())
        by_difference = (moved[0] - moved[1]) / (2 * step)
        # Central differences of a smooth function: step^2, and rounding over the step.
        assert received.weights_N[index].item() == pytest.approx(by_difference, rel=1e-6, abs=1e-8)


def test_weights_of_one_are_no_weights():
    keys = normal(9, K, seed=1)
    ones = aggregated(keys, torch.ones(9, dtype=torch.float64))[0].shift()
    assert torch.equal(ones, aggregated(keys, None)[0].shift())


@pytest.mark.parametrize(
    ("end", "tokens", "wanted"),
    [
        # Two questions: prompt of 2 tokens and answer of 1, prompt of 1 and answer of 2.
        ("eos", "answer", [False, True, False, False, True]),
        ("none", "answer", [False, False, False]),
        # Every position but the first; the last one holds the end token itself.
        ("eos", "all", [False, True, False, False, True, False]),
        ("none", "all", [False, False, False, False]),
    ],
)
def test_which_tokens_output_an_end(end, tokens, wanted):
    questions = encoder(end).encode_all([Question("w1 w2", "w3"), Question("w4", "w5 w6")])
    assert ends_of(questions, tokens).tolist() == wanted


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_must_be_above_zero(weight):
    with pytest.raises(EditorError, match=r"end_weight is .* expected a number above 0"):
        EditorSettings(end_weight=weight)
