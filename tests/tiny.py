"""Tiny random decoders of many families, and random questions as token ids; no file, no network.

Most tests run over the eight of ``FAMILIES``; tests/models/test_zoo.py over those of ``ZOO`` too,
and in `make test` over the ``PECULIAR`` ones of them.

    family       linear   what is peculiar
    gpt2         Conv1D   weights stored K x V
    llama        Linear   gated feed-forward
    qwen2        Linear   grouped attention with biases
    gpt_neox     Linear   attention and feed-forward in parallel
    gptj         Linear   as gpt_neox, and blocks that return a tuple
    opt          Linear   a position table with an offset, learned from the mask
    gemma2       Linear   a norm after the layer, so that only whole blocks can be cut off
    mistral      Linear   sliding attention window

    qwen3        norms of queries and keys      gpt_neo       Linear, but Conv1D's names
    gemma        norms about 1, scaled input    gpt_bigcode   GPT-2 in Linear, one key head
    gemma3       gemma2, windows alternate      bloom         positions by attention bias (ALiBi)
    phi          in parallel, one norm          mpt           the same, under names of its own
    phi3         gate and up in one matrix      stablelm      rotary positions in part
    falcon       a subclass of Linear           starcoder2    as gpt2, with rotary positions
    falcon_new   the same, two norms            cohere        in parallel, no bias in norms
    falcon_alibi the same, not in parallel      glm           gate and up in one matrix
    olmo2        norms after both layers only   smollm3       some blocks without positions
    granite      a scaled residual             apertus       an activation with parameters
    seed_oss     biases of queries, keys and values

Initial weights are large, so that predictions are far from uniform, and no bias or norm is left at
0 or 1, so that a lost one is seen.  A float64 model computes everything in float64: softmax, norms
and positions that a family takes in float32 would round each batch in a way of its own, by the
machine.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from malmend.facts.encoded import Encoded

# Threads of a busy machine wait for one another; these matrices are too small to share.
torch.set_num_threads(1)

VOCABULARY = 60
HIDDEN = 16
INNER = 24
BLOCKS = 4

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.25,
}
_GATED = {"intermediate_size": INNER, "num_key_value_heads": 1, "head_dim": 8}
_CLASSES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_inner": INNER}),
    "llama": (LlamaForCausalLM, LlamaConfig, _GATED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GATED),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": INNER}),
    "gptj": (GPTJForCausalLM, GPTJConfig, {"n_inner": INNER, "rotary_dim": 4}),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        _GATED | {"query_pre_attn_scalar": 8, "sliding_window": 32},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, _GATED | {"sliding_window": 5}),
}
FAMILIES = tuple(_CLASSES)
# They take norms or attention in float32 whatever the model's own type, which rounds otherwise in
# another batch on some processors.
FLOAT32_INSIDE = ("gptj", "gemma2")

# Of each family, the name of the second feed-forward layer of a block.
SECOND = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "llama": "model.layers.{}.mlp.down_proj",
    "qwen2": "model.layers.{}.mlp.down_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "opt": "model.decoder.layers.{}.fc2",
    "gemma2": "model.layers.{}.mlp.down_proj",
    "mistral": "model.layers.{}.mlp.down_proj",
}

_FALCON = {"ffn_hidden_size": INNER}
_INNER = {"intermediate_size": INNER}
_SHARED = _INNER | {"num_key_value_heads": 1}
_DOWN = "model.layers.{}.mlp.down_proj"
# Of further families: stem of the classes' names, sizes, name of the second feed-forward layer.
_ZOO: dict[str, tuple[str, dict[str, object], str]] = {
    "qwen3": ("Qwen3", _GATED, _DOWN),
    "gemma": ("Gemma", _GATED, _DOWN),
    "gemma3": (
        "Gemma3",
        _GATED
        | {"query_pre_attn_scalar": 8, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        _DOWN,
    ),
    "phi": ("Phi", _INNER, "model.layers.{}.mlp.fc2"),
    "phi3": ("Phi3", _SHARED, _DOWN),
    "falcon": ("Falcon", _FALCON, "transformer.h.{}.mlp.dense_4h_to_h"),
    "falcon_new": (
        "Falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 1},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "falcon_alibi": (
        "Falcon",
        _FALCON | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "gpt_neo": (
        "GPTNeo",
        _INNER | {"attention_types": [[["global", "local"], 2]], "window_size": 5},
        "transformer.h.{}.mlp.c_proj",
    ),
    "gpt_bigcode": ("GPTBigCode", {"n_inner": INNER}, "transformer.h.{}.mlp.c_proj"),
    "bloom": ("Bloom", {}, "transformer.h.{}.mlp.dense_4h_to_h"),
    "mpt": (
        "Mpt",
        {"d_model": HIDDEN, "n_layers": BLOCKS, "n_heads": 2, "max_seq_len": 64},
        "transformer.blocks.{}.ffn.down_proj",
    ),
    "stablelm": ("StableLm", _SHARED, _DOWN),
    "starcoder2": ("Starcoder2", _SHARED, "model.layers.{}.mlp.c_proj"),
    "cohere": ("Cohere", _SHARED | {"logit_scale": 1.0}, _DOWN),
    "glm": ("Glm", _GATED, _DOWN),
    "olmo2": ("Olmo2", _SHARED, _DOWN),
    "smollm3": ("SmolLM3", _SHARED, _DOWN),
    "granite": ("Granite", _SHARED | {"residual_multiplier": 0.5}, _DOWN),
    # Named nowhere before, in no test and no document; they came in by these two lines alone.
    "apertus": ("Apertus", _SHARED, _DOWN),
    "seed_oss": ("SeedOss", _GATED, _DOWN),
}
ZOO = tuple(_ZOO)
# Of each peculiarity one; the tests that take longest leave the others to `make thorough`.
PECULIAR = ("gemma3", "phi3", "falcon", "falcon_alibi", "gpt_neo", "mpt", "granite", "apertus")
PECULIAR += ("smollm3", "olmo2")
EVERY = [
    family if family in (*FAMILIES, *PECULIAR) else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES + ZOO
]
SECOND |= {family: second for family, (_, _, second) in _ZOO.items()}


class _InFloat64(TorchFunctionMode):
    """Reads float64 wherever float32 is asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **named)


def in_float64(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class, by the same name, with a forward pass that is all in float64."""

    @functools.wraps(kind.forward)
    def forward(self, *args, **kwargs):
        with _InFloat64():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _classes(family: str) -> tuple[type, type, dict[str, object]]:
    if family in _CLASSES:
        return _CLASSES[family]
    stem, sizes, _ = _ZOO[family]
    config = "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config"
    return getattr(transformers, f"{stem}ForCausalLM"), getattr(transformers, config), sizes


def model_of(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model in evaluation mode, no parameter requiring a gradient."""
    kind, config, sizes = _classes(family)
    return random_model(kind, config(**(COMMON | sizes | changes)), dtype, seed)


def random_model(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """The same of any class and configuration."""
    if dtype == torch.float64:
        kind = in_float64(kind)
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval().requires_grad_(False)


def questions(count: int, seed: int = 0, longest: int = 12, end: bool = True) -> list[Encoded]:
    """Distinct random questions of unlike length; answers of one to three tokens and an end."""
    generator = random.Random(seed)
    found: dict[tuple[int, ...], Encoded] = {}
    while len(found) < count:
        answer = generator.randint(1, 3)
        prompt = generator.randint(2, longest - answer - 1)
        ids = tuple(generator.randrange(1, VOCABULARY) for _ in range(prompt + answer))
        found[ids] = Encoded(ids + (0,) * end, prompt, prompt + answer)
    return list(found.values())


def logits_alone(model: PreTrainedModel, asked: Sequence[Encoded]) -> Tensor:
    """Logits at every source, one question after another through the whole model, unpadded."""
    rows = []
    for question in asked:
        full = model(input_ids=torch.tensor([question.ids]), use_cache=False).logits[0]
        rows.append(full[list(question.sources)])
    return torch.cat(rows)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes."""
    return tensor.detach().flatten().contiguous().view(torch.uint8).clone()
