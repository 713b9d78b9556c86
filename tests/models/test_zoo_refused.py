"""Models that were once edited wrongly or refused for the wrong reason.

Each test's comment says what happened before."""

from __future__ import annotations

import warnings

import pytest
import test_zoo_unlike as unlike
import torch
import transformers
from torch import nn

import tiny
from malmend.errors import ModelError
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk


def refused(model, layers=2, pattern=None, match=None):
    """Refused in one sentence by finding sites or by cutting, not by another exception."""
    with pytest.raises(ModelError, match=match):
        Trunk(model, find_sites(model, layers, pattern))


# --- 1. a subclass of nn.Linear that multiplies plainly: refused as fused or quantised


def test_falcon_by_name():
    # "No linear layer is named", although `malmend inspect` is said to list them.
    unlike.assert_edited_rightly(
        tiny.model_of("falcon", torch.float32), pattern="*.h.[23].mlp.dense_4h_to_h"
    )


# --- 2. right, but slowly


@pytest.mark.parametrize("layers", [1, 2])
def test_a_layer_whose_output_is_changed_in_place(layers):
    # Llama 4 adds the routed experts to the shared expert's output in place, so that the `value`
    # that Cut keeps is another one by then; the trial run disagrees, and the whole model is run as
    # head.
    model = unlike.llama4()
    assert Trunk(model, find_sites(model, layers)).cut.place == "site"


# --- 3. another layer than the feed-forward's second one, silently


def quantised(*parts, **sizes):
    model = tiny.model_of("llama", torch.float32, **sizes)
    chosen = {
        f"model.layers.{i}.{part}": torch.ao.quantization.default_dynamic_qconfig
        for i in range(tiny.BLOCKS)
        for part in parts
    }
    supported = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(one for one in supported if one != "none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, chosen, dtype=torch.qint8)


def test_quantised_feed_forward():
    # A dynamically quantised layer holds no parameter, so self_attn.o_proj is taken instead.
    refused(quantised("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), match="quantised")


def test_quantised_second_layer_of_a_square_feed_forward():
    # mlp.up_proj is taken.
    refused(quantised("mlp.down_proj", intermediate_size=tiny.HIDDEN), match="quantised")


def test_quantised_attention():
    # down_proj is taken, rightly, but activations are scaled by batch: the trunk's logits are off
    # by 0.2.
    refused(quantised(*(f"self_attn.{part}_proj" for part in "qkvo")), match="quantised")


@pytest.mark.parametrize("experts", [False, True])
def test_a_block_that_adds_an_input_of_its_own_after_the_feed_forward(experts):
    # Gemma 4 with per-layer inputs: per_layer_projection (16 x 4) is taken for the second layer.
    try:
        found = [site.name for site in find_sites(unlike.gemma4(0, experts), 2)]
    except ModelError:
        return
    assert found == [f"model.layers.{index}.mlp.down_proj" for index in (2, 3)]


# --- 4. tracebacks


def test_blocks_that_return_a_list():
    # GPT-1. AttributeError: 'list' object has no attribute 'numel'
    config = transformers.OpenAIGPTConfig(
        vocab_size=60, n_embd=16, n_layer=4, n_head=2, n_positions=64
    )
    model = tiny.random_model(transformers.OpenAIGPTLMHeadModel, config)
    unlike.assert_edited_rightly(model)


def test_streams_of_hidden_states():
    # Gemma 3n: ValueError: zip() argument 2 is shorter than argument 1
    sizes = {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
    sizes |= {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4}
    sizes |= {"intermediate_size": [24] * 4}
    config = transformers.Gemma3nTextConfig(**(tiny.COMMON | unlike.GATED | sizes))
    refused(tiny.random_model(transformers.Gemma3nForCausalLM, config))


def test_eight_bit_floats_by_name():
    # Taken for a floating-point matrix, then RuntimeError: expected m1 and m2 to ...
    model = tiny.model_of("llama", torch.float32)
    layer = model.model.layers[3].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    refused(model, pattern="model.layers.3.mlp.down_proj", match="quantised")


class Wrapped(torch.Tensor):
    """Stands for the quantised weights of torchao: a tensor of another class in a plain layer."""


def test_a_weight_of_another_tensor_class():
    # Taken; an edit would put a plain tensor in its place, or fail in the middle.
    model = tiny.model_of("llama", torch.float32)
    layer = model.model.layers[3].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Wrapped), requires_grad=False)
    for pattern in (None, "model.layers.3.mlp.down_proj"):
        with pytest.raises(ModelError, match="Wrapped"):
            find_sites(model, 1, pattern)


def test_a_weight_that_is_computed_before_each_pass():
    # Old-style spectral_norm: taken, and an edit has no effect at all.
    model = tiny.model_of("llama", torch.float32)
    nn.utils.spectral_norm(model.model.layers[3].mlp.down_proj)
    refused(model.eval().requires_grad_(False), 1)


def test_offloaded_weights():
    # By name NotImplementedError: Cannot copy out of meta tensor; else a sentence that says
    # "unquantised".
    accelerate = pytest.importorskip("accelerate")
    for pattern in (None, "model.layers.3.mlp.down_proj"):
        model = tiny.model_of("llama", torch.float32)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        refused(model, 1, pattern, match="offload|device")


# --- 5. wrong sentences


@pytest.mark.parametrize("build", [unlike.llava, unlike.gemma3])
@pytest.mark.parametrize("vision_layers", [tiny.BLOCKS, tiny.BLOCKS + 2])
@pytest.mark.parametrize("pattern", [None, "model.language_model.layers.[23].mlp.down_proj"])
def test_a_tower_of_images_as_deep_as_the_decoder(build, vision_layers, pattern):
    # The tower is taken for the decoder: "Block model.vision_tower.encoder.layers.2 does not end
    # in ...", and by name "lies outside the blocks model.vision_tower.encoder.layers.*".
    unlike.assert_edited_rightly(build(vision_layers), 2, pattern)


def test_a_block_that_stands_twice_says_so():
    # "Block model.layers.3 does not end in a plain linear layer"; by the second name "No linear
    # layer is named".
    model = tiny.model_of("llama")
    model.model.layers[3] = model.model.layers[2]
    refused(model, 1, match="share")


def test_a_mixture_in_float64_is_not_said_to_be_quantised():
    # "MixtralForCausalLM cannot run (Expected mat_a to be Float32 ...); load it whole and
    # unquantised."
    model = unlike.model_of("Mixtral", num_local_experts=2).double()
    with pytest.raises(ModelError, match="in float32"):
        find_sites(model, 2)


# --- 5. tracebacks of a trial run


BERT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
BERT |= {"num_attention_heads": 2, "num_labels": 3, "max_position_embeddings": 64}
LED = {"vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
LED |= {f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")}
LED |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
LED |= {f"max_{half}_position_embeddings": 64 for half in ("encoder", "decoder")}
LED |= {"decoder_start_token_id": 2, "pad_token_id": 1}
TRIED = {
    # AssertionError: Sequence length should be multiple of 8.
    "LongformerForSequenceClassification": (BERT | {"attention_window": 8}, "be run alone"),
    "LEDForConditionalGeneration": (LED | {"attention_window": 8}, "be run alone"),
    # IndexError: list index out of range
    "SqueezeBertForSequenceClassification": (BERT | {"embedding_size": 16}, "nothing can watch"),
    # RuntimeError: shape '[-1, 2, 2, 2, 8]' is invalid for input of size 48
    "NystromformerForSequenceClassification": (
        BERT | {"num_landmarks": 2, "segment_means_seq_len": 4, "conv_kernel_size": 3},
        "cannot run .*texts of any length",
    ),
}


@pytest.mark.parametrize("kind", TRIED)
def test_a_model_that_cannot_be_tried(kind, caplog):
    sizes, match = TRIED[kind]
    config = getattr(transformers, kind.split("For")[0] + "Config")(**sizes)
    refused(tiny.random_model(getattr(transformers, kind), config), match=match)


def test_logits_of_nan_agree_with_nothing():
    # VaultGemma and others, beside padding: RuntimeError: atol must be greater than or equal ...
    model = tiny.model_of("llama", torch.float64)
    cut = Trunk(model, find_sites(model, 2)).cut
    whole = torch.ones(2, 3)
    assert cut.agree(whole, whole)
    for bad in (torch.nan, torch.inf):
        broken = whole.clone()
        broken[1, 1] = bad
        assert not cut.agree(broken, whole)
        assert not cut.agree(whole, broken)
        assert not cut.agree(broken, broken)


@pytest.mark.parametrize("family", ["XLM", "Flaubert"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "WithLMHeadModel"])
def test_blocks_in_parallel_lists(family, head):
    # Of attentions, feed-forward parts and norms, all of one length, the first were taken for the
    # blocks, and their out_lin for the feed-forward's second layer.
    sizes = {"emb_dim": 16, "n_layers": 3, "n_heads": 2, "vocab_size": 40, "num_labels": 3}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = tiny.random_model(getattr(transformers, f"{family}{head}"), config)
    lists = r"lists of their own \(transformer.attentions, transformer.ffns\)"
    refused(model, match=lists)
    refused(model, pattern="*.ffns.2.lin2", match=lists)
