"""Tiny random decoders of eight families, and random questions as token ids; no file, no network.

    family       linear   what is peculiar
    gpt2         Conv1D   weights stored K x V
    llama        Linear   gated feed-forward
    qwen2        Linear   grouped attention with biases
    gpt_neox     Linear   attention and feed-forward in parallel
    gptj         Linear   as gpt_neox, and blocks that return a tuple
    opt          Linear   a position table with an offset, learned from the mask
    gemma2       Linear   a norm after the layer, so that only whole blocks can be cut off
    mistral      Linear   sliding attention window

Initial weights are large, so that predictions are far from uniform, and no bias or norm is left at
0 or 1, so that a lost one is seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
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

_COMMON = {
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


def model_of(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model in evaluation mode, no parameter requiring a gradient."""
    kind, config, sizes = _CLASSES[family]
    torch.manual_seed(seed)
    model = kind(config(**(_COMMON | sizes | changes)))
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
