"""Tiny tokenizers and models, built on the spot: no file, no network, milliseconds each.

    byte_level()    GPT-2's kind: byte-level BPE, no BOS, an end token, any text survives
    metaspace()     Llama's kind: BPE over "▁word" with byte fallback, BOS in front
    words()         one token per known word, the rest is unknown; ``template`` puts specials about
    tiny_llama()    two blocks of nn.Linear, in float64
    tiny_gpt2()     two blocks of Conv1D, in float64
    mixture()       two blocks of experts, none of which an editor edits, in float32

Every tokenizer takes further keywords of ``PreTrainedTokenizerFast`` (``padding_side``,
``pad_token``, ``chat_template`` ...).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "The capital of France is Paris. The capital of Peru is Lima.",
    "In which country is Lake Ora? Lake Ora is in Chile.",
    "Mars has two moons, and Venus has no moon.",
]


def byte_level(
    trim_offsets: bool = True, add_prefix_space: bool = False, **keywords: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ``trim_offsets`` as in GPT-2 leaves the blank of " word" out of its span."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>", "<|reply|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | keywords)
    )


def metaspace(template: str = "<s> $A", **keywords: Any) -> PreTrainedTokenizerFast:
    """BPE over Metaspace with byte fallback; ``<s>`` in front as Llama, ``"$A </s>"`` as T5."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=100, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learned = json.loads(learner.to_str())["model"]
    # The byte tokens are ordinary ones, so they cannot come in as the trainer's special tokens.
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _frame(tokenizer, template)
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(specials | keywords))


def words(
    known: Sequence[str],
    template: str | None = None,
    lower: bool = False,
    **keywords: Any,
) -> PreTrainedTokenizerFast:
    """Word-level: ids 0 to 3 are ``<unk> <s> </s> <pad>``, then ``known`` in their order.

    ``template`` as in ``"<s> $A </s>"``; ``lower`` lower-cases the text before the look-up.
    """
    names = ["<unk>", "<s>", "</s>", "<pad>", *known]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Words, single marks, and single line breaks; other blanks are dropped.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    if template is not None:
        _frame(tokenizer, template)
    specials = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(specials | keywords))


def _frame(tokenizer: Tokenizer, template: str) -> None:
    specials = [(name, tokenizer.token_to_id(name)) for name in template.split() if name != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=specials
    )


def tiny_llama(vocabulary: int, seed: int = 0, **keywords: Any) -> PreTrainedModel:
    """Random Llama with gated feed-forward blocks of width 24, hidden width 16."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(sizes | keywords)))
    return model.to(torch.float64).eval()


def tiny_gpt2(vocabulary: int, seed: int = 0, **keywords: Any) -> PreTrainedModel:
    """Random GPT-2, whose linear layers are Conv1D (K x V), hidden width 16."""
    sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 128}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}  # the default ids lie outside the vocabulary
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **(sizes | keywords)))
    return model.to(torch.float64).eval()


def mixture(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random mixture of experts of two blocks, for this tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes |= {"vocab_size": len(tokenizer), "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def weights_of(folder: Path) -> Path:
    """The weights in an editor's folder."""
    (path,) = folder.glob("editor-*.safetensors")
    return path
