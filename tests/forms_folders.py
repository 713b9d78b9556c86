"""Folders of tiny models of the three forms, and files of facts that they can learn and be edited
in, for the tests of whole commands.

    bert    an encoder without a head; claims in MALMEN's FEVER format
    t5      shared embeddings, one token before the answer; facts with alternatives
    bart    two tokens before the answer; the same facts
    llama   a decoder; the same facts

Every word is a token, so a dozen facts are learned in seconds.  Initial weights are large where a
norm follows a layer, or nothing that can be said or chosen is ever sure.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import helpers
from command_support import malmend, name_of
from malmend.models.finetune import FinetuneSettings

RATES = {"bert": 1e-3, "t5": 1e-2, "bart": 3e-3, "llama": 3e-3}
CLASSES = ("SUPPORTS", "REFUTES")
COUNT = 12
PLACES = [f"{one}{two}" for one in ("Ka", "Lo", "Mi", "Ru") for two in ("se", "to", "va", "ne")]
_GENERATOR = random.Random(5)
SUBJECTS = list(dict.fromkeys(name_of(_GENERATOR) + "x" for _ in range(60)))[: 2 * COUNT]
WORDS = ["The", "capital", "of", "is", "has", "the", "In", "lies", "in", ".", "Lake", *PLACES]
_BERT = {"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
_BART = {
    f"{half}_{name}": value
    for half in ("encoder", "decoder")
    for name, value in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 2))
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """``<s> $A </s>`` for BERT and BART, an end behind for T5, ``<s>`` in front for Llama."""
    template = {"t5": "$A </s>", "llama": "<s> $A"}.get(family, "<s> $A </s>")
    ends = {"eos_token": None} if family == "bert" else {}
    return helpers.words([*WORDS, *SUBJECTS], template, **ends)


def learning(family: str) -> FinetuneSettings:
    """Learns a dozen facts, every one of them."""
    return FinetuneSettings(rate=RATES[family], batch=12, epochs=150, validation=0)


def save_base(family: str, folder: Path, seed: int = 0, classes: Sequence[str] = ()) -> str:
    """A random model that knows nothing yet; BERT's has no head, unless classes are given."""
    tokenizer = tokenizer_of(family)
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 3, "eos_token_id": 2}
    if family == "bert":
        sizes |= {"hidden_size": 32, "max_position_embeddings": 40, "initializer_range": 0.2}
        if classes:
            sizes |= {"id2label": dict(enumerate(classes))}
            sizes |= {"label2id": {name: index for index, name in enumerate(classes)}}
        kind = BertForSequenceClassification if classes else BertModel
        model = kind(BertConfig(**_BERT, **sizes))
    elif family == "t5":
        model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=3, **_T5, **sizes))
    elif family == "bart":
        sizes |= {"decoder_start_token_id": 2, "forced_eos_token_id": None, "bos_token_id": 1}
        sizes |= {"d_model": 32, "max_position_embeddings": 40, "init_std": 0.2}
        config = BartConfig(**_BART, **sizes)
        model = BartForConditionalGeneration(config)
    else:
        sizes |= {"hidden_size": 32, "bos_token_id": 1, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**_BERT, num_key_value_heads=2, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_facts(family: str, path: Path, first: int = 0, count: int = COUNT) -> str:
    """Facts about ``count`` of the subjects, in the family's own kind."""
    chosen = range(first, first + count)
    if family == "bert":
        path.write_text(json.dumps([_claim(index) for index in chosen]))
    else:
        path.write_text("\n".join(json.dumps(_fact(index)) for index in chosen))
    return str(path)


def save_text(path: Path, seed: int = 0) -> str:
    generator = random.Random(seed)
    lines = [" ".join(generator.choices(WORDS + SUBJECTS, k=8)) for _ in range(30)]
    path.write_text("\n".join(lines))
    return str(path)


def place(index: int, of: str = "is in") -> str:
    """One of sixteen places, two words in one case of four."""
    generator = random.Random(f"{index} {of}")
    one = generator.choice(PLACES)
    return f"{one} {generator.choice(PLACES)}" if index % 4 == 1 else one


def _fact(index: int) -> dict[str, object]:
    subject, other = SUBJECTS[index], SUBJECTS[(index + 1) % len(SUBJECTS)]
    answer, alternative = place(index), place(index, "is not in")
    alternative = alternative if alternative != answer else PLACES[index % 3]
    return {
        "id": f"f{index}",
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "answer": answer,
        "alternative": alternative,
        "paraphrases": [f"{subject} has the capital", f"In {subject} the capital is"],
        "unrelated": [{"prompt": f"Lake {other} lies in", "answer": place(index, "lake")}],
    }


def _claim(index: int) -> dict[str, object]:
    subject, where = SUBJECTS[index], PLACES[index % len(PLACES)]
    label, alternative = (CLASSES, CLASSES[::-1])[index * 7 % 3 == 1]
    return {
        "subject": subject,
        "prompt": f"{subject} lies in {where} .",
        "equiv_prompt": [f"In {where} lies {subject} .", f"{subject} is in {where} ."],
        "label": label,
        "alt": alternative,
        "unrel_prompt": f"Lake {SUBJECTS[(index + 5) % len(SUBJECTS)]} is the capital .",
        "unrel_ans": CLASSES[index % 2],
    }


def refused(capsys, *arguments: object) -> str:
    """The one sentence that a command answers with."""
    capsys.readouterr()
    assert malmend(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    said = [line for line in shown.err.splitlines() if line.strip()]
    (line,) = [line for line in said if not line.startswith("Editor: ")]
    assert line.startswith("malmend: ")
    return line
