"""Gradients of edited weights in half precision, against the plain sum in float32."""

from __future__ import annotations

import pytest
import torch

import tiny
from devices_support import device, devices, spread
from malmend.models.output import kl_from
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.models.weightgrads import Term, saying, weight_grads
from malmend.patch import shifted

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


WORDS, SMALL = 20_000, 1 / 2048


def small_terms(dtype):
    """Gradients of what is said, and of what else is said as before, each by a small weight.

    Of a model of float16's numbers, edited, in this dtype.
    """
    model = tiny.model_of("llama", torch.float16, vocab_size=WORDS).to(dtype)
    trunk, asked = Trunk(model, find_sites(model, 2)), QUESTIONS[:8]
    before = trunk.unedited_states(asked)

    def as_before(indices, _batch):
        return kl_from(trunk, torch.cat([before[index] for index in indices]))

    noise = torch.Generator().manual_seed(1)
    shifts = {s.name: 0.1 * torch.randn(s.shape_VK, generator=noise) for s in trunk.sites}
    with shifted(trunk.sites, shifts):
        return [
            weight_grads(trunk, [Term(asked, part, SMALL)]) for part in (saying(trunk), as_before)
        ]


@pytest.mark.parametrize("term", [0, 1], ids=["said", "as before"])
def test_of_a_small_weight_float16_finds_what_float32_does(term):
    """Most derivatives by the logits, times the weight, are below the least of float16."""
    losses, found = small_terms(torch.float16)[term]
    wanted_losses, wanted = small_terms(torch.float32)[term]
    assert losses[0].sum().item() == pytest.approx(wanted_losses[0].sum().item(), rel=1e-2)
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() < 0.01 * grad.norm()


def test_a_weight_is_a_factor_of_a_terms_gradient_alone():
    """Of two terms each has its own, and one of none is in the losses."""
    trunk = Trunk(model := tiny.model_of("gpt2"), find_sites(model, 2), TrunkSettings(30))
    parts, of = (QUESTIONS[:5], QUESTIONS[5:9], QUESTIONS[9:12]), saying(trunk)
    each = [weight_grads(trunk, [Term(part, of, 1.0)]) for part in parts]
    terms = [Term(part, of, by) for part, by in zip(parts, (0.3, -2.0, 0.0), strict=True)]
    losses, grads = weight_grads(trunk, terms)
    for mine, (one, _) in zip(losses, each, strict=True):
        assert torch.equal(mine, one[0])
    for name, grad in grads.items():
        wanted = 0.3 * each[0][1][name] - 2.0 * each[1][1][name]
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_gradients_stay_where_their_weights_lie():
    """Of two devices each layer's on its own: settling has its numbers there."""
    asked = QUESTIONS[:6]

    def of(model):
        trunk = Trunk(model, find_sites(model, 2))
        return trunk, *weight_grads(trunk, [Term(asked, saying(trunk), 1.0)])

    _, wanted_losses, wanted = of(tiny.model_of("llama"))
    with devices():
        trunk, losses, found = of(spread(tiny.model_of("llama"), 3))
        places = {site.name: site.weight.device for site in trunk.sites}
        assert set(places.values()) == {device(0), device(1)}
        assert {name: grad.device for name, grad in found.items()} == places
        assert losses[0].device.type == "cpu"
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name].cpu(), grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(losses[0], wanted_losses[0], rtol=0, atol=1e-12)
