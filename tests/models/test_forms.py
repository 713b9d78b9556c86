"""Encoders with a classification head and encoder-decoders, against the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import forms_support as forms
from malmend.errors import ModelError
from malmend.facts.encoded import Encoded
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.forms import find_stacks, form_of
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import shifted

FAMILY = pytest.mark.parametrize("family", forms.FAMILIES)
LINEAR = pytest.mark.parametrize("linear", ["first", "second"])
CLOSE = 1e-10  # of logits up to a hundred
SIDED = [(family, "both") for family in forms.FAMILIES]
SIDED += [(family, side) for family in forms.PAIRS for side in ("encoder", "decoder")]
SIDE = pytest.mark.parametrize(("family", "side"), SIDED)


def cut(model, layers=2, linear="second", side="both", batch_tokens=1024, folder=None):
    sites = find_sites(model, layers, None, linear, side)
    return Trunk(model, sites, TrunkSettings(batch_tokens), folder)


def head_logits(trunk, asked):
    rows = [torch.empty(0)] * len(asked)
    with torch.no_grad():
        for indices, batch in trunk.batches(asked):
            parts = trunk.logits(batch).split([len(asked[i].sources) for i in indices])
            for index, part in zip(indices, parts, strict=True):
                rows[index] = part
    return torch.cat(rows)


def noise(trunk, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    return {
        site.name: scale * torch.randn(site.shape_VK, generator=generator, dtype=torch.float64)
        for site in trunk.sites
    }


# --- which layers


@FAMILY
@LINEAR
def test_sites_by_structure(family, linear):
    name = forms.LAYERS[family][linear == "second"]
    found = find_sites(forms.model_of(family), 2, None, linear)
    wanted = [(name.format(index), False) for index in (1, 2)]
    if family in forms.PAIRS:
        wanted = [(name, True) for name, _ in wanted]
        wanted += [(forms.decoder_layer(name).format(index), False) for index in (0, 1)]
    assert [(site.name, site.in_encoder) for site in found] == wanted
    shape = (forms.HIDDEN, forms.INNER)
    assert {site.shape_VK for site in found} == {shape if linear == "second" else shape[::-1]}


@pytest.mark.parametrize("family", forms.PAIRS)
def test_sides_of_an_encoder_decoder(family):
    model = forms.model_of(family)
    for side, inside in (("encoder", {True}), ("decoder", {False})):
        sites = find_sites(model, 1, None, "second", side)
        assert {site.in_encoder for site in sites} == inside
        assert len(sites) == 1
    by_name = find_sites(model, pattern="*encoder*.1.*")
    assert {site.in_encoder for site in by_name} == {True}


def test_an_only_stack_has_no_side():
    with pytest.raises(ModelError, match=r"no side 'decoder'; leave --side out"):
        find_sites(forms.model_of("bert"), 1, None, "second", "decoder")


def test_more_layers_than_the_shorter_half_has():
    with pytest.raises(ModelError, match="expected 1 to 2"):
        find_sites(forms.model_of("t5"), 3)
    assert len(find_sites(forms.model_of("t5"), 3, None, "second", "encoder")) == 3


# --- trunk and head


@SIDE
@LINEAR
def test_logits_are_the_whole_models_before_and_after_an_edit(family, side, linear):
    model, asked = forms.model_of(family), forms.questions(family)
    before = forms.logits_alone(model, asked)
    assert before.std() > 0.1
    for layers in (1, 2):
        whole = cut(model, layers, linear, side)
        with shifted(list(whole.sites), noise(whole)):
            after = forms.logits_alone(model, asked)
        assert (after - before).abs().max() > 1e-3
        for batch_tokens in (1, 40, 1024):
            trunk = cut(model, layers, linear, side, batch_tokens)
            assert (head_logits(trunk, asked) - before).abs().max() < CLOSE
            with shifted(list(trunk.sites), noise(trunk)):
                assert (head_logits(trunk, asked) - after).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("family", "side", "place"),
    [
        ("bert", "both", "block"),
        ("t5", "both", "site"),
        ("t5-gated", "encoder", "site"),
        ("t5", "decoder", "encoder"),
        ("bart", "both", "block"),
        ("bart", "decoder", "encoder"),
    ],
)
def test_where_the_cut_lies(family, side, place):
    trunk = cut(forms.model_of(family), 1, "second", side)
    assert trunk.cut.place == place
    assert trunk.cut.below  # something is saved


def test_a_cut_in_the_first_block_keeps_what_it_hands_down():
    model, asked = forms.model_of("t5"), forms.questions("t5")
    trunk = cut(model, forms.BLOCKS, "second", "encoder")
    assert trunk.cut.place == "block"
    assert (head_logits(trunk, asked) - forms.logits_alone(model, asked)).abs().max() < CLOSE


def test_a_model_whose_blocks_cannot_be_skipped_is_run_from_the_first():
    class Counting(nn.Module):
        """A block that needs what the one below left behind."""

        def __init__(self, block, shared):
            super().__init__()
            self.block, self.shared = block, shared

        def forward(self, states, *args, **kwargs):
            self.shared.append(states[:, :1, :1] + sum(self.shared[-1:]))
            return self.block(states, *args, **kwargs) + self.shared[-1]

    model, asked = forms.model_of("bert"), forms.questions("bert")
    shared: list = []
    stack = find_stacks(model)[0]
    for index, block in enumerate(stack.blocks):
        stack.blocks[index] = Counting(block, shared)
    stack.blocks[0].register_forward_pre_hook(lambda *_: shared.clear())
    trunk = cut(model, 1)
    assert (trunk.cut.place, trunk.cut.index) == ("block", 0)
    assert (head_logits(trunk, asked) - forms.logits_alone(model, asked)).abs().max() < CLOSE


@SIDE
def test_final_states_give_the_logits(family, side, tmp_path):
    model, asked = forms.model_of(family), forms.questions(family)
    expected = forms.logits_alone(model, asked)
    for _ in range(2):  # made, then read from the store
        trunk = cut(model, 1, "second", side, 40, tmp_path)
        states = trunk.unedited_states(asked)
        with torch.no_grad():
            assert (trunk.logits_of(torch.cat(states)) - expected).abs().max() < CLOSE
        assert (head_logits(trunk, asked) - expected).abs().max() < CLOSE


@FAMILY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(family, dtype):
    model, asked = forms.model_of(family, dtype), forms.questions(family)
    trunk = cut(model)
    for question in asked:  # one at a time: padding may choose another kernel
        assert torch.equal(head_logits(trunk, [question]), forms.logits_alone(model, [question]))


@FAMILY
def test_the_model_is_left_as_it_was(family):
    model, asked = forms.model_of(family), forms.questions(family)
    before = forms.logits_alone(model, asked)
    trunk = cut(model)
    capture(trunk, asked, "answer", Descent(2))
    trunk.unedited_states(asked)
    assert torch.equal(forms.logits_alone(model, asked), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert not any(p.requires_grad for p in model.parameters())


# --- capture


@SIDE
@LINEAR
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_pairs_are_those_of_plain_autograd(family, side, linear, tokens):
    model, asked = forms.model_of(family), forms.questions(family)
    sites = find_sites(model, 2, None, linear, side)
    found = [forms.pairs_alone(model, sites, question) for question in asked]
    for batch_tokens in (1, 1024):
        trunk = cut(model, 2, linear, side, batch_tokens)
        captured = capture(trunk, asked, tokens)
        for index, (site, pair) in enumerate(zip(trunk.sites, captured, strict=True)):
            at = [forms.places(site, question, tokens) for question in asked]
            keys = [one[0][index][here] for one, here in zip(found, at, strict=True)]
            grads = [one[1][index][here] for one, here in zip(found, at, strict=True)]
            assert torch.allclose(pair.keys_NK, torch.cat(keys), rtol=0, atol=1e-10)
            assert torch.allclose(pair.value_grads_NV, torch.cat(grads), rtol=0, atol=1e-10)
            assert pair.value_grads_NV.abs().max() > 1e-3


@SIDE
def test_end_tokens_are_marked_where_they_are_put_out(family, side):
    trunk = cut(forms.model_of(family), 1, "second", side)
    asked = forms.questions(family)
    for site, pair in zip(trunk.sites, capture(trunk, asked), strict=True):
        has_end = family in forms.PAIRS and not site.in_encoder
        assert pair.ends_N.sum() == (len(asked) if has_end else 0)


@SIDE
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_descent_is_equation_6(family, side, tokens):
    """Every question by itself; of a site whose tokens say no answer, all of them move."""
    model, asked = forms.model_of(family), forms.questions(family)
    trunk = cut(model, 2, "second", side)
    descent = Descent(4, 0.4, answer_nll=1.0, end_nll=2.0)
    captured = capture(trunk, asked, tokens, descent)
    starts = [0] * len(trunk.sites)
    moved = 0
    for question in asked:
        at = [forms.places(site, question, tokens) for site in trunk.sites]
        keys, grads, _ = forms.pairs_alone(model, trunk.sites, question)
        deltas = {s.name: torch.zeros_like(g) for s, g in zip(trunk.sites, grads, strict=True)}
        first = None
        for _ in range(descent.steps):
            _, grads, nll = forms.pairs_alone(model, trunk.sites, question, deltas)
            bounds = torch.full_like(nll, descent.answer_nll)
            bounds[question.answer_end - question.answer_start :] = descent.end_nll
            is_open = nll > bounds
            if not is_open.any():
                break
            moving = [
                torch.ones(len(here), dtype=torch.bool)
                if site.in_encoder or tokens == "all"
                else is_open
                for site, here in zip(trunk.sites, at, strict=True)
            ]
            norms = [grad[here].norm(dim=1) for grad, here in zip(grads, at, strict=True)]
            pull = sum((n * m).sum() for n, m in zip(norms, moving, strict=True))
            size = descent.rate * nll[is_open].sum() / pull
            first = size if first is None else first
            size = min(size, 10 * first)
            for site, grad, here, norm, which in zip(
                trunk.sites, grads, at, norms, moving, strict=True
            ):
                step = size * which / norm.clamp(min=1e-30)
                deltas[site.name][here] -= step.unsqueeze(1) * grad[here]
        for index, (site, pair) in enumerate(zip(trunk.sites, captured, strict=True)):
            rows = slice(starts[index], starts[index] + len(at[index]))
            starts[index] = rows.stop
            wanted = -deltas[site.name][at[index]]
            assert torch.allclose(pair.keys_NK[rows], keys[index][at[index]], rtol=0, atol=1e-9)
            assert torch.allclose(pair.value_grads_NV[rows], wanted, rtol=0, atol=1e-6)
            moved += bool(wanted.abs().max() > 1e-2)
    assert moved > len(asked) / 2
    assert starts == [len(pair.keys_NK) for pair in captured]


# --- what is refused


def test_forms():
    assert {family: form_of(forms.model_of(family)) for family in forms.FAMILIES} == dict.fromkeys(
        forms.ENCODERS, "classes"
    ) | dict.fromkeys(forms.PAIRS, "seq2seq")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: BertModel(BertConfig(**forms._BERT)), "BertModel has no output layer"),
        (
            lambda: BertForSequenceClassification(BertConfig(**forms._BERT | {"num_labels": 1})),
            "1 outputs.*chooses one of two or more classes",
        ),
        (
            lambda: BertForSequenceClassification(
                BertConfig(**forms._BERT, problem_type="multi_label_classification")
            ),
            "multi_label_classification.*chooses one",
        ),
        (
            lambda: BartForSequenceClassification(BartConfig(**forms._BART)),
            "must be an encoder that chooses",
        ),
    ],
)
def test_a_model_of_no_form_is_refused_in_a_sentence(build, said):
    with pytest.raises(ModelError, match=said) as caught:
        prepared(build(), None)
    assert "expected a decoder, an encoder with a classification head" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offloaded_weights_are_refused():
    model = T5ForConditionalGeneration(T5Config(**forms._T5))
    model.decoder.block[0].to("meta")
    with pytest.raises(ModelError, match=r"decoder\.block\.0.* is offloaded.*device_map"):
        prepared(model, None)


def test_both_sides_of_an_encoder_decoder_are_within_the_limit():
    """A long prompt beside a long answer is padded to the sum of both."""
    sizes = [(30, 2), (4, 28), (30, 2), (4, 28), (5, 3)]
    asked = [
        Encoded((3,) * (read + said), read, read + said, "seq2seq", (0,)) for read, said in sizes
    ]
    trunk, seen = cut(forms.model_of("t5"), batch_tokens=130), []
    for indices, batch in trunk.batches(asked):
        seen += indices
        assert batch.tokens.ids_BT.numel() + batch.tokens.decoded_BD.numel() <= 130
    assert sorted(seen) == [0, 1, 2, 3, 4]
