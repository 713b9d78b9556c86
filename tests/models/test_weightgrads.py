"""Gradients of edited weights in half precision, against the plain sum in float32."""

from __future__ import annotations

import torch

import tiny
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.models.weightgrads import Term, saying, weight_grads

QUESTIONS = tiny.questions(120)


def test_many_micro_batches_of_a_bfloat16_model_are_added_up_in_float32():
    """Each one's gradient is bfloat16, as autograd leaves it on the weight; their sum is not."""
    model = tiny.model_of("llama", torch.bfloat16)
    trunk = Trunk(model, find_sites(model, 2), TrunkSettings(1))  # a question at a time
    assert len(list(trunk.batches(QUESTIONS))) == len(QUESTIONS)
    _, found = weight_grads(trunk, [Term(QUESTIONS, saying(trunk), 1.0)])
    alone = [weight_grads(trunk, [Term([one], saying(trunk), 1.0)])[1] for one in QUESTIONS]
    for site in trunk.sites:
        parts = [grads[site.name] for grads in alone]
        assert all(torch.equal(one, one.bfloat16().float()) for one in parts)
        wanted, narrow = torch.zeros(site.shape_VK), torch.zeros(site.shape_VK).bfloat16()
        for one in parts:
            wanted, narrow = wanted + one, narrow + one.bfloat16()
        assert found[site.name].dtype == torch.float32
        assert (found[site.name] - wanted).norm() < 1e-5 * wanted.norm()
        assert (narrow - wanted).norm() > 1e-3 * wanted.norm()
