"""Models that are no plain stack of like blocks: edited rightly, or refused with the reason."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import nn

import tiny
from malmend.errors import ModelError
from malmend.models.load import prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.patch import applied, make_patch

QUESTIONS = tiny.questions(5)
GATED = {"intermediate_size": tiny.INNER, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHARED_EXPERT = {"shared_expert_intermediate_size": 8}
MIXTURES = {
    "Mixtral": {"num_local_experts": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | SHARED_EXPERT,
    "Qwen3Moe": EXPERTS,
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "GraniteMoe": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def model_of(stem, **sizes):
    config = getattr(transformers, f"{stem}Config")(**(tiny.COMMON | GATED | sizes))
    return tiny.random_model(getattr(transformers, f"{stem}ForCausalLM"), config)


def names(model, layers=2, pattern=None):
    return [site.name for site in find_sites(model, layers, pattern)]


def assert_edited_rightly(model, layers=2, pattern=None):
    """The cut model's logits are the whole one's, before and after another weight at every site."""
    trunk = Trunk(model, find_sites(model, layers, pattern))
    shifts = {site.name: 0.3 * torch.randn(site.shape_VK).double() for site in trunk.sites}
    loaded = prepared(model, None)
    unedited = tiny.logits_alone(model, QUESTIONS)
    with torch.no_grad():
        assert (trunk.logits(trunk.batch(QUESTIONS)) - unedited).abs().max() < 1e-4
        with applied(loaded, make_patch(shifts, 10**6, {"base": loaded.fingerprint})):
            edited = tiny.logits_alone(model, QUESTIONS)
            assert (edited - unedited).abs().max() > 0.01
            assert (trunk.logits(trunk.batch(QUESTIONS)) - edited).abs().max() < 1e-4


# --- experts


@pytest.mark.parametrize("stem", MIXTURES)
def test_mixture_of_experts_is_refused(stem):
    with pytest.raises(ModelError, match=r"Block model\.layers\.2 .*mixture-of-experts.*--sites"):
        names(model_of(stem, **MIXTURES[stem]))


@pytest.mark.parametrize("stem", ["Mixtral", "GptOss"])
def test_attention_of_a_mixture_can_be_edited_by_name(stem):
    assert_edited_rightly(
        model_of(stem, **MIXTURES[stem]), pattern="model.layers.[23].self_attn.o_proj"
    )


def test_a_mixture_with_some_dense_blocks():
    model = model_of("Qwen2Moe", **MIXTURES["Qwen2Moe"], mlp_only_layers=[1, 3])
    assert names(model, 1) == ["model.layers.3.mlp.down_proj"]
    with pytest.raises(ModelError, match=r"Block model\.layers\.2 .*mixture-of-experts.*--sites"):
        names(model, 2)
    dense = "model.layers.*.mlp.down_proj"
    assert names(model, pattern=dense) == [f"model.layers.{i}.mlp.down_proj" for i in (1, 3)]
    assert_edited_rightly(model, pattern=dense)


def llama4():
    """Routed experts are added to the shared expert's output in place."""
    config = transformers.Llama4TextConfig(
        **(tiny.COMMON | GATED),
        num_experts_per_tok=1, num_local_experts=2, intermediate_size_mlp=24,
        interleave_moe_layer_step=1, use_qk_norm=False,
    )  # fmt: skip
    return tiny.random_model(transformers.Llama4ForCausalLM, config)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_whose_output_is_changed_in_place(layers):
    model = llama4()
    assert names(model, layers)[-1] == "model.layers.3.feed_forward.shared_expert.down_proj"
    assert_edited_rightly(model, layers)


# --- shared weights


@pytest.mark.parametrize("asked", [{"layers": 2}, {"pattern": "model.layers.2.mlp.down_proj"}])
def test_a_block_that_stands_twice_is_refused(asked):
    model = tiny.model_of("llama")
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(ModelError, match="shares its weight with"):
        names(model, **asked)


def test_a_block_that_stands_twice_below_the_edited_ones():
    model = tiny.model_of("llama", torch.float32)
    model.model.layers[1] = model.model.layers[0]
    assert_edited_rightly(model)


def test_two_parameters_in_one_storage_are_edited_apart():
    model = tiny.model_of("llama", torch.float32)
    third, fourth = (model.model.layers[i].mlp.down_proj for i in (2, 3))
    fourth.weight.data = third.weight.data
    before = tiny.bits(third.weight)
    loaded = prepared(model, None)
    shifts = {"model.layers.3.mlp.down_proj": torch.ones(tiny.HIDDEN, tiny.INNER).double()}
    with applied(loaded, make_patch(shifts, 10**6, {"base": loaded.fingerprint})):
        assert torch.equal(tiny.bits(third.weight), before)
        assert not torch.equal(tiny.bits(fourth.weight), before)


@pytest.mark.parametrize("asked", [{"layers": 1}, {"pattern": "*.ffn_output"}])
def test_albert_is_refused(asked):
    # One group of weights is run as every layer.
    sizes = {"embedding_size": 16, "hidden_size": 16, "num_attention_heads": 2}
    config = transformers.AlbertConfig(
        vocab_size=60, num_hidden_layers=4, intermediate_size=24, **sizes
    )
    with pytest.raises(ModelError, match=r"^AlbertForMaskedLM has no single stack"):
        names(transformers.AlbertForMaskedLM(config).eval(), **asked)


# --- layers that are not what they seem


def test_quantised_on_the_fly_is_refused():
    model = tiny.model_of("llama", torch.float32)
    engine = torch.backends.quantized.engine
    supported = [one for one in torch.backends.quantized.supported_engines if one != "none"]
    if not supported:
        pytest.skip("this torch has no engine for quantised layers")
    torch.backends.quantized.engine = supported[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        with pytest.raises(ModelError, match="quantised"):
            names(model)
        with pytest.raises(ModelError, match="No linear layer is named"):
            names(model, pattern="model.layers.3.mlp.down_proj")
    finally:
        torch.backends.quantized.engine = engine


def test_a_parametrised_weight_is_refused():
    model = tiny.model_of("llama", torch.float32)
    nn.utils.parametrizations.weight_norm(model.model.layers[3].mlp.down_proj)
    with pytest.raises(ModelError, match=r"Block model\.layers\.3 .*--sites"):
        names(model, 1)
    with pytest.raises(ModelError, match="No linear layer is named"):
        names(model, pattern="model.layers.3.mlp.down_proj")


# --- other blocks than attention


def test_state_space_models_are_refused():
    for stem, sizes in (("Mamba", {"state_size": 4}), ("Rwkv", {"context_length": 64})):
        with pytest.raises(ModelError, match=r"Block \w+\.\w+\.2 .*--sites"):
            names(model_of(stem, **sizes))


def test_a_stack_of_unlike_blocks_is_refused():
    sizes = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    model = model_of("Jamba", **sizes, mamba_d_state=4, use_mamba_kernels=False)
    with pytest.raises(ModelError, match="JambaForCausalLM has no single stack"):
        names(model)


@pytest.mark.parametrize(
    ("stem", "sizes", "second"),
    [
        (
            "Bamba",  # Mamba and attention in turn, each with a feed-forward layer behind it
            {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 8}
            | {"mamba_d_state": 4, "mamba_n_groups": 1},
            "model.layers.{}.feed_forward.down_proj",
        ),
        (
            "RecurrentGemma",
            {"lru_width": 16, "attention_window_size": 8, "intermediate_size": 2 * tiny.INNER},
            "model.layers.{}.mlp_block.down_proj",
        ),
        (
            "Qwen3Next",
            EXPERTS
            | SHARED_EXPERT
            | {"mlp_only_layers": [2, 3], "layer_types": ["linear_attention", "full_attention"] * 2}
            | {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
            | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
            "model.layers.{}.mlp.down_proj",
        ),
    ],
)
def test_recurrent_blocks_with_a_feed_forward_layer(stem, sizes, second):
    model = model_of(stem, **sizes)
    assert names(model) == [second.format(index) for index in (2, 3)]
    assert_edited_rightly(model)


# --- blocks that read more than what the one below gives


def gemma4(shared, experts=False):
    """The ``shared`` last blocks attend to keys of blocks below; each has an input of its own."""
    sizes = {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
    sizes |= {"num_kv_shared_layers": shared, "global_head_dim": 8}
    if experts:
        sizes |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        sizes |= {"moe_intermediate_size": 8}
    config = transformers.Gemma4TextConfig(**(tiny.COMMON | GATED | sizes))
    return tiny.random_model(transformers.Gemma4ForCausalLM, config)


@pytest.mark.parametrize("shared", [0, 2])
def test_blocks_that_share_keys_with_blocks_below_the_cut(shared):
    assert_edited_rightly(gemma4(shared), pattern="model.layers.[23].mlp.down_proj")


def test_blocks_that_run_more_than_once_are_refused():
    config = transformers.DoryConfig(**(tiny.COMMON | GATED))
    model = tiny.random_model(transformers.DoryForCausalLM, config)
    with pytest.raises(ModelError, match="DoryForCausalLM cannot be edited"):
        Trunk(model, find_sites(model, 2))


# --- a decoder without an output layer, and inside a model of images


@pytest.mark.parametrize("kind", [transformers.LlamaModel, transformers.LlamaForQuestionAnswering])
@pytest.mark.parametrize("pattern", [None, "*layers.3.mlp.down_proj"])
def test_a_model_without_an_output_layer_is_refused(kind, pattern):
    config = transformers.LlamaConfig(**(tiny.COMMON | GATED))
    model = tiny.random_model(kind, config)
    with pytest.raises(ModelError, match=f"^{kind.__name__} has no output layer"):
        Trunk(model, find_sites(model, 2, pattern))


def vision(kind, layers):
    return getattr(transformers, f"{kind}VisionConfig")(
        hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip


def llava(vision_layers):
    config = transformers.LlavaConfig(
        vision_config=vision("CLIP", vision_layers),
        text_config=transformers.LlamaConfig(**(tiny.COMMON | GATED)),
        image_token_index=59,
    )
    return tiny.random_model(transformers.LlavaForConditionalGeneration, config)


def gemma3(vision_layers):
    config = transformers.Gemma3Config(
        vision_config=vision("Siglip", vision_layers),
        text_config=transformers.Gemma3TextConfig(**(tiny.COMMON | GATED | {"sliding_window": 5})),
        mm_tokens_per_image=4, image_token_index=59, boi_token_index=58, eoi_token_index=57,
    )  # fmt: skip
    return tiny.random_model(transformers.Gemma3ForConditionalGeneration, config)


@pytest.mark.parametrize("build", [llava, gemma3])
def test_the_decoder_of_a_model_of_images(build):
    model = build(vision_layers=2)
    assert names(model) == [f"model.language_model.layers.{i}.mlp.down_proj" for i in (2, 3)]
    assert_edited_rightly(model)
