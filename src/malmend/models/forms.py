"""The three forms of model that can be edited, told by their class, and how each is run.

    causal    a decoder with an output layer            *ForCausalLM, *LMHeadModel
    classes   an encoder with a classification head     *ForSequenceClassification
    seq2seq   an encoder-decoder with an output layer   *ForConditionalGeneration, ...

Nothing else in the package asks which of them a model is but through these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor, nn
from torch.backends import cuda
from transformers import PreTrainedModel

from malmend.errors import ModelError, is_of_device, is_out_of_memory
from malmend.facts.encoded import Encoded, Form, TokenBatch, collate
from malmend.facts.fact import class_key
from malmend.facts.tokens import Reading
from malmend.files import reason

KINDS = "a decoder, an encoder with a classification head, or an encoder-decoder"
CLASSIFIER = "ForSequenceClassification"


_UNRUN = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
)


class Unrun(Exception):
    """A model cannot be run as a trial did; says why."""


@contextmanager
def tried() -> Iterator[None]:
    """Inside, whatever a model raises that cannot be run so is :class:`Unrun`.

    Not that there is no memory, or that a device failed, which says nothing of the model.
    """
    try:
        yield
    except _UNRUN as error:
        if is_out_of_memory(error) or is_of_device(error):
            raise
        raise Unrun(reason(error)) from error


@dataclass(frozen=True, eq=False)
class Stack:
    """A row of like blocks; ``in_encoder`` only of an encoder-decoder's encoder."""

    prefix: str
    blocks: nn.ModuleList
    in_encoder: bool = False

    def number_of(self, name: str) -> int:
        """Of the block that a layer of this name lies in."""
        return int(name.removeprefix(f"{self.prefix}.").partition(".")[0])


def reading_of(config: Any, kind: str) -> Reading:
    """How a model is asked.

    Args:
        config: the model's.
        kind: the name of its class.

    Raises:
        ModelError: a head that says neither tokens nor one class of several.
    """
    if not kind.endswith(CLASSIFIER):
        if not config.is_encoder_decoder:
            return Reading()
        return Reading("seq2seq", start=getattr(config, "decoder_start_token_id", None))
    problem = getattr(config, "problem_type", None)
    if (
        config.is_encoder_decoder
        or config.num_labels < 2
        or problem not in (None, "single_label_classification")
    ):
        what = f"{config.num_labels} outputs, problem_type {problem}"
        raise ModelError(
            f"{kind} ({what}) cannot be edited, expected {KINDS}; a classifier must be an encoder "
            "that chooses one of two or more classes."
        )
    names = class_names(config)
    check_told_apart(names)
    return Reading("classes", names)


def class_names(config: Any) -> tuple[str, ...]:
    """The names of a classifier's classes in order; one without a name is called by its number."""
    known = config.id2label or {}
    return tuple(str(known.get(i, "")).strip() or str(i) for i in range(config.num_labels))


def check_told_apart(classes: Sequence[str]) -> None:
    """Raises ModelError for two classes that no answer could tell apart (:func:`class_key`)."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(class_key(name), name)
        if other is not name:
            raise ModelError(
                f"The classes {other!r} and {name!r} differ in case, spacing or encoding alone, "
                "so that an answer could not tell them apart; write each class one way."
            )


def form_of(model: PreTrainedModel) -> Form:
    """The form of a loaded model.

    Raises:
        ModelError: as :func:`reading_of`, or a model without a head.
    """
    form = reading_of(model.config, type(model).__name__).form
    if form != "classes" and model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no output layer, expected {KINDS}; load it with its head."
        )
    return form


def positions_of(config: Any) -> int | None:
    """The longest text, in tokens, that a configuration states; None where it states none."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def positions_in(model: PreTrainedModel) -> int | None:
    """How many tokens a model can read at most; None where its configuration sets no end.

    RoBERTa counts its tokens from behind the place that its table keeps for padding.
    """
    stated = positions_of(model.config)
    for name, one in model.named_modules():
        is_table = isinstance(one, nn.Embedding) and one.num_embeddings == stated
        if is_table and "position" in name and one.padding_idx is not None:
            return stated - one.padding_idx - 1
    return stated


def reads(model: PreTrainedModel, count: int) -> bool:
    """Whether it has positions for so many tokens: a trial beyond them ends all work on a GPU."""
    room = positions_in(model)
    return room is None or count <= room


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The model's rows of like blocks, in the order they run: one, or encoder and decoder.

    Raises:
        ModelError: there is none.
    """
    if not model.config.is_encoder_decoder:
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        return (Stack(*_longest(model, model.get_decoder() or model, count)),)
    found = []
    for name in ("encoder", "decoder"):
        half = getattr(model, f"get_{name}", lambda: None)()
        if not isinstance(half, nn.Module):
            raise ModelError(
                f"{type(model).__name__} does not say which of its modules is its {name}; give "
                f"{KINDS} of another make."
            )
        found.append(Stack(*_longest(model, half, None), in_encoder=name == "encoder"))
    return tuple(found)


def _longest(
    model: PreTrainedModel, inside: nn.Module, length: int | None
) -> tuple[str, nn.ModuleList]:
    """The longest list of modules of one class, the outermost of several.

    Raises:
        ModelError: there is none, or several beside one another, as XLM's attentions and
            feed-forward parts are.
    """
    within = set(inside.modules())
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and module in within
        and len(module) == (length or len(module))
        and len({type(block) for block in module}) == 1
    ]
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no single stack of blocks of its own, which editing "
            f"needs; give {KINDS} whose layers are modules of one class, each with weights of "
            "its own."
        )
    longest = max(stacks, key=lambda stack: len(stack[1]))
    place = longest[0].rpartition(".")[0]
    beside = [
        name
        for name, module in stacks
        if name.rpartition(".")[0] == place
        and len(module) == len(longest[1])
        and any(weight.ndim >= 2 for weight in module.parameters())
    ]
    if len(beside) > 1:
        raise ModelError(
            f"{type(model).__name__} keeps the parts of its blocks in lists of their own "
            f"({', '.join(beside)}), expected one list of whole blocks; give {KINDS} of another "
            "make."
        )
    return longest


def cannot_run(model: PreTrainedModel, error: Unrun, what: str) -> ModelError:
    """That a trial, of which ``what`` says the end, could not be run."""
    return ModelError(
        f"{type(model).__name__} cannot run ({error}), which {what} needs; load it whole, "
        f"unquantised and in float32, or give {KINDS} that reads texts of any length."
    )


@dataclass
class _Switch:
    """The process's one switch: how many blocks of all threads it is off for, and what it was."""

    inside: int = 0
    before: bool = True


_CUDNN, _SWITCHING = _Switch(), Lock()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside, attention is none of cuDNN's: wherever a model itself is run.

    In half precision it comes first on newer GPUs, builds a plan for every new shape, and with a
    mask some of its gradients are NaN (pytorch#196678).  Other choices of a kernel stay.
    """
    with _SWITCHING:
        if not _CUDNN.inside:
            _CUDNN.before = cuda.cudnn_sdp_enabled()
        _CUDNN.inside += 1
        cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _SWITCHING:
            _CUDNN.inside -= 1
            if not _CUDNN.inside:
                cuda.enable_cudnn_sdp(_CUDNN.before)


def run(model: PreTrainedModel, tokens: TokenBatch, encoded: Tensor | None = None) -> Any:
    """The model's own forward pass over a batch.

    ``encoded`` are an encoder's final states; its blocks are then not run.
    """
    device = model.device
    inputs: dict[str, Any] = {"attention_mask": tokens.mask_BT.to(device)}
    if encoded is None:
        inputs["input_ids"] = tokens.ids_BT.to(device)
    else:
        inputs["encoder_outputs"] = (encoded,)
    if tokens.decoded_BD is not None and tokens.decoded_mask_BD is not None:
        inputs["decoder_input_ids"] = tokens.decoded_BD.to(device)
        inputs["decoder_attention_mask"] = tokens.decoded_mask_BD.to(device)
    if tokens.questions[0].form != "classes":
        inputs["use_cache"] = False
    with without_cudnn():
        return model(**inputs)


def probe(model: PreTrainedModel, *rows: tuple[int, ...]) -> TokenBatch:
    """A batch of prompts without answers, for trying a model out."""
    form = form_of(model)
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    prefix = (start,) if form == "seq2seq" else ()
    return collate([Encoded(row, len(row), len(row), form, prefix) for row in rows])


@contextmanager
def output_reads(model: PreTrainedModel, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets ``choose`` pick the hidden states that the output layer reads."""
    layer = model.get_output_embeddings()
    assert layer is not None
    handle = layer.register_forward_pre_hook(lambda _, args: (choose(args[0]).unsqueeze(0),))
    try:
        yield
    finally:
        handle.remove()


def at_places(states_BTH: Tensor, flat_A: Tensor) -> Tensor:
    """The states at these indices of the flattened B x T positions, A x H."""
    flat = states_BTH.reshape(-1, states_BTH.shape[-1])
    return flat[flat_A.to(flat.device)]


def answer_logits(model: PreTrainedModel, tokens: TokenBatch) -> Tensor:
    """Logits of the whole model at the answer tokens of a batch, A x W; gradients reach it."""
    if tokens.questions[0].form == "classes":
        return run(model, tokens).logits
    with output_reads(model, partial(at_places, flat_A=tokens.flat_sources_A)):
        return run(model, tokens).logits.squeeze(0)
