"""Models that were spread over devices: their modules' forwards are wrapped, as device_map does.

Over one device that is there, and over two that are not (devices_support.py).
"""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import Tensor

import forms_support as forms
import tiny
from devices_support import device, devices, spread
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


FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "t5", "bart"])


def edited(family, model) -> list[Tensor]:
    """What it says before and after an edit, and the edit's pairs."""
    asked = family_of(family)[1]
    trunk = Trunk(model, find_sites(model, 2))
    before = trunk.logits(trunk.batch(asked))
    pairs = capture(trunk, asked, "answer", Descent(3))
    shifts = {
        site.name: pair.value_grads_NV.T @ pair.keys_NK
        for site, pair in zip(trunk.sites, pairs, strict=True)
    }
    with shifted(list(trunk.sites), shifts):
        after = trunk.logits(trunk.batch(asked))
    again = trunk.logits(trunk.batch(asked))
    assert torch.equal(again.cpu(), before.cpu())
    return [before.cpu(), after.cpu(), *(pair.keys_NK for pair in pairs), *shifts.values()]


def family_of(family):
    if family in tiny.FAMILIES:
        return tiny, tiny.questions(5)
    return forms, forms.questions(family, 5)


@FAMILIES
def test_a_placed_model_is_edited_like_any(family):
    of = family_of(family)[0]
    spread_model = placed(of.model_of(family))
    stacks = find_stacks(spread_model)
    assert all(hasattr(block, "_hf_hook") for stack in stacks for block in stack.blocks)
    whole, found = edited(family, of.model_of(family)), edited(family, spread_model)
    assert all(map(torch.equal, whole, found))
    assert (whole[0] - whole[1]).abs().max() > 1e-3


@FAMILIES
@pytest.mark.parametrize("second", [1, 2])
def test_one_of_two_devices_is_edited_like_any(family, second):
    of = family_of(family)[0]
    whole = edited(family, of.model_of(family))
    with devices():
        model = spread(of.model_of(family), second)
        assert {one.device for one in model.parameters()} == {device(0), device(1)}
        found = edited(family, model)
    for one, other in zip(whole, found, strict=True):  # BART's sums are taken in another order
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_its_fingerprint_is_the_same():
    spread = placed(tiny.model_of("llama"))
    assert prepared(spread, None).fingerprint == prepared(tiny.model_of("llama"), None).fingerprint
