"""Equation (14): the weight of end-of-answer tokens, by least squares written out in float64.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import (
    WORDS,
    captured_of,
    encoder,
    random_editor,
    random_facts,
    tiny_model,
    tiny_trunk,
)

import helpers
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.malmen import Malmen
from malmend.editors.network import NetworkSettings
from malmend.editors.pseudo import Pseudo
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.facts.fact import Question
from malmend.facts.tokens import Encoder
from malmend.models.capture import Captured, capture, ends_of
from malmend.models.descent import Descent
from malmend.numerics.moments import RunningMoments
from malmend.numerics.prior import Prior

K, V = 6, 4
RIDGE = Prior(0.3)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def aggregated(keys_NK, weights_N, prior=RIDGE):
    """What Malmen makes of random pseudo rows, and the value differences they ask for."""
    count = len(keys_NK)
    pseudo = Pseudo(normal(count, K, seed=2), normal(count, V, seed=3))
    found = Malmen(keys_NK, torch.empty(len(keys_NK), V, dtype=keys_NK.dtype), prior, weights_N)
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


def three_terms(ridge: float = 0.05) -> tuple[Prior, torch.Tensor]:
    """A prior of three matrices, two without full rank, and rows R with P = R^T R."""
    rows = [normal(rank, K, seed=20 + rank) for rank in (9, 4, 2)]
    weights = (0.7, 0.2, 1.3)
    root = [ridge**0.5 * torch.eye(K, dtype=torch.float64)]
    root += [weight**0.5 * row for weight, row in zip(weights, rows, strict=True)]
    return Prior(ridge, weights, tuple(row.T @ row for row in rows)), torch.cat(root)


@pytest.mark.parametrize("count", [3, K, 11])
def test_weighted_rows_over_a_prior_are_stacked_least_squares(count):
    """Fewer tokens than K, as many, and more; the solver works on rows, never on A."""
    prior, root_PK = three_terms()
    keys, weights_N = normal(count, K, seed=1), 10 ** normal(count, seed=6)
    found, diffs = aggregated(keys, weights_N, prior)
    scale_N1 = weights_N.sqrt()[:, None]
    rows = torch.cat([scale_N1 * keys, root_PK])
    asked = torch.cat([scale_N1 * diffs, torch.zeros(len(root_PK), V, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, asked, driver="gelsd").solution.T
    # The condition of A is at most some 1e5 here, times rounding.
    torch.testing.assert_close(found.shift(), wanted, rtol=1e-9, atol=1e-11)
    unweighted = aggregated(keys, None, prior)[0].shift()
    assert (unweighted - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("count", [3, 11])
def test_every_gradient_by_autograd_through_the_normal_equations(count):
    """Of each row's weight, of each value difference, and of the prior's numbers."""
    prior, _ = three_terms()
    keys, grad_VK = normal(count, K, seed=1), normal(V, K, seed=4)
    found, diffs = aggregated(keys, weights_N := 0.2 + normal(count, seed=5).abs(), prior)
    w, d = weights_N.clone().requires_grad_(), diffs.clone().requires_grad_()
    p = torch.tensor([*prior.weights, prior.ridge], dtype=torch.float64, requires_grad=True)
    matrices = [*prior.matrices_KK, torch.eye(K, dtype=torch.float64)]
    a_KK = sum(w_j * torch.outer(u, u) for w_j, u in zip(w, keys, strict=True))
    a_KK = a_KK + sum(number * matrix for number, matrix in zip(p, matrices, strict=True))
    b_KV = sum(w_j * torch.outer(u, d_j) for w_j, u, d_j in zip(w, keys, d, strict=True))
    loss = (torch.linalg.solve(a_KK, b_KV).T * grad_VK).sum()
    by_w, by_d, by_p = torch.autograd.grad(loss, (w, d, p))

    received = found.receive(grad_VK)
    close = {"rtol": 1e-8, "atol": 1e-10}
    assert received.weights_N.dtype == torch.float64
    torch.testing.assert_close(received.weights_N, by_w, **close)
    mine = torch.tensor([*received.prior.weights, received.prior.ridge], dtype=torch.float64)
    torch.testing.assert_close(mine, by_p, **close)
    # The proxy's slope by the pseudo gradients is dL/dd_j times -(u~_j . u_j), the gain.
    pseudo = Pseudo(normal(count, K, seed=2), normal(count, V, seed=3).requires_grad_())
    found.proxy(slice(0, count), pseudo).backward()
    gains_N = (pseudo.keys_NK * keys).sum(1)
    torch.testing.assert_close(pseudo.grads_NV.grad, -gains_N[:, None] * by_d, **close)


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
        ("newline", "answer", [False, True, False, False, True]),
        ("newline", "all", [False, True, False, False, True, False]),
    ],
)
def test_which_tokens_output_an_end(end, tokens, wanted):
    encode = Encoder(helpers.words([*WORDS, "\n"]), end, 64).encode_all
    questions = encode([Question("w1 w2", "w3"), Question("w4", "w5 w6")])
    found = ends_of(questions, tokens)
    assert (found.dtype, found.tolist()) == (torch.bool, wanted)


def test_no_question_has_no_ends():
    for tokens in ("answer", "all"):
        found = ends_of([], tokens)
        assert (found.dtype, found.shape) == (torch.bool, (0,))


def test_a_question_without_an_answer_has_no_end():
    (asked,) = encoder().encode_all([Question("w1 w2 w3")])
    assert ends_of([asked], "answer").tolist() == [False]
    assert ends_of([asked], "all").tolist() == [False, False]


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("descent", [None, Descent(steps=2)], ids=["plain", "descent"])
@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_what_is_captured_says_which_rows_output_an_end(tokens, descent, batch_tokens):
    """A row's own token is told by its key: the end's row is the key at the answer's last token."""
    trunk = tiny_trunk(tiny_model(), batch_tokens=batch_tokens)
    questions = encoder().encode_all(fact.question for fact in random_facts(7))
    wanted = []
    for question in questions:
        start = question.answer_start - 1 if tokens == "answer" else 1
        stop = len(question.ids) - (tokens == "answer")
        wanted += [at == len(question.ids) - 2 for at in range(start, stop)]
    for pair in capture(trunk, questions, tokens, descent):
        assert pair.ends_N.tolist() == wanted
        assert len(pair.keys_NK) == len(wanted)
        assert pair.rows(slice(2, 9)).ends_N.tolist() == wanted[2:9]


def lone_editor(method="malmen", end_weight=1.0) -> Editor:
    settings = EditorSettings(
        method=method, prior="identity", end_weight=end_weight, network=NetworkSettings(rank=3)
    )
    known = SiteStatistics(RunningMoments(K), RunningMoments(V))
    known.keys.add(normal(20, K, seed=30))
    known.value_grads.add(normal(20, V, seed=31))
    return Editor(settings, {"site": (V, K)}, {"site": known}, ridge=0.3).double()


def pair_of(count: int, ends=None) -> Captured:
    marks = None if ends is None else torch.tensor([index in ends for index in range(count)])
    return Captured(normal(count, K, seed=1), normal(count, V, seed=2), marks)


@pytest.mark.parametrize("count", [3, 11])
def test_an_editors_weight_of_one_is_no_weight(count):
    editor = lone_editor()
    plain = editor.shifts([pair_of(count)])["site"]
    assert torch.equal(editor.shifts([pair_of(count, ends=(1, 2))])["site"], plain)
    assert torch.equal(editor.shifts([pair_of(count, ends=())])["site"], plain)


@pytest.mark.parametrize("count", [3, 11])
def test_an_editor_weighs_the_rows_of_ends_and_no_others(count):
    """A weight so small leaves the row out, one so large makes the shift keep to it."""
    pair = pair_of(count, ends=(0, 2))
    others = [index for index in range(count) if index not in (0, 2)]
    left = Captured(pair.keys_NK[others], pair.value_grads_NV[others])
    tiny = lone_editor(end_weight=1e-12).shifts([pair])["site"]
    wanted = lone_editor().shifts([left])["site"]
    torch.testing.assert_close(tiny, wanted, rtol=1e-8, atol=1e-9)
    editor = lone_editor(end_weight=1e9)
    found = editor.aggregate([pair])[0]
    missed = (pair.keys_NK @ found.shift().T - found.diffs_NV).norm(dim=1)
    assert (missed[[0, 2]] < 1e-6).all()
    assert missed[others].min() > 1e-3
    for weight in (1e-12, 0.25, 1e9):
        learned = lone_editor(end_weight=weight).log_end_weight_S.exp()
        assert learned.tolist() == pytest.approx([weight], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "ends"),
    [("malmen", None), ("malmen", ()), ("mend", (0, 2)), ("mend", None)],
)
def test_where_nothing_is_weighed_the_weight_has_no_gradient(method, ends):
    editor, pair = lone_editor(method, end_weight=0.25), pair_of(5, ends)
    aggregations = editor.aggregate([pair])
    editor.backward([pair], aggregations, {"site": normal(V, K, seed=4)})
    grad = editor.log_end_weight_S.grad
    assert grad is None or torch.equal(grad, torch.zeros_like(grad))
    assert editor.log_eta_S.grad.abs() > 1e-6
    other = lone_editor(method, end_weight=4.0).shifts([pair])["site"]
    assert torch.equal(editor.shifts([pair])["site"], other)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_without_an_end_token_the_weight_matters_to_nothing(tokens):
    settings = EditorSettings(
        layers=2, tokens=tokens, end_of_answer="none", network=NetworkSettings(rank=3)
    )
    trunk = tiny_trunk(tiny_model())
    captured = captured_of(trunk, random_facts(4), settings)
    assert not any(pair.ends_N.any() for pair in captured)
    editor = random_editor(settings, trunk, captured).double()
    before = editor.shifts(captured)
    with torch.no_grad():
        editor.log_end_weight_S += 2.0
    for name, shift_VK in editor.shifts(captured).items():
        assert torch.equal(shift_VK, before[name])
    # And with one, it does.
    ended = captured_of(trunk, random_facts(4), replace(settings, end_of_answer="eos"))
    moved = editor.shifts(ended)
    with torch.no_grad():
        editor.log_end_weight_S -= 2.0
    for name, shift_VK in editor.shifts(ended).items():
        assert (shift_VK - moved[name]).norm() > 1e-3 * shift_VK.norm()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_must_be_above_zero(weight):
    with pytest.raises(EditorError, match=r"end_weight is .* expected a number above 0"):
        EditorSettings(end_weight=weight)
