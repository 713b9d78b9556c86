"""What is captured, against autograd through the whole model, and descents written out again."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tiny
from malmend.facts.encoded import Encoded
from malmend.models.capture import Captured, capture, keys_of
from malmend.models.descent import Descent
from malmend.models.sites import find_sites
from malmend.models.tracing import tracing
from malmend.models.trunk import Trunk, TrunkSettings

FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)
TOKENS = pytest.mark.parametrize("tokens", ["answer", "all"])
QUESTIONS = tiny.questions(6)
# GPT-J takes its attention in float32 whatever the model's own type.
CLOSE = dict.fromkeys(tiny.FAMILIES, 1e-10) | dict.fromkeys(tiny.FLOAT32_INSIDE, 1e-4)
# For a descent, where more decimals are asked for; every one of another layout of blocks.
DESCENDED = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])


def cut(model, layers=2, batch_tokens=1024):
    return Trunk(model, find_sites(model, layers), TrunkSettings(batch_tokens))


def places(question, tokens):
    """Positions whose pairs are captured."""
    if tokens == "all":
        return list(range(1, len(question.ids)))
    return list(range(question.answer_start - 1, len(question.ids) - 1))


def plainly(model, names, question, deltas=None, at=()):
    """Keys, gradients of the layers' outputs, and the loss of every answer token of one question.

    The whole model, one unpadded question, ``retain_grad``.  ``deltas`` are added to the layers'
    outputs at the positions ``at``.
    """
    keys, outputs = {}, {}

    def hook(name):
        def record(_module, args, output):
            keys[name] = args[0].detach().reshape(len(question.ids), -1)
            if deltas is not None:
                moved = output.clone().reshape(len(question.ids), -1)
                moved[list(at)] += deltas[name]
                output = moved.view_as(output)
            if not output.requires_grad:
                output = output.clone().requires_grad_(True)
            output.retain_grad()
            outputs[name] = output
            return output

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        logits = model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0].double()
        start = question.answer_start
        logp = logits[start - 1 : -1].log_softmax(-1)
        nll = -logp[range(len(question.ids) - start), list(question.ids[start:])]
        nll.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    grads = {name: out.grad.reshape(len(question.ids), -1) for name, out in outputs.items()}
    return keys, grads, nll.detach()


def assert_pairs(captured, expected, atol):
    for got, (keys, grads) in zip(captured, expected, strict=True):
        for mine, theirs in ((got.keys_NK, keys), (got.value_grads_NV, grads)):
            assert mine.shape == theirs.shape
            assert torch.allclose(mine, theirs.to(mine.dtype), rtol=0, atol=atol)


def expected_pairs(model, names, questions, tokens):
    """Per site, keys and gradients of all questions, in their order."""
    rows = [
        (*plainly(model, names, question)[:2], places(question, tokens)) for question in questions
    ]
    return [
        (
            torch.cat([keys[name][at] for keys, _, at in rows]),
            torch.cat([grads[name][at] for _, grads, at in rows]),
        )
        for name in names
    ]


# --- the plain gradient


@FAMILY
@TOKENS
@pytest.mark.parametrize("batch_tokens", [1, 25, 1024])
def test_pairs_are_those_of_plain_autograd(family, tokens, batch_tokens):
    model = tiny.model_of(family)
    trunk = cut(model, batch_tokens=batch_tokens)
    names = [site.name for site in trunk.sites]
    expected = expected_pairs(model, names, QUESTIONS, tokens)
    assert min(grads.abs().max() for _, grads in expected) > 0.01
    captured = capture(trunk, QUESTIONS, tokens)
    assert_pairs(captured, expected, CLOSE[family])
    assert all(pair.keys_NK.dtype == torch.float64 for pair in captured)


@pytest.mark.parametrize("layers", [1, tiny.BLOCKS])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_number_of_layers(family, layers):
    model = tiny.model_of(family)
    trunk = cut(model, layers)
    names = [site.name for site in trunk.sites]
    assert_pairs(
        capture(trunk, QUESTIONS), expected_pairs(model, names, QUESTIONS, "answer"), CLOSE[family]
    )


@TOKENS
@pytest.mark.parametrize("descent", [None, Descent(3)])
def test_rows_follow_the_questions(tokens, descent):
    trunk = cut(tiny.model_of("llama"), batch_tokens=30)
    counts = [len(places(question, tokens)) for question in QUESTIONS]
    parts = [
        (pair.keys_NK.split(counts), pair.value_grads_NV.split(counts))
        for pair in capture(trunk, QUESTIONS, tokens, descent)
    ]
    order = [3, 0, 5, 1, 4, 2]
    expected = [
        (torch.cat([keys[i] for i in order]), torch.cat([grads[i] for i in order]))
        for keys, grads in parts
    ]
    shuffled = capture(trunk, [QUESTIONS[i] for i in order], tokens, descent)
    assert_pairs(shuffled, expected, 1e-9)


def test_loss_is_summed_not_averaged():
    # The same question twice: each copy has the gradient that it has alone.
    trunk = cut(tiny.model_of("llama"))
    (alone, *_) = capture(trunk, QUESTIONS[:1])
    (twice, *_) = capture(trunk, [QUESTIONS[0]] * 2)
    expected = (torch.cat([alone.keys_NK] * 2), torch.cat([alone.value_grads_NV] * 2))
    assert_pairs([twice], [expected], 1e-12)


@pytest.mark.parametrize("end", [True, False])
def test_end_token_is_part_of_the_loss_where_there_is_one(end):
    model = tiny.model_of("llama")
    questions = tiny.questions(3, end=end)
    trunk = cut(model)
    names = [site.name for site in trunk.sites]
    captured = capture(trunk, questions)
    assert len(captured[0].keys_NK) == sum(q.counted + end for q in questions)
    assert_pairs(captured, expected_pairs(model, names, questions, "answer"), 1e-10)


@pytest.mark.parametrize("descent", [None, Descent(2)])
def test_model_is_left_as_it_was(descent):
    model = tiny.model_of("llama")
    trunk = cut(model)
    before = {name: tiny.bits(weight) for name, weight in model.named_parameters()}
    capture(trunk, QUESTIONS, "all", descent)
    for name, weight in model.named_parameters():
        assert weight.grad is None
        assert not weight.requires_grad
        assert torch.equal(tiny.bits(weight), before[name])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_tensors_are_float32_at_least(dtype):
    model = tiny.model_of("llama", dtype)
    trunk = cut(model)
    names = [site.name for site in trunk.sites]
    for pair in capture(trunk, QUESTIONS, descent=Descent(1)):
        assert pair.keys_NK.dtype == pair.value_grads_NV.dtype == torch.float32
    captured = capture(trunk, QUESTIONS)
    assert {pair.value_grads_NV.dtype for pair in captured} == {torch.float32}
    expected = expected_pairs(model, names, QUESTIONS, "answer")
    for pair, (keys, grads) in zip(captured, expected, strict=True):
        near = 1e-4 if dtype == torch.float32 else 0.06
        assert (pair.keys_NK - keys).norm() < near * keys.norm()
        assert (pair.value_grads_NV - grads).norm() < near * grads.norm()


def test_works_inside_no_grad():
    trunk = cut(tiny.model_of("llama"))
    with torch.no_grad():
        inside = capture(trunk, QUESTIONS)
    outside = capture(trunk, QUESTIONS)
    assert torch.equal(inside[0].value_grads_NV, outside[0].value_grads_NV)
    assert not inside[0].value_grads_NV.requires_grad


def test_nothing_to_capture():
    captured = capture(cut(tiny.model_of("llama")), [])
    assert [(tuple(p.keys_NK.shape), tuple(p.value_grads_NV.shape)) for p in captured] == [
        ((0, tiny.INNER), (0, tiny.HIDDEN))
    ] * 2


def test_progress_counts_every_question():
    told = []
    capture(cut(tiny.model_of("llama"), batch_tokens=25), QUESTIONS, progress=told.append)
    assert sum(told) == len(QUESTIONS)
    assert len(told) > 1


class Fault(Exception):
    pass


def test_tracing_ends_in_a_fault():
    model = tiny.model_of("llama")
    with pytest.raises(Fault), tracing(find_sites(model, 2)):
        raise Fault
    assert not any(module._forward_hooks for module in model.modules())


def test_tracing_without_gradients_sees_keys_and_changes_nothing():
    model = tiny.model_of("llama")
    ids = torch.tensor([[3, 4, 5]])
    expected = model(input_ids=ids).logits
    with tracing(find_sites(model, 2), grads=False) as traces:
        logits = model(input_ids=ids).logits
    assert torch.equal(logits, expected)
    assert not logits.requires_grad
    assert [tuple(trace.keys.shape) for trace in traces] == [(3, tiny.INNER)] * 2


# --- the descent


def rows_of(captured, questions, tokens):
    """Per question, per site: keys and value gradients."""
    counts = [len(places(question, tokens)) for question in questions]
    split = [
        list(zip(p.keys_NK.split(counts), p.value_grads_NV.split(counts), strict=True))
        for p in captured
    ]
    return list(zip(*split, strict=True))


def confident(family):
    """A model whose logits are large enough that an answer can become likely at all."""
    model = tiny.model_of(family, tie_word_embeddings=False)
    head = model.get_output_embeddings().weight
    head.data = head.data * 5
    return model


def nll_of(model, names, questions, tokens, captured=None):
    """Loss of every answer token, after the captured moves if they are given; per question."""
    if captured is None:
        return [plainly(model, names, question)[2] for question in questions]
    found = []
    for question, rows in zip(questions, rows_of(captured, questions, tokens), strict=True):
        deltas = {name: -grads for name, (_, grads) in zip(names, rows, strict=True)}
        found.append(plainly(model, names, question, deltas, places(question, tokens))[2])
    return found


# Not for Gemma 2: what its layers can do to the residual is bounded by a norm.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@TOKENS
@pytest.mark.parametrize("layers", [1, 2])
def test_moves_take_every_answer_below_its_bound(family, tokens, layers):
    model = confident(family)
    trunk = cut(model, layers)
    names = [site.name for site in trunk.sites]
    descent = Descent(steps=120, rate=0.5, answer_nll=0.3, end_nll=0.6)
    assert torch.cat(nll_of(model, names, QUESTIONS, tokens)).mean() > 5
    captured = capture(trunk, QUESTIONS, tokens, descent)
    after = nll_of(model, names, QUESTIONS, tokens, captured)
    assert all((nll[:-1] <= descent.answer_nll).all() for nll in after)
    assert all(nll[-1] <= descent.end_nll for nll in after)
    assert torch.cat(after).max() > 0.05  # no further than asked


@DESCENDED
def test_the_default_comes_far(family):
    model = confident(family)
    trunk = cut(model)
    names = [site.name for site in trunk.sites]
    before = torch.cat(nll_of(model, names, QUESTIONS, "answer"))
    captured = capture(trunk, QUESTIONS, "answer", Descent())
    assert torch.cat(nll_of(model, names, QUESTIONS, "answer", captured)).sum() < before.sum() / 5


# So high that some tokens are done at the start, some on the way; and so low that some never are.
HIGH = {"answer_nll": 3.0, "end_nll": 4.3}
LOW = {"answer_nll": 1.5, "end_nll": 2.5}


def equation_6(model, names, question, tokens, descent):
    """Minus the moves of one question, and the keys of the unedited model."""
    at = places(question, tokens)
    deltas = {name: torch.zeros(len(at), tiny.HIDDEN, dtype=torch.float64) for name in names}
    first_keys = longest = None
    for _ in range(descent.steps):
        keys, grads, nll = plainly(model, names, question, deltas, at)
        first_keys = first_keys or {name: keys[name][at] for name in names}
        is_open = nll > descent.answer_nll
        if len(nll) > question.counted:
            is_open[question.counted :] = nll[question.counted :] > descent.end_nll
        loss = nll[is_open].sum()
        if not is_open.any():
            break
        # Of all tokens, every one moves while anything is open; of the answer's, the open ones do.
        moving = is_open if tokens == "answer" else torch.ones(len(at), dtype=torch.bool)
        sizes = {name: grads[name][at].norm(dim=1) for name in names}
        pull = sum((sizes[name] * moving).sum() for name in names)
        length = descent.rate * loss / pull
        longest = 10 * length if longest is None else longest
        length = min(length, longest)
        for name in names:
            for row in moving.nonzero().flatten().tolist():
                if sizes[name][row] > 0:
                    unit = grads[name][at[row]] / sizes[name][row]
                    deltas[name][row] -= length * unit
    return first_keys, {name: -delta for name, delta in deltas.items()}


@DESCENDED
@TOKENS
@pytest.mark.parametrize(("steps", "bounds"), [(1, HIGH), (3, HIGH), (12, HIGH), (12, LOW)])
def test_descent_is_equation_6(family, tokens, steps, bounds):
    model = tiny.model_of(family)
    trunk = cut(model)
    names = [site.name for site in trunk.sites]
    descent = Descent(steps, rate=0.3, **bounds)
    rows = rows_of(capture(trunk, QUESTIONS, tokens, descent), QUESTIONS, tokens)
    for question, mine in zip(QUESTIONS, rows, strict=True):
        keys, moves = equation_6(model, names, question, tokens, descent)
        for name, (my_keys, my_moves) in zip(names, mine, strict=True):
            close = CLOSE[family]
            assert torch.allclose(my_keys, keys[name], rtol=0, atol=close)
            assert torch.allclose(my_moves, moves[name], rtol=0, atol=100 * close)
            assert my_moves.abs().max() > 0.01


def test_high_bounds_are_met_at_the_start_by_some_and_on_the_way_by_others():
    trunk = cut(tiny.model_of("llama"))
    (one, *_), (two, *_), (three, *_) = (
        capture(trunk, QUESTIONS, "answer", Descent(steps, 0.3, **HIGH)) for steps in (1, 2, 3)
    )
    never = (one.value_grads_NV == 0).all(1)
    early = (one.value_grads_NV == two.value_grads_NV).all(1)
    late = (two.value_grads_NV == three.value_grads_NV).all(1)
    assert 0 < never.sum() < early.sum() < late.sum() < len(late)


@TOKENS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_fact_is_descended_alone(family, tokens):
    # Some are done after a step or two, some never; no batch and no company changes any.
    model = tiny.model_of(family)
    descent = Descent(8, rate=0.5, answer_nll=0.8, end_nll=1.5)
    alone = [
        capture(cut(model, batch_tokens=1), [question], tokens, descent) for question in QUESTIONS
    ]
    expected = [
        (
            torch.cat([pairs[i].keys_NK for pairs in alone]),
            torch.cat([pairs[i].value_grads_NV for pairs in alone]),
        )
        for i in range(2)
    ]
    for batch_tokens in (1, 25, 1024):
        trunk = cut(model, batch_tokens=batch_tokens)
        assert_pairs(capture(trunk, QUESTIONS, tokens, descent), expected, 100 * CLOSE[family])


def test_what_is_likely_already_does_not_move():
    trunk = cut(tiny.model_of("llama"))
    lax = Descent(answer_nll=100.0, end_nll=100.0)
    captured = capture(trunk, QUESTIONS, "answer", lax)
    assert all((pair.value_grads_NV == 0).all() for pair in captured)
    plain = capture(trunk, QUESTIONS)
    assert torch.equal(captured[0].keys_NK, plain[0].keys_NK)


def test_the_end_token_has_a_bound_of_its_own():
    trunk = cut(tiny.model_of("llama"), 1)
    ends = torch.tensor([i == q.counted for q in QUESTIONS for i in range(len(q.labels))])
    (only_answers,) = capture(trunk, QUESTIONS, "answer", Descent(1, end_nll=100.0))
    (only_ends,) = capture(trunk, QUESTIONS, "answer", Descent(1, answer_nll=100.0))
    assert ((only_answers.value_grads_NV.norm(dim=1) == 0) == ends).all()
    assert ((only_ends.value_grads_NV.norm(dim=1) > 0) == ends).all()


def test_first_step_takes_off_the_asked_share_to_first_order():
    # sum over j, l of <g_jl, -delta_jl> = rate * L, which is what makes it a Polyak step.
    trunk = cut(tiny.model_of("llama"))
    question = QUESTIONS[:1]
    plain = capture(trunk, question)
    moved = capture(trunk, question, "answer", Descent(1, 0.37, 0.0, 0.0))
    gain = sum(
        (p.value_grads_NV * m.value_grads_NV).sum() for p, m in zip(plain, moved, strict=True)
    )
    logits = tiny.logits_alone(trunk.model, question)
    loss = functional.cross_entropy(logits, torch.tensor(question[0].labels), reduction="sum")
    assert gain.item() == pytest.approx(0.37 * loss.item(), rel=1e-9)


def test_one_token_prompt():
    trunk = cut(tiny.model_of("llama"))
    asked = [Encoded((5, 6, 0), 1, 2)]
    names = [site.name for site in trunk.sites]
    for tokens in ("answer", "all"):
        expected = expected_pairs(trunk.model, names, asked, tokens)
        assert_pairs(capture(trunk, asked, tokens), expected, 1e-10)


@TOKENS
@pytest.mark.parametrize("batch_tokens", [1, 1024])
def test_keys_without_gradients_are_those_that_are_captured(tokens, batch_tokens):
    trunk = cut(tiny.model_of("llama"), batch_tokens=batch_tokens)
    with_gradients = capture(trunk, QUESTIONS, tokens)
    for keys, pair in zip(keys_of(trunk, QUESTIONS, tokens), with_gradients, strict=True):
        assert keys.dtype == torch.float64
        torch.testing.assert_close(keys, pair.keys_NK.double(), rtol=1e-10, atol=1e-10)


def test_tokens_of_one_capture_follow_those_of_another():
    trunk = cut(tiny.model_of("llama"))
    first, *_ = capture(trunk, QUESTIONS[:2])
    second, *_ = capture(trunk, QUESTIONS[2:])
    both, *_ = capture(trunk, QUESTIONS)
    joined = first.followed(second)
    torch.testing.assert_close(joined.keys_NK, both.keys_NK)
    torch.testing.assert_close(joined.value_grads_NV, both.value_grads_NV)
    assert torch.equal(joined.ends_N, both.ends_N)
    without = first.followed(Captured(second.keys_NK, second.value_grads_NV))
    assert without.ends_N.tolist() == [*first.ends_N.tolist(), *[False] * len(second.keys_NK)]
    assert joined.room is trunk.room
