"""Models that were spread over devices: their modules' forwards are wrapped, as device_map does."""

from __future__ import annotations

import accelerate
import pytest
import torch

import forms_support as forms
import tiny
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.forms import find_stacks
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.patch import shifted


def placed(model):
    """Every block with hooks of its own, all on the one device there is."""
    parts = {"": "cpu"}
    for stack in find_stacks(model):
        parts |= {f"{stack.prefix}.{index}": "cpu" for index in range(len(stack.blocks))}
    return accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "t5", "bart"])
def test_a_placed_model_is_edited_like_any(family):
    of = tiny if family in tiny.FAMILIES else forms
    asked = tiny.questions(5) if of is tiny else forms.questions(family, 5)
    whole, spread = of.model_of(family), placed(of.model_of(family))
    assert all(hasattr(b, "_hf_hook") for stack in find_stacks(spread) for b in stack.blocks)
    found = []
    for model in (whole, spread):
        trunk = Trunk(model, find_sites(model, 2))
        pairs = capture(trunk, asked, "answer", Descent(3))
        before = of.logits_alone(model, asked)
        shifts = {
            site.name: pair.value_grads_NV.T @ pair.keys_NK
            for site, pair in zip(trunk.sites, pairs, strict=True)
        }
        with shifted(list(trunk.sites), shifts), torch.no_grad():
            batch = trunk.batch(asked)
            after = trunk.logits(batch)
        assert torch.equal(of.logits_alone(model, asked), before)
        found.append((before, after))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3


def test_its_fingerprint_is_the_same():
    spread = placed(tiny.model_of("llama"))
    assert prepared(spread, None).fingerprint == prepared(tiny.model_of("llama"), None).fingerprint
