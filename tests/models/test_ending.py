"""The last block's feed-forward part at the answer tokens alone, against the whole model."""

from __future__ import annotations

import copy
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

import helpers
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2"])
def test_of_a_prompt_whose_keys_and_values_are_kept_it_sees_one_token(family):
    model = tiny.model_of(family)
    trunk = trunk_of(model)
    batch = trunk.batch(QUESTIONS)
    assert trunk.suffix(batch) is not None  # which tries it first
    with rows_seen(part_of(model)) as seen, torch.no_grad():
        suffix = trunk.suffix(batch)
        assert seen == [1]
        found = suffix.logits()
    assert (found - tiny.logits_alone(model, QUESTIONS)).abs().max() < CLOSE[family]


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(family, dtype):
    model = tiny.model_of(family, dtype)
    assert part_of(model) is not None
    trunk = trunk_of(model)
    with torch.no_grad():
        found = trunk.logits(trunk.batch(QUESTIONS)).float()
    expected = tiny.logits_alone(model, QUESTIONS).float()
    share = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (found - expected).abs().max() < share * expected.abs().max()


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(
        lambda _module, args, _out: seen.append(args[0])
    ),
    "before forward": lambda module, seen: module.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    ),
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda _module, grads, _out: seen.append(grads[0])
    ),
    "before backward": lambda module, seen: module.register_full_backward_pre_hook(
        lambda _module, grads: seen.append(grads[0])
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["mlp.up_proj", "mlp", "input_layernorm"])
def test_while_a_hook_is_in_the_block_every_token_is_run(kind, where):
    model = copy.deepcopy(tiny.model_of("llama"))
    trunk = trunk_of(model)
    batch, part = trunk.batch(QUESTIONS), part_of(model)
    every, answers = batch.tokens.ids_BT.numel(), sum(len(one.sources) for one in QUESTIONS)
    looked_at: list[torch.Tensor] = []
    with rows_seen(part) as seen:
        handle = HOOKS[kind](find_stacks(model)[-1].blocks[-1].get_submodule(where), looked_at)
        weight_grads(trunk, [Term(QUESTIONS, saying(trunk), 1.0)])
        handle.remove()
        weight_grads(trunk, [Term(QUESTIONS, saying(trunk), 1.0)])
    assert [one.shape[:-1].numel() for one in looked_at] == [every]
    assert seen == [every, answers]


def test_a_hook_on_the_block_itself_sees_what_every_token_gives():
    model = copy.deepcopy(tiny.model_of("llama"))
    trunk, given = trunk_of(model), []
    batch = trunk.batch(QUESTIONS)
    handle = (
        find_stacks(model)[-1]
        .blocks[-1]
        .register_forward_hook(
            lambda _module, _args, out: given.append(out if torch.is_tensor(out) else out[0])
        )
    )
    with torch.no_grad():
        trunk.final_states(batch)
        handle.remove()
        whole = model(input_ids=batch.tokens.ids_BT, output_hidden_states=False).logits
        norm, head = model.model.norm, model.lm_head
        mask = batch.tokens.mask_BT.bool()
        # The two round otherwise, in float32 inside; with a part left out they differ by 1.
        assert (head(norm(given[0])) - whole)[mask].abs().max() < 1e-5


def test_where_a_hook_keeps_it_from_being_tried_nothing_is_left_out():
    model = copy.deepcopy(tiny.model_of("llama"))
    handle = find_stacks(model)[-1].blocks[-1].register_forward_hook(lambda *_: None)
    trunk = trunk_of(model)
    handle.remove()
    assert trunk.cut._ending is None


def test_a_model_of_fewer_positions_than_the_trial_is_run_whole():
    model = copy.deepcopy(tiny.model_of("gpt2"))
    positions = model.transformer.wpe
    positions.weight = nn.Parameter(positions.weight.detach()[:8], requires_grad=False)
    asked = [one for one in QUESTIONS if len(one.ids) <= 8]
    trunk = trunk_of(model)
    assert trunk.cut._ending is None
    with torch.no_grad():
        found = trunk.logits(trunk.batch(asked))
    assert (found - tiny.logits_alone(model, asked)).abs().max() < 1e-11


@pytest.mark.parametrize("room", [8, 11])
def test_no_trial_is_beyond_the_positions_that_a_model_states(room, monkeypatch):
    """On a GPU such a trial ends the process's work: nothing recovers from its assert."""
    model = helpers.tiny_gpt2(60, n_positions=room)
    seen, forward = [], model.transformer.wpe.forward

    def read(ids_BT):
        seen.append(int(ids_BT.max()))
        return forward(ids_BT)

    monkeypatch.setattr(model.transformer.wpe, "forward", read)
    trunk = trunk_of(model)
    assert trunk.cut._ending is None
    assert 0 < max(seen) < room


class Last(nn.Module):
    """Behind a block's feed-forward part another, of what that gave and of its tokens."""

    def __init__(self, of):
        super().__init__()
        self.inner, self.of = nn.Linear(tiny.HIDDEN, tiny.HIDDEN).double(), of

    def forward(self, *args, **given):
        return self.of(self.inner, *args, **given)


def ended_by(of, **given):
    """A decoder whose last block ends in such a part."""

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.last = block, Last(of)

        def forward(self, states, **keywords):
            states = self.block(states, **keywords)
            found = self.last(states, **{name: make(states) for name, make in given.items()})
            return states + (found[0] if isinstance(found, tuple) else found).view_as(states)

    model = copy.deepcopy(tiny.model_of("llama"))
    blocks = find_stacks(model)[-1].blocks
    for index, block in enumerate(blocks):
        blocks[index] = Block(block)
    return model.requires_grad_(False)


def late(states):
    return torch.cat([states[..., :3, :], states[..., 3:, :] + states[..., :-3, :]], -2)


def one_only(inner, states):
    if states.shape[-2] < 2:
        raise RuntimeError("two tokens at least")
    return inner(states)


KEPT_WHOLE = {
    "reads all before": ended_by(lambda inner, states: inner(states.cumsum(-2))),
    "reads three back": ended_by(lambda inner, states: inner(late(states))),
    "gives more": ended_by(lambda inner, states: (inner(states), None)),
    "by keyword": ended_by(lambda inner, states, scale: inner(states) * scale, scale=torch.sigmoid),
    "of other shape": ended_by(lambda inner, states: inner(states).flatten(0, -2)),
    "cannot run on one token": ended_by(one_only),
}


@pytest.mark.parametrize("kind", KEPT_WHOLE)
def test_a_part_that_cannot_be_run_at_some_tokens_is_run_at_all(kind):
    model = KEPT_WHOLE[kind]
    assert part_of(model) is None
    trunk = Trunk(model, find_sites(model, pattern="*.down_proj")[-2:], TrunkSettings(1024))
    with torch.no_grad():
        found = trunk.logits(trunk.batch(QUESTIONS))
    assert (found - tiny.logits_alone(model, QUESTIONS)).abs().max() < 1e-11


def test_the_same_without_a_fault_is_not():
    assert part_of(ended_by(lambda inner, states: inner(states))) is not None


def test_experts_are_run_whole():
    def mixed(kind):
        model = copy.deepcopy(tiny.model_of("llama"))
        mlp = find_stacks(model)[-1].blocks[-1].mlp
        ways = [copy.deepcopy(mlp.gate_proj), nn.Identity()]
        mlp.experts = kind(ways if kind is nn.ModuleList else {"0": ways[0], "1": ways[1]})
        return model

    assert part_of(mixed(nn.ModuleList)) is None
    assert part_of(mixed(nn.ModuleDict)) is None
    model = copy.deepcopy(tiny.model_of("llama"))
    find_stacks(model)[-1].blocks[-1].mlp.fused = nn.Parameter(torch.zeros(2, 3, 4))
    assert part_of(model) is None


def test_of_a_model_that_mixes_tokens_behind_its_blocks_nothing_is_left_out():
    class Mixing(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, states):
            return self.norm(states + 0.1 * states.cumsum(1))

    model = copy.deepcopy(tiny.model_of("llama"))
    model.model.norm = Mixing(model.model.norm)
    assert part_of(model) is not None
    trunk = trunk_of(model)
    assert trunk.cut._ending is None
    with torch.no_grad():
        found = trunk.logits(trunk.batch(QUESTIONS))
    assert (found - tiny.logits_alone(model, QUESTIONS)).abs().max() < 1e-11


def test_the_part_is_as_before_after_an_error():
    model = tiny.model_of("llama")
    block = find_stacks(model)[-1].blocks[-1]
    ending = Ending(model, block)
    tokens = collate(QUESTIONS)
    with suppress(KeyError), ending.at(tokens.flat_sources_A):
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
