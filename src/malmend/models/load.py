"""The only place that loads weights; where they lie :mod:`malmend.models.source` knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from malmend.errors import ModelError, is_full_device
from malmend.facts.encoded import Form
from malmend.facts.fact import class_key
from malmend.facts.tokens import Reading
from malmend.given import checked
from malmend.models.device import CPU, SPREAD, device_of
from malmend.models.explain import explained
from malmend.models.forms import (
    check_told_apart,
    class_names,
    form_of,
    positions_in,
    reading_of,
)
from malmend.models.identity import State, digest, fingerprint, state_of
from malmend.models.source import SAFE, check_whole, save_tokenizer, source_of

LOADERS: dict[Form, Any] = {
    "causal": AutoModelForCausalLM,
    "classes": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
WEIGHTS: dict[str, Any] = {**SAFE, "use_safetensors": True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(dtype: object) -> str:
    """A torch dtype's name without the module; of anything else what it says of itself."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be edited: evaluation mode, no parameter requires a gradient."""

    name: str
    model: PreTrainedModel = field(repr=False)
    tokenizer: Any = field(repr=False)
    fingerprint: str
    _seen: list[State] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self._seen.append(state_of(self.model))

    def check_unchanged(self) -> None:
        """Raises ModelError where the weights are others than when they were prepared.

        What is found of a model is kept by its digest, which a training in place leaves behind.
        Call while no patch is on.
        """
        now = state_of(self.model)
        if now == self._seen[-1]:
            return
        # They were written to, or moved: it may have been with the same numbers.
        if fingerprint(self.model) != self.fingerprint:
            raise ModelError(
                f"The weights of {self.name} were changed since it was loaded, so that what is "
                "known of it is of another model; wrap it again by prepared(model, tokenizer)."
            )
        self.__dict__.pop("digest", None)  # they may differ below what the fingerprint sees
        self._seen[:] = [now]

    @property
    def positions(self) -> int | None:
        """As :func:`malmend.models.forms.positions_in`."""
        return positions_in(self.model)

    @property
    def dtype(self) -> str:
        """The weights', as it is named in files and options: ``float32``."""
        return name_of(self.model.dtype)

    @property
    def reading(self) -> Reading:
        """How the model is asked and answers."""
        return reading_of(self.model.config, type(self.model).__name__)

    @cached_property
    def digest(self) -> str:
        """As :func:`malmend.models.identity.digest`.

        Taken on first use, so use it first while no patch is on.
        """
        return digest(self.model)


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone, so that facts can be checked before any weight is read.

    Raises:
        ModelError: there is no such model.
    """
    with quiet(), explained(name):
        return AutoTokenizer.from_pretrained(source_of(name), **SAFE)


def load_config(name: str) -> Any:
    """The configuration alone, for :func:`stated_reading` and ``positions_of`` of forms.py.

    Raises:
        ModelError: there is no such model.
    """
    with quiet(), explained(name):
        return AutoConfig.from_pretrained(source_of(name), **SAFE)


def stated_reading(config: Any) -> Reading:
    """What :attr:`LoadedModel.reading` will be, by a configuration."""
    return reading_of(config, _kind(config))


def _kind(config: Any) -> str:
    """The name of the model's class, as a configuration states it; empty where it states none.

    Raises:
        ModelError: it states something else than names.
    """
    stated = getattr(config, "architectures", None) or [""]
    if not isinstance(stated, list) or not isinstance(stated[0], str):
        raise ModelError(
            f"The configuration states architectures {str(stated)[:60]!r}, expected a list with "
            "the name of the model's class; fetch the model again."
        )
    return stated[0]


@checked()
def load_model(name: str, dtype: str = "float32", device: str = CPU) -> LoadedModel:
    """Model, tokenizer and the fingerprint of the weights.

    Args:
        name: a built-in name (``smollm2-135m``), a folder, a ``.gguf`` file, or a hub name.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: that it is put on, or "auto" for a ``device_map`` over all (:func:`device_of`).

    Raises:
        ModelError: not found, not readable, or of no form that can be edited; no such device, or
            none with room for it.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown, expected one of {', '.join(DTYPES)}.")
    place = device_of(device)
    spread = {} if place is not None else {"device_map": SPREAD}
    with quiet(), explained(name):
        source = source_of(name)
        tokenizer = AutoTokenizer.from_pretrained(source, **SAFE)
        reading = stated_reading(AutoConfig.from_pretrained(source, **SAFE))
        model, found = LOADERS[reading.form].from_pretrained(
            source, dtype=DTYPES[dtype], output_loading_info=True, **spread, **WEIGHTS
        )
        check_whole(name, model, found["missing_keys"])
    return prepared(_put(model, place), tokenizer, name)


def _put(model: PreTrainedModel, place: torch.device | None) -> PreTrainedModel:
    """The model on this device, where it is not spread already."""
    if place is None or place.type == CPU:
        return model
    try:
        return model.to(place)
    except RuntimeError as error:
        if not is_full_device(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not fit {place}; give --device cpu, or, to edit it, "
            "--device auto where there are several, or --dtype bfloat16."
        ) from error


def load_base(name: str, classes: Sequence[str], device: str = CPU) -> tuple[PreTrainedModel, Any]:
    """A model that is to be fine-tuned, in float32, and its tokenizer.

    An encoder gets a new classification head, made up at random from torch's generator, unless it
    has one that shares a class with these, which then stays as it is, or one of as many classes,
    which gets these names; a decoder or an encoder-decoder comes as it is.

    Args:
        name: as for :func:`load_model`.
        classes: names of an encoder's, in order.
        device: that it is put on, whole.

    Raises:
        ModelError: not found, or not readable; no such device, or without room for it.
    """
    place = device_of(device)
    if place is None:
        raise ModelError(
            "--device auto spreads a model over all devices, and one is fine-tuned whole; name "
            "one, or give cpu."
        )
    with quiet(), explained(name):
        source = source_of(name)
        config = AutoConfig.from_pretrained(source, **SAFE)
        kind = _kind(config)
        keywords: dict[str, Any] = {"dtype": torch.float32}
        form: Form = "classes"
        if config.is_encoder_decoder:
            form = "seq2seq"
        elif kind.endswith(("ForCausalLM", "LMHeadModel")):
            form = "causal"
        else:
            known = class_names(config)
            if set(map(class_key, known)) & set(map(class_key, classes)):
                classes = known  # of a label that is none of them the facts' check will tell
            _check_classes(classes)
            keywords["id2label"] = dict(enumerate(classes))
            keywords["label2id"] = {label: index for index, label in enumerate(classes)}
            keywords["ignore_mismatched_sizes"] = True
        model, found = LOADERS[form].from_pretrained(
            source, output_loading_info=True, **keywords, **WEIGHTS
        )
        lacking = [
            one for one in found["missing_keys"] if form != "classes" or _in_base(model, one)
        ]
        check_whole(name, model, lacking)
        return _put(model, place), AutoTokenizer.from_pretrained(source, **SAFE)


def _in_base(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is below the classification head; a pooler is part of that."""
    return name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name


def _check_classes(classes: Sequence[str]) -> None:
    """Raises ModelError unless there are classes that can be told apart."""
    if len(classes) < 2:
        raise ModelError(
            f"The facts name {len(classes)} class ({', '.join(map(repr, classes))}), expected two "
            "or more for an encoder to choose from; give facts with other answers, or with an "
            "alternative each."
        )
    check_told_apart(classes)


def save_model(loaded: LoadedModel, folder: Path) -> None:
    """Writes model and tokenizer as :func:`load_model` reads them."""
    with quiet():
        save_tokenizer(loaded.tokenizer, folder)
        loaded.model.save_pretrained(folder)


@checked()
def prepared(model: PreTrainedModel, tokenizer: Any, name: str = "model") -> LoadedModel:
    """Wraps a model that the caller has loaded: evaluation mode, gradients off, fingerprint.

    Raises:
        ModelError: of no form that can be edited, or with weights that are on no device.
    """
    form_of(model)
    away = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if away is not None:
        raise ModelError(
            f"{away} is offloaded to disk or CPU, so it cannot be edited in place; load the model "
            "where all of it fits: fewer bytes per weight, or a device_map without offloading."
        )
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(name, model, tokenizer, fingerprint(model))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the loaders' own progress bars and warnings off the terminal."""
    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
