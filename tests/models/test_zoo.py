"""Every family end to end: the right layers, the same logits, true gradients, an edit that takes.

All against the whole model, one question at a time, which knows no trunk, no hook and no padding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.settings import training_free
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.load import prepared
from malmend.models.sites import around, find_sites
from malmend.models.trunk import Trunk
from malmend.numerics.moments import RunningMoments
from malmend.patch import applied, make_patch

FAMILY = pytest.mark.parametrize("family", tiny.EVERY)
LAYOUTS = ("llama", "gpt2", "gemma2", "falcon")  # of blocks; the others for `make thorough`
IN_LAYOUTS = pytest.mark.parametrize(
    "family",
    [
        family if family in LAYOUTS else pytest.param(family, marks=pytest.mark.slow)
        for family in tiny.FAMILIES + tiny.ZOO
    ],
)
QUESTIONS = tiny.questions(5)
# In a Conv1D the weight is K x V; GPT-Neo has only its names.
STORED_TRANSPOSED = ("gpt2",)
# Where the layer's output does not reach the block's output as it is, the whole block is run again.
NORMED, SCALED = ("gemma2", "gemma3", "olmo2"), ("granite",)


def cut(model, layers=2):
    return Trunk(model, find_sites(model, layers))


def head_logits(trunk, questions=QUESTIONS):
    """Padded into one batch, in the questions' order."""
    with torch.no_grad():
        return trunk.logits(trunk.batch(questions))


def cut_at_a_block(model, sites):
    """As for an edit that settles: the layers around these are there too."""
    trunk = Trunk(model, around(model, sites)).at([site.name for site in sites])
    assert trunk.cut.place == "block"
    return trunk


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def pairs_alone(model, sites, question):
    """Per site, keys and gradients at all positions: zeros added to the outputs, and autograd."""
    keys, zeros = [], []

    def add_zero(_module, args, output):
        keys.append(args[0].reshape(-1, args[0].shape[-1]))
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handles = [site.module.register_forward_hook(add_zero) for site in sites]
    logits = model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    labels = torch.tensor(question.labels)
    loss = torch.nn.functional.cross_entropy(
        logits[list(question.sources)], labels, reduction="sum"
    )
    grads = torch.autograd.grad(loss, zeros)
    return [
        (key_TK.detach(), grad.reshape(len(key_TK), -1))
        for key_TK, grad in zip(keys, grads, strict=True)
    ]


def random_shifts(sites, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: size * torch.randn(site.shape_VK, generator=generator, dtype=torch.float64)
        for site in sites
    }


def patch_of(loaded, shifts):
    return make_patch(shifts, tokens=10**6, provenance={"base": loaded.fingerprint})


# --- the checks of every family


@FAMILY
def test_sites_are_the_second_layers_of_the_last_blocks(family):
    model = tiny.model_of(family)
    for layers in (1, 2, tiny.BLOCKS):
        sites = find_sites(model, layers)
        blocks = range(tiny.BLOCKS - layers, tiny.BLOCKS)
        assert [site.name for site in sites] == [tiny.SECOND[family].format(i) for i in blocks]
        assert {site.shape_VK[0] for site in sites} == {tiny.HIDDEN}
        assert {site.is_transposed for site in sites} == {family in STORED_TRANSPOSED}
        assert all(site.module is model.get_submodule(site.name) for site in sites)


@FAMILY
@pytest.mark.parametrize("layers", [2, tiny.BLOCKS])
def test_logits_are_the_whole_models_before_and_after_an_edit(family, layers):
    model = tiny.model_of(family)
    trunk = cut(model, layers)
    unedited = tiny.logits_alone(model, QUESTIONS)
    assert unedited.std() > 0.3
    assert_same(head_logits(trunk), unedited)
    loaded = prepared(model, None)
    with applied(loaded, patch_of(loaded, random_shifts(trunk.sites))):
        edited = tiny.logits_alone(model, QUESTIONS)
        assert (edited - unedited).abs().max() > 0.1
        assert_same(head_logits(trunk), edited)
        one_by_one = torch.cat([head_logits(trunk, [question]) for question in QUESTIONS])
        assert_same(one_by_one, edited)


@FAMILY
def test_where_the_cut_lies(family):
    expected = "block" if family in NORMED + SCALED else "site"
    assert cut(tiny.model_of(family)).cut.place == expected


@FAMILY
@pytest.mark.parametrize("place", [cut, cut_at_a_block])
def test_captured_pairs_are_those_of_autograd(family, place):
    """At a block too, where Falcon adds the attention to what the layer gave in place."""
    model = tiny.model_of(family)
    trunk = cut(model) if place is cut else cut_at_a_block(model, find_sites(model, 2))
    alone = [pairs_alone(model, trunk.sites, question) for question in QUESTIONS]
    for tokens in ("answer", "all"):
        places = [
            list(question.sources) if tokens == "answer" else list(range(1, len(question.ids)))
            for question in QUESTIONS
        ]
        for index, pair in enumerate(capture(trunk, QUESTIONS, tokens)):
            rows = zip((pairs[index] for pairs in alone), places, strict=True)
            keys, grads = zip(*((keys[at], grads[at]) for (keys, grads), at in rows), strict=True)
            assert torch.cat(grads).abs().max() > 0.01
            assert_same(pair.keys_NK, torch.cat(keys))
            assert_same(pair.value_grads_NV, torch.cat(grads))


@IN_LAYOUTS
def test_in_low_precision_pairs_are_those_of_autograd_but_for_rounding(family):
    model = tiny.model_of(family, torch.bfloat16)
    trunk = cut(model)
    assert trunk.cut.place == "block"
    alone = [pairs_alone(model, trunk.sites, question) for question in QUESTIONS]
    moves = capture(trunk, QUESTIONS, descent=Descent(2))
    for index, pair in enumerate(capture(trunk, QUESTIONS)):
        rows = [
            (pairs[index], list(one.sources)) for pairs, one in zip(alone, QUESTIONS, strict=True)
        ]
        keys, grads = (torch.cat([pairs[n][at] for pairs, at in rows]).float() for n in (0, 1))
        assert (pair.keys_NK - keys).norm() < 0.06 * keys.norm()
        assert (pair.value_grads_NV - grads).norm() < 0.06 * grads.norm()
        assert moves[index].value_grads_NV.isfinite().all()
        assert (moves[index].value_grads_NV.norm(dim=1) > 0).any()


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_patch_comes_off_bit_for_bit(family, dtype):
    model = tiny.model_of(family, dtype)
    before = {name: tiny.bits(weight) for name, weight in model.state_dict().items()}
    loaded, sites = prepared(model, None), find_sites(model, 2)
    with applied(loaded, patch_of(loaded, random_shifts(sites))):
        changed = {
            name
            for name, weight in model.state_dict().items()
            if not torch.equal(tiny.bits(weight), before[name])
        }
        assert changed == {f"{site.name}.weight" for site in sites}
    after = {name: tiny.bits(weight) for name, weight in model.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def untrained_editor(trunk, settings, captured, others):
    """Statistics of the edit itself; the prior holds the keys of other questions."""
    known = {}
    for site, pair, other in zip(trunk.sites, captured, others, strict=True):
        value_width, key_width = site.shape_VK
        text_KK = other.keys_NK.T @ other.keys_NK / len(other.keys_NK)
        one = SiteStatistics(
            RunningMoments(key_width), RunningMoments(value_width), {"text": text_KK}
        )
        one.keys.add(pair.keys_NK)
        one.value_grads.add(pair.value_grads_NV)
        known[site.name] = one
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    return Editor(settings, shapes, known, weights=[0.01], ridge=0.01)


def surprise(model, question):
    """Mean loss of a question's labels."""
    logits_AW = tiny.logits_alone(model, [question])
    return torch.nn.functional.cross_entropy(logits_AW, torch.tensor(question.labels)).item()


@FAMILY
def test_an_edit_makes_the_answer_the_first_choice(family):
    model = tiny.model_of(family, tie_word_embeddings=False)
    model.get_output_embeddings().weight.mul_(5)  # so that an answer can become likely at all
    asked, layers = [one for one in tiny.questions(30, seed=5) if one.counted == 3][:1], 1
    if family in NORMED:  # which bounds what a layer can do: then two of them, and one near token
        asked, layers = (
            [one for one in tiny.questions(30, seed=5, end=False) if one.counted == 1],
            2,
        )
    question = min(
        (one for one in asked if surprise(model, one) > 3), key=lambda one: surprise(model, one)
    )
    trunk = cut(model, layers)
    settings = replace(training_free(), prior="text", descent=Descent(40, rate=0.5))
    captured = capture(trunk, [question], settings.tokens, settings.descent)
    others = capture(trunk, tiny.questions(7, seed=6), "all")
    shifts = untrained_editor(trunk, settings, captured, others).shifts(captured)
    loaded = prepared(model, None)
    with applied(loaded, patch_of(loaded, shifts)):
        chosen = tiny.logits_alone(model, [question]).argmax(1).tolist()
    assert chosen[: question.counted] == list(question.labels[: question.counted])
