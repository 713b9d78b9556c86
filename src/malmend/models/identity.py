"""What tells one model from another: its configuration, and all that is saved of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Of a configuration, what changes no output of the weights; nor does dropout, of whichever name.
NO_MATTER = {"architectures", "dtype", "torch_dtype", "initializer_range", "problem_type"}
NO_MATTER |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}
NO_MATTER |= {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"}
NO_MATTER |= {"transformers_version"}

State = tuple[tuple[int, int], ...]


def _configuration(model: PreTrainedModel) -> dict[str, Any]:
    """The configuration, without where it lay and by what it was written."""
    settings: dict[str, Any] = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return settings


def configuration_of(model: PreTrainedModel) -> dict[str, Any]:
    """Of the configuration, by dotted names and as JSON, what changes what the model computes."""
    said = json.dumps(_configuration(model), default=str)
    return dict(sorted(_dotted(json.loads(said, parse_constant=str))))  # infinity is no JSON


def unlike(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, and what each says.

    Of fields that both have: versions of transformers, and a GGUF file, name more or fewer.  Older
    ledgers keep it whole, by names in names.
    """
    mine, theirs = dict(_dotted(here)), dict(_dotted(there))
    both = sorted(mine.keys() & theirs.keys())
    return {n: (mine[n], theirs[n]) for n in both if not _alike(mine[n], theirs[n])}


def _dotted(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """What counts of a configuration and of those in it: a part has a dtype of its own too."""
    for name, value in settings.items():
        if name in NO_MATTER or "drop" in name or name.startswith("_"):
            continue
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{name}.")
        else:
            yield before + name, value


def _alike(here: Any, there: Any) -> bool:
    """Equal, but for the rounding of a GGUF file's float32 (1e-05 is 9.99999974e-06 there)."""
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(_alike, here, there))
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=1e-7)
    return bool(here == there)


def tokenizer_digest(tokenizer: Any, in_chat: bool = False) -> str:
    """SHA-256 over all that cuts texts into tokens, padding and truncation aside.

    ``in_chat``: and over the chat template.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said.update(padding=None, truncation=None)
    if in_chat:
        said["chat_template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tokens_digest(tokenizer: Any, in_chat: bool = False) -> str:
    """SHA-256 over the vocabulary, and how a text of all its entries is cut.

    Where another is refused: :func:`tokenizer_digest` changes with the library that writes it.
    """
    vocabulary = tokenizer.get_vocab()
    ids = tokenizer(" ".join(sorted(vocabulary)), verbose=False)["input_ids"]
    said = [vocabulary, ids, tokenizer.chat_template if in_chat else None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, tied ones once."""
    found = {name: one.detach() for name, one in model.named_parameters()}
    saved = model.state_dict()
    return found | {name: one for name, one in model.named_buffers() if name in saved}


def state_of(model: nn.Module) -> State:
    """Of every weight where it lies and how often it was written to: as long as no one writes to
    it past torch, it is the same numbers while this is the same."""
    return tuple((one.data_ptr(), one._version) for one in weights_of(model).values())


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bits, in the CPU's memory."""
    data: memoryview = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data
    return data


def digest(model: PreTrainedModel) -> str:
    """SHA-256 over configuration and every bit of all that is saved of the model, for caches.

    The fingerprint would not do: it is the same for weights that differ below bfloat16.
    """
    said = json.dumps(_configuration(model), sort_keys=True, default=str)
    return _bits(hashlib.sha256(said.encode()), model)


def bits(model: PreTrainedModel) -> str:
    """The same of the weights alone."""
    return _bits(hashlib.sha256(), model)


def _bits(found: Any, model: PreTrainedModel) -> str:
    for name, one in sorted(weights_of(model).items()):
        found.update(f"{name}:{tuple(one.shape)}:{one.dtype};".encode())
        found.update(_bytes(one))
    hexadecimal: str = found.hexdigest()
    return hexadecimal


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and values of all parameters and saved buffers, cast to bfloat16.

    Cast, so that a patch made on the float32 load of a model fits its bfloat16 load.
    """
    found = hashlib.sha256()
    for name, one in sorted(weights_of(model).items()):
        found.update(f"{name}:{tuple(one.shape)};".encode())
        found.update(_bytes(one.to("cpu", torch.bfloat16)))
    return found.hexdigest()
