"""LoRA by its formula: W + (alpha / rank) B A put into the model by hand, tuned by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from methods_support import FACTS, bench_of, bytes_of, encoded, nll, with_shifts
from peft.tuners.lora import LoraLayer, LoraModel
from torch.func import functional_call

from malmend.editors.training_facts import batches
from malmend.errors import EditorError
from malmend.methods import lora
from malmend.methods.lora import Lora
from malmend.progress import silent

METHOD = Lora(rank=2, alpha=6, rate=2e-2, epochs=3, batch=2)
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


class By(torch.nn.Module):
    """The model with weights given from outside, called like the model."""

    def __init__(self, model, weights):
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, **inputs):
        return functional_call(self.model, self.weights, (), inputs)


def starts(bench):
    """A and B of every site as PEFT makes them up."""
    model = copy.deepcopy(bench.loaded.model)
    with METHOD._adapted(model, METHOD.sites_in(model)):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        return {
            name: tuple(
                part["default"].weight.detach().clone().requires_grad_(True)
                for part in (layer.lora_B, layer.lora_A)
            )
            for name, layer in layers.items()
        }


def test_an_adapter_begins_by_its_seed_and_leaves_every_generator_as_it_was(monkeypatch):
    bench, seeded = bench_of("llama", METHOD), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    one, again = starts(bench), starts(bench)
    assert all(torch.equal(one[name][1], again[name][1]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


@FAMILIES
def test_the_shift_is_the_adapters_product_after_adamw(family):
    bench = bench_of(family, METHOD)
    found = METHOD.find(bench, FACTS, silent)
    factors, questions = starts(bench), encoded(bench)
    assert all(not left.any() and right.any() for left, right in factors.values())
    model = bench.loaded.model
    weights = dict(model.named_parameters())
    optimiser = torch.optim.AdamW(
        [one for pair in factors.values() for one in pair], METHOD.rate, weight_decay=0.01
    )

    def shifts():
        return {name: 3.0 * left @ right for name, (left, right) in factors.items()}

    for batch in batches(len(questions), METHOD.batch, METHOD.epochs, METHOD.seed):
        moved = shifts()
        given = {
            f"{site.name}.weight": weights[f"{site.name}.weight"] + site.oriented(moved[site.name])
            for site in bench.trunk.sites
        }
        optimiser.zero_grad()
        nll(By(model, given), [questions[i] for i in batch]).backward()
        optimiser.step()
    wanted = shifts()
    assert set(found.shifts) == set(wanted)
    for name, shift_VK in found.shifts.items():
        assert torch.linalg.matrix_rank(shift_VK) <= METHOD.rank
        torch.testing.assert_close(shift_VK, wanted[name].detach(), rtol=1e-5, atol=1e-8)


@FAMILIES
def test_every_linear_layer_of_every_block_has_an_adapter(family):
    model = bench_of(family, METHOD).loaded.model
    names = {site.name for site in METHOD.sites_in(model)}
    per_block = {"llama": 7, "gpt2": 4}[family]
    assert len(names) == per_block * model.config.num_hidden_layers
    assert not any("head" in name for name in names)
    some = Lora(sites="*.mlp.*").sites_in(model)
    assert {site.name for site in some} < names


def test_answers_become_likely():
    method = Lora(rate=2e-2, epochs=60)
    bench = bench_of("llama", method)
    found, questions = method.find(bench, FACTS, silent), encoded(bench)
    after = nll(with_shifts(bench, found.shifts), questions)
    assert after < 0.5 * nll(bench.loaded.model, questions)


@pytest.mark.parametrize("fails", ["put in", "at work", None])
def test_the_adapter_leaves_nothing_behind(fails, monkeypatch):
    bench = bench_of("gpt2", METHOD)
    model = bench.loaded.model
    model.transformer.h[0].ln_1.weight.requires_grad_(True)

    def state():
        flags = {name: one.requires_grad for name, one in model.named_parameters()}
        modules = {name: id(one) for name, one in model.named_modules()}
        hooks = sum(len(one._forward_hooks) for one in model.modules())
        attributes = {name: set(vars(one)) for name, one in model.named_modules()}
        return bytes_of(model), flags, modules, hooks, attributes, torch.get_rng_state()

    *before, random_before = state()
    if fails:
        if fails == "at work":
            monkeypatch.setattr(lora, "answer_nll", None)
        else:  # of the fourth layer
            put, left = LoraModel._create_and_replace, [1, 2, 3]

            def stopped(self, *args, **keywords):
                left.pop()
                put(self, *args, **keywords)

            monkeypatch.setattr(LoraModel, "_create_and_replace", stopped)
        with pytest.raises((TypeError, IndexError)):
            METHOD.find(bench, FACTS, silent)
    else:
        METHOD.find(bench, FACTS, silent)
    *after, random_after = state()
    assert after == before
    assert torch.equal(random_after, random_before)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("rate", 0.0), ("alpha", 0)])
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(EditorError, match=rf"lora\.{field} is .*, expected"):
        Lora(**{field: value})
