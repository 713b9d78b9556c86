"""Which layers are chosen, in which orientation, and which models are refused, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import tiny
from malmend.errors import ModelError
from malmend.models.blocks import is_linear
from malmend.models.forms import find_stacks
from malmend.models.sites import Site, feed_forward_sites, find_sites, put_back

FAMILY = pytest.mark.parametrize("family", tiny.FAMILIES)


def named(family: str, *indices: int) -> list[str]:
    return [tiny.SECOND[family].format(index) for index in indices]


@FAMILY
def test_sites_are_the_second_layers_of_the_last_blocks(family):
    model = tiny.model_of(family)
    for layers in (1, 2, tiny.BLOCKS):
        sites = find_sites(model, layers)
        assert [site.name for site in sites] == named(
            family, *range(tiny.BLOCKS - layers, tiny.BLOCKS)
        )
        assert {site.shape_VK for site in sites} == {(tiny.HIDDEN, tiny.INNER)}
        assert all(site.module is model.get_submodule(site.name) for site in sites)
    assert [site.is_transposed for site in sites] == [family == "gpt2"] * tiny.BLOCKS


def test_default_is_six_layers():
    model = tiny.model_of("llama", num_hidden_layers=8)
    assert [site.name for site in find_sites(model)] == named("llama", *range(2, 8))


@FAMILY
def test_finding_leaves_the_model_as_it_was(family):
    model = tiny.model_of(family)
    before = {name: tiny.bits(weight) for name, weight in model.named_parameters()}
    find_sites(model, 2)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tiny.bits(w), before[name]) for name, w in model.named_parameters())


@FAMILY
def test_oriented_weight_times_key_is_the_layers_output(family):
    torch.manual_seed(1)
    model = tiny.model_of(family)
    for site in find_sites(model, 2):
        keys_NK = torch.randn(5, tiny.INNER, dtype=torch.float64)
        bias = getattr(site.module, "bias", None)
        expected_NV = site.module(keys_NK) - (0 if bias is None else bias)
        weight_VK = site.oriented(site.weight)
        assert weight_VK.shape == site.shape_VK
        assert torch.allclose(keys_NK @ weight_VK.T, expected_NV, atol=1e-12)
        assert torch.equal(site.oriented(weight_VK), site.weight)  # and back
        assert site.oriented(site.weight).data_ptr() == site.weight.data_ptr()  # a view


def test_square_conv1d_is_still_oriented():
    # Where V = K, shapes cannot tell the two layouts apart.
    model = tiny.model_of("gpt2", n_inner=tiny.HIDDEN)
    site = find_sites(model, 1)[0]
    keys_NK = torch.randn(5, tiny.HIDDEN, dtype=torch.float64)
    assert torch.allclose(
        keys_NK @ site.oriented(site.weight).T, site.module(keys_NK) - site.module.bias
    )


@FAMILY
def test_blocks(family):
    model = tiny.model_of(family)
    (stack,) = find_stacks(model)
    prefix, blocks = stack.prefix, stack.blocks
    assert prefix == tiny.SECOND[family].split(".{}")[0]
    assert len(blocks) == tiny.BLOCKS
    assert model.get_submodule(prefix) is blocks


def test_a_longer_list_of_other_modules_is_not_the_stack():
    model = tiny.model_of("llama")
    model.extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(tiny.BLOCKS + 3))
    assert find_stacks(model)[0].prefix == "model.layers"


# --- by name


def test_one_layer_by_its_name():
    model = tiny.model_of("llama")
    (site,) = find_sites(model, pattern="model.layers.1.mlp.up_proj")
    assert (site.name, site.shape_VK) == (
        "model.layers.1.mlp.up_proj",
        (tiny.INNER, tiny.HIDDEN),
    )


def test_layers_by_pattern_whatever_the_number_of_layers():
    model = tiny.model_of("gpt2")
    sites = find_sites(model, layers=99, pattern="*.h.[13].mlp.c_*")
    names = [f"transformer.h.{i}.mlp.{part}" for i in (1, 3) for part in ("c_fc", "c_proj")]
    assert [site.name for site in sites] == names
    assert [site.shape_VK for site in sites] == [
        (tiny.INNER, tiny.HIDDEN),
        (tiny.HIDDEN, tiny.INNER),
    ] * 2


def test_pattern_is_the_whole_name():
    with pytest.raises(ModelError):
        find_sites(tiny.model_of("llama"), pattern="down_proj")


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("model.layers.3.mlp.down_prj", "'model.layers.3.mlp.down_proj'"),
        ("model.layers.33.mlp.down_proj", "'model.layers.3.mlp.down_proj'"),
        ("lm_heed", "'lm_head'"),
    ],
)
def test_unknown_name_gives_the_nearest(given, near):
    with pytest.raises(ModelError, match=f"did you mean {near}") as caught:
        find_sites(tiny.model_of("llama"), pattern=given)
    assert repr(given) in str(caught.value)


def test_unknown_name_with_none_near_says_where_names_are():
    with pytest.raises(ModelError, match=r"'zzzz'\. Give a name.*malmend inspect") as caught:
        find_sites(tiny.model_of("llama"), pattern="zzzz")
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["lm_head", "*"])
def test_a_layer_outside_the_blocks_is_refused(pattern):
    with pytest.raises(ModelError, match=r"lm_head lies outside the blocks model\.layers\.\*"):
        find_sites(tiny.model_of("llama"), pattern=pattern)


def test_norms_and_embeddings_cannot_be_chosen():
    for name in ("model.layers.3.input_layernorm", "model.embed_tokens"):
        with pytest.raises(ModelError, match="No linear layer is named"):
            find_sites(tiny.model_of("llama"), pattern=name)


# --- refused


@pytest.mark.parametrize("layers", [-1, 0, tiny.BLOCKS + 1, 1000])
def test_wrong_number_of_layers(layers):
    with pytest.raises(ModelError, match=f"{layers:,} layers .* 1 to {tiny.BLOCKS}.*--layers"):
        find_sites(tiny.model_of("llama"), layers)


@pytest.mark.parametrize("asked", [{"layers": 2}, {"pattern": "model.layers.3.mlp.down_proj"}])
def test_tied_weights(asked):
    model = tiny.model_of("llama")
    first, last = model.model.layers[0].mlp, model.model.layers[3].mlp
    last.down_proj.weight = first.down_proj.weight
    with pytest.raises(
        ModelError,
        match=r"model\.layers\.3\.mlp\.down_proj shares its weight with "
        r"model\.layers\.0\.mlp\.down_proj\.weight",
    ):
        find_sites(model, **asked)
    find_sites(model, pattern="model.layers.2.mlp.down_proj")  # the others still can be edited


def test_a_shared_module():
    model = tiny.model_of("llama")
    model.model.layers[3].mlp.down_proj = model.model.layers[2].mlp.down_proj
    with pytest.raises(ModelError):
        find_sites(model, 2)
    with pytest.raises(ModelError, match="shares its weight with"):
        find_sites(model, pattern="*.2.mlp.down_proj")


def int8_model():
    model = tiny.model_of("llama", torch.float32)
    layer = model.model.layers[3].mlp.down_proj
    layer.weight = nn.Parameter(
        torch.zeros(tiny.HIDDEN, tiny.INNER, dtype=torch.int8), requires_grad=False
    )
    return model


def test_int8_weight_by_name():
    with pytest.raises(ModelError, match=r"torch\.int8 of shape \(16, 24\) \(quantised\?\)"):
        find_sites(int8_model(), pattern="model.layers.3.mlp.down_proj")


def test_int8_weight_that_cannot_run():
    with pytest.raises(ModelError, match=r"cannot run .*unquantised"):
        find_sites(int8_model(), 2)


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError])
def test_a_model_that_asks_for_more_than_tokens(error, monkeypatch):
    model = tiny.model_of("llama")

    def forward(*_, **__):
        raise error("pixel_values")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ModelError, match=r"cannot run .*pixel_values"):
        find_sites(model, 2)


class Packed(nn.Linear):
    """Stands for a quantised layer: it runs, but its weight is packed in a way of its own."""

    def forward(self, key):
        return super().forward(key) * 2


@pytest.mark.parametrize("every", [True, False])
def test_a_packed_layer_is_refused_not_its_neighbour(every):
    # If only the feed-forward is quantised, the attention's output layer is not what was meant.
    model = tiny.model_of("llama")
    block = model.model.layers[3]
    names = ["mlp.down_proj"]
    if every:
        names += ["mlp.up_proj", "mlp.gate_proj", "self_attn.o_proj"]
    for name in names:
        old = block.get_submodule(name)
        new = Packed(old.in_features, old.out_features, bias=False, dtype=torch.float64)
        block.set_submodule(name, new)
    with pytest.raises(ModelError, match=r"Block model\.layers\.3 .*quantised"):
        find_sites(model, 1)
    with pytest.raises(ModelError, match="No linear layer is named"):
        find_sites(model, pattern="model.layers.3.mlp.down_proj")


class Stacked(nn.Module):
    """Stands for experts in one tensor, chosen by a router that keeps no matrix."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, tiny.HIDDEN, tiny.HIDDEN, dtype=torch.float64))

    def forward(self, states):
        return states @ self.experts[0]


def test_stacked_weights_are_refused_not_their_neighbour():
    model = tiny.model_of("llama")
    model.model.layers[3].mlp = Stacked()
    with pytest.raises(ModelError, match=r"Block model\.layers\.3 .*mixture-of-experts"):
        find_sites(model, 1)


EXPERTS = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=2)).eval()


def qwen2_moe():
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    sizes["shared_expert_intermediate_size"] = 8
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**EXPERTS, **sizes)).eval()


@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_mixture_of_experts_is_refused(build):
    # And its attention's output layer, the last plain one of that width, is not edited instead.
    with pytest.raises(ModelError, match=r"Block model\.layers\.1 .*mixture-of-experts.*--sites"):
        find_sites(build(), 2)


def test_mixture_of_experts_can_be_edited_by_name():
    sites = find_sites(mixtral(), pattern="*.self_attn.o_proj")
    assert [site.name for site in sites] == [
        f"model.layers.{index}.self_attn.o_proj" for index in range(3)
    ]


@pytest.mark.parametrize("decoder", [True, False])
def test_a_model_that_looks_ahead_is_refused(decoder):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = BertConfig(vocab_size=60, intermediate_size=24, is_decoder=decoder, **sizes)
    torch.manual_seed(0)
    config.initializer_range = 0.25
    model = BertLMHeadModel(config).eval()
    if decoder:
        (site,) = find_sites(model, 1)
        assert site.name == "bert.encoder.layer.1.output.dense"
    else:
        with pytest.raises(ModelError, match="BertLMHeadModel lets a token see the ones after it"):
            find_sites(model, 1)


def test_site_of_either_layout():
    linear = Site("a", nn.Linear(3, 5))
    assert (linear.shape_VK, linear.is_transposed) == ((5, 3), False)


def switch():
    sizes = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
    layers |= {"num_sparse_decoder_layers": 1, "num_experts": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    config = SwitchTransformersConfig(**sizes, **layers)
    return SwitchTransformersForConditionalGeneration(config).eval()


@pytest.mark.parametrize("pattern", [None, "*.expert_0.wo", "*.expert_1.wi"])
def test_experts_that_are_plain_layers_are_refused(pattern):
    with pytest.raises(ModelError, match=r"\.expert_\d\.w[io] does not see every token once"):
        find_sites(switch(), 2, pattern)


def test_layers_beside_experts_can_be_edited():
    assert len(find_sites(switch(), pattern="*.SelfAttention.o")) == 4


class Skipping(nn.Module):
    """A feed-forward layer that only the last token of a row passes through."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, states_BTH):
        out = states_BTH.clone()
        out[:, -1] = self.inner(states_BTH[:, -1])
        return out


def test_a_layer_that_sees_some_tokens_only_is_refused():
    model = tiny.model_of("llama")
    model.model.layers[3].mlp = Skipping(model.model.layers[3].mlp)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.inner\.down_proj does not see every"):
        find_sites(model, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_both_layers_of_a_block_in_the_order_they_run(family):
    model = tiny.model_of(family)
    both = [site.name for site in find_sites(model, 2, linear="both")]
    first, second = (
        [site.name for site in find_sites(model, 2, linear=one)] for one in ("first", "second")
    )
    assert both == [first[0], second[0], first[1], second[1]]


def test_a_router_that_gives_more_than_its_product_is_no_linear_layer():
    class Router(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states), None

    assert is_linear(torch.nn.Linear(3, 2))
    assert not is_linear(Router(3, 2))


def test_a_first_layer_that_cannot_be_edited_is_no_reason_to_edit_the_second_alone():
    """Only where there is none at all."""
    model = tiny.model_of("llama")
    assert len(feed_forward_sites(model, 2)) == 4
    blocks = model.model.layers
    blocks[3].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="up_proj shares its weight with"):
        feed_forward_sites(model, 2)


def test_what_a_block_changed_is_put_back_although_that_is_interrupted():
    state, stops = {"a": 0, "b": 0}, [KeyboardInterrupt]

    def back():
        for name in state:
            if name == "b" and stops:
                raise stops.pop()
            state[name] = 0

    with pytest.raises(KeyboardInterrupt), put_back(back):
        state.update(a=1, b=1)
    assert state == {"a": 0, "b": 0}
