"""Tiny random encoders with a classification head and encoder-decoders, and questions for them.

    bert, roberta, distilbert   a norm after the second layer, so that only whole blocks are cut off
    t5, t5-gated                a position bias that the first block hands down; a plain residual
    bart                        two tokens before the answer

Initial weights are large, so that predictions are far from uniform, and no bias or norm is left at
0 or 1, so that a lost one is seen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from malmend.facts.encoded import Encoded
from malmend.models.sites import Site
from tiny import in_float64

VOCABULARY, HIDDEN, INNER, BLOCKS, CLASSES = 60, 16, 24, 3, 3

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.25,
    "num_labels": CLASSES,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": BLOCKS,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "initializer_factor": 3.0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "encoder_layers": BLOCKS,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 40,
    "init_std": 0.25,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_MADE = {
    "bert": (BertForSequenceClassification, BertConfig, _BERT),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _BERT),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": BLOCKS,
            "n_heads": 2,
            "max_position_embeddings": 40,
            "initializer_range": 0.25,
            "num_labels": CLASSES,
        },
    ),
    "t5": (T5ForConditionalGeneration, T5Config, _T5),
    "t5-gated": (
        T5ForConditionalGeneration,
        T5Config,
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": (BartForConditionalGeneration, BartConfig, _BART),
}
ENCODERS = ("bert", "roberta", "distilbert")
PAIRS = ("t5", "t5-gated", "bart")
FAMILIES = (*ENCODERS, *PAIRS)
PREFIX = {"t5": (0,), "t5-gated": (0,), "bart": (2, 0)}
# Names of the first and the second layer of a block, of the encoder and of the decoder.
LAYERS = {
    "bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
    "roberta": (
        "roberta.encoder.layer.{}.intermediate.dense",
        "roberta.encoder.layer.{}.output.dense",
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.ffn.lin1",
        "distilbert.transformer.layer.{}.ffn.lin2",
    ),
    "t5": (
        "encoder.block.{}.layer.1.DenseReluDense.wi",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
    ),
    "t5-gated": (
        "encoder.block.{}.layer.1.DenseReluDense.wi_1",
        "encoder.block.{}.layer.1.DenseReluDense.wo",
    ),
    "bart": ("model.encoder.layers.{}.fc1", "model.encoder.layers.{}.fc2"),
}


def decoder_layer(name: str) -> str:
    """The decoder's layer of the same part."""
    return name.replace("encoder", "decoder").replace("layer.1.Dense", "layer.2.Dense")


def model_of(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> PreTrainedModel:
    """A random model in evaluation mode, no parameter requiring a gradient."""
    kind, config, sizes = _MADE[family]
    torch.manual_seed(seed)
    model = kind(config(**(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            if family.startswith("t5") and "relative_attention_bias" in name:
                parameter += torch.randn_like(parameter)  # else the bias hardly matters
    if family.startswith("t5") and dtype == torch.float64:
        for half in (model.encoder, model.decoder):  # T5 takes norms and softmax in float32
            half.__class__ = in_float64(type(half))
    return model.to(dtype).eval().requires_grad_(False)


def questions(family: str, count: int = 7, seed: int = 0) -> list[Encoded]:
    """Distinct random questions of unlike length; answers of one to three tokens and an end."""
    generator = random.Random(seed)
    found: dict[tuple[int, ...], Encoded] = {}
    while len(found) < count:
        size = generator.randint(2, 8)
        prompt = (0, *(generator.randrange(4, VOCABULARY) for _ in range(size)), 2)
        if family in ENCODERS:
            label = generator.randrange(CLASSES)
            found[prompt] = Encoded((*prompt, label), len(prompt), len(prompt) + 1, "classes")
            continue
        answer = tuple(generator.randrange(4, VOCABULARY) for _ in range(generator.randint(1, 3)))
        end, prefix = len(prompt) + len(answer), PREFIX[family]
        found[prompt] = Encoded((*prompt, *answer, 2), len(prompt), end, "seq2seq", prefix)
    return list(found.values())


def logits_alone(
    model: PreTrainedModel,
    asked: Sequence[Encoded],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits where each label is predicted, one question after another, unpadded.

    The decoder's inputs are written out here from the labels, not taken from the question.  Without
    an answer the logits are those of the first token that would be said.  ``weights`` stand in for
    the model's own.
    """
    rows = []
    for question in asked:
        inputs = {"input_ids": torch.tensor([question.ids[: question.answer_start]])}
        if question.form == "classes":
            rows.append(functional_call(model, dict(weights or {}), (), inputs).logits)
            continue
        labels = list(question.ids[question.answer_start :])
        inputs["decoder_input_ids"] = torch.tensor([[*question.prefix, *labels[:-1]]])
        inputs["use_cache"] = False
        logits = functional_call(model, dict(weights or {}), (), inputs).logits[0]
        rows.append(logits[-max(len(labels), 1) :])
    return torch.cat(rows)


def pairs_alone(
    model: PreTrainedModel,
    sites: Sequence[Site],
    question: Encoded,
    deltas: Mapping[str, Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and gradients of layers at all their positions, by plain autograd; and the loss."""
    keys, values = {}, {}

    def hook(site: Site):
        def moved(_module, args, output):
            keys[site.name] = args[0].detach()[0]
            output = output if deltas is None else output + deltas[site.name]
            values[site.name] = output if output.requires_grad else output.requires_grad_(True)
            return values[site.name]

        return moved

    handles = [site.module.register_forward_hook(hook(site)) for site in sites]
    labels = torch.tensor(question.ids[question.answer_start :])
    with torch.enable_grad():
        logits = logits_alone(model, [question])
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        grads = torch.autograd.grad(nll.sum(), [values[site.name] for site in sites])
    for handle in handles:
        handle.remove()
    return [keys[site.name] for site in sites], [grad[0] for grad in grads], nll.detach()


def places(site: Site, question: Encoded, tokens: str) -> list[int]:
    """The positions of a site that are captured."""
    if site.in_encoder:
        return list(range(question.answer_start))
    if question.form == "classes":
        return [0] if tokens == "answer" else list(range(question.answer_start))
    first = len(question.prefix) - 1
    count = len(question.ids) - question.answer_start
    return list(range(first if tokens == "answer" else 0, first + count))
