"""The last block's feed-forward part at the answer tokens alone, against the whole model."""

from __future__ import annotations

import copy
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

import forms_support
import tiny
from malmend.facts.encoded import collate
from malmend.models import ending as ending_module
from malmend.models.ending import Ending
from malmend.models.forms import find_stacks
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.models.weightgrads import Term, saying, weight_grads

FAMILIES = [*tiny.FAMILIES, *tiny.PECULIAR]
QUESTIONS = tiny.questions(7)
CLOSE = dict.fromkeys(FAMILIES, 1e-11) | {"gptj": 1e-5, "gemma2": 1e-5}


def trunk_of(model, layers=2):
    return Trunk(model, find_sites(model, layers), TrunkSettings(1024))


@contextmanager
def rows_seen(part):
    """How many rows a part is given, each time it is run by whatever its forward now is."""
    seen, calls = [], type(part).forward

    def forward(self, *args):
        if self is part:
            seen.append(args[0].shape[:-1].numel())
        return calls(self, *args)

    type(part).forward = forward
    try:
        yield seen
    finally:
        type(part).forward = calls


def part_of(model):
    return Ending(model, find_stacks(model)[-1].blocks[-1]).part


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_feed_forward_part_and_sees_the_answer_tokens_alone(family):
    model = tiny.model_of(family)
    part = part_of(model)
    last = find_sites(model, 1)[0]
    assert part is not None
    assert last.module in list(part.modules())
    trunk = trunk_of(model)
    batch = trunk.batch(QUESTIONS)
    with rows_seen(part) as seen, torch.no_grad():
        trunk.final_states(batch)
    assert seen == [sum(len(one.sources) for one in QUESTIONS)]
    assert seen[0] < batch.tokens.ids_BT.numel() / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd_through_the_whole_model(family):
    model = tiny.model_of(family)
    trunk = trunk_of(model)
    losses, grads = weight_grads(trunk, [Term(QUESTIONS, saying(trunk), 0.7)])
    wanted = {}
    for site in trunk.sites:
        site.weight.requires_grad_(True)
    logits = tiny.logits_alone(model, QUESTIONS)
    labels = torch.tensor([label for one in QUESTIONS for label in one.labels])
    nll = nn.functional.cross_entropy(logits, labels, reduction="none")
    (0.7 * nll.sum()).backward()
    for site in trunk.sites:
        wanted[site.name] = site.oriented(site.weight.grad).clone()
        site.weight.grad = None
        site.weight.requires_grad_(False)
    assert losses[0].sum().item() == pytest.approx(nll.sum().item(), rel=CLOSE[family] * 10)
    for name, grad in wanted.items():
        assert grad.norm() > 0
        assert (grads[name] - grad).norm() <= 10 * CLOSE[family] * grad.norm()


@pytest.mark.parametrize("family", forms_support.PAIRS)
def test_of_a_decoder_beside_an_encoder_it_is_the_decoders(family):
    model = forms_support.model_of(family)
    part, asked = part_of(model), forms_support.questions(family)
    assert part in list(find_stacks(model)[-1].blocks[-1].modules())
    trunk = Trunk(model, find_sites(model, 2), TrunkSettings(1024))
    with rows_seen(part) as seen, torch.no_grad():
        found = trunk.logits(trunk.batch(asked))
    assert seen == [len(found)]
    assert (found - forms_support.logits_alone(model, asked)).abs().max() < 1e-5


def test_a_hook_in_the_block_sees_every_token():
    model = tiny.model_of("llama")
    trunk = trunk_of(model)
    batch, part = trunk.batch(QUESTIONS), part_of(model)
    every = batch.tokens.ids_BT.numel()
    shapes = []
    handle = part.up_proj.register_forward_hook(
        lambda _module, args, _out: shapes.append(args[0].shape[:-1].numel())
    )
    with rows_seen(part) as seen, torch.no_grad():
        trunk.final_states(batch)
        handle.remove()
        trunk.final_states(batch)
    assert shapes == [every]
    assert seen == [every, sum(len(one.sources) for one in QUESTIONS)]


def test_what_a_block_reads_at_its_end_from_other_tokens_is_not_left_out():
    class Mixing(nn.Linear):
        def forward(self, states):
            return super().forward(states.cumsum(-2))

    model = copy.deepcopy(tiny.model_of("llama"))
    block = find_stacks(model)[-1].blocks[-1]
    inner = block.mlp.down_proj
    block.mlp.down_proj = Mixing(inner.in_features, inner.out_features, bias=False).double()
    assert Ending(model, block).part is None


def test_a_part_that_gives_more_than_its_states_is_run_whole():
    class Telling(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return self.inner(states), None

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.told = block, Telling(nn.Linear(tiny.HIDDEN, tiny.HIDDEN).double())

        def forward(self, states, **given):
            return states + self.told(self.block(states, **given))[0]

    model = copy.deepcopy(tiny.model_of("llama"))
    blocks = find_stacks(model)[-1].blocks
    blocks[-1] = Block(blocks[-1])
    assert Ending(model, blocks[-1]).part is None


def test_the_part_is_as_before_after_an_error():
    model = tiny.model_of("llama")
    block = find_stacks(model)[-1].blocks[-1]
    ending = Ending(model, block)
    tokens = collate(QUESTIONS)
    with suppress(KeyError), ending.at_answers(tokens):
        assert "forward" in ending.part.__dict__
        raise KeyError
    assert "forward" not in ending.part.__dict__


def test_other_widths_and_flattened_states():
    layer, flat_A = nn.Linear(3, 5).double(), torch.tensor([1, 4])
    for shape in ((6, 3), (2, 3, 3), (1, 2, 3, 3)):
        states = torch.randn(shape, dtype=torch.float64)
        found = ending_module._at(flat_A, layer.forward)(states)
        assert found.shape == (*shape[:-1], 5)
        wanted = torch.zeros(6, 5, dtype=torch.float64)
        wanted[flat_A] = layer(states.reshape(6, 3)[flat_A])
        assert torch.allclose(found.reshape(6, 5), wanted, rtol=1e-13, atol=0)
