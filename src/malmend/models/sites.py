"""Which linear layers can be edited, found from the module structure.

A *site* is a linear layer with weight W (V x K) that an editor shifts.  This file is the only one
that knows how a weight is stored: ``nn.Linear`` keeps V x K, GPT-2's ``Conv1D`` keeps K x V.

Shape letters: V value width (output), K key width (input).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from malmend.errors import ModelError, counted, nearest
from malmend.given import faults
from malmend.models.blocks import PLAIN, check_runs, is_linear, run_matrices
from malmend.models.forms import Stack, find_stacks

Linear = Literal["second", "first", "both"]
Side = Literal["both", "encoder", "decoder"]
LAYERS = 6  # edited where nothing is said


@contextmanager
def put_back(back: Callable[[], None]) -> Iterator[None]:
    """Whatever ends the block, ``back`` undoes what it did to a model.

    Called twice, for an interrupt may end it half-way, so it must be one that does no harm then.
    """
    try:
        yield
    finally:
        try:
            back()
        finally:
            back()


class NoFirst(ModelError):
    """A block has no layer that feeds its second one alone."""


@dataclass(frozen=True, eq=False)
class Site:
    """One editable linear layer."""

    name: str
    module: nn.Module
    in_encoder: bool = False  # of an encoder-decoder: its keys are the prompt's tokens

    @property
    def weight(self) -> nn.Parameter:
        """The layer's own parameter, in its own orientation."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """Whether the layer stores K x V."""
        return isinstance(self.module, Conv1D)

    @property
    def shape_VK(self) -> tuple[int, int]:
        """(V, K)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    def oriented(self, matrix: Tensor) -> Tensor:
        """From the layer's orientation to V x K, or back: a view."""
        return matrix.T if self.is_transposed else matrix


def find_sites(
    model: PreTrainedModel,
    layers: int | None = None,
    pattern: str | None = None,
    linear: Linear = "second",
    side: Side = "both",
) -> tuple[Site, ...]:
    """One or both linear layers of each of the last ``layers`` feed-forward blocks, lowest first.

    Found by running two tokens.  The second layer is, of what a block multiplies by, the one that
    is run last, and must be a linear layer that gives the block's width; the first is the last one
    before it whose shape is the other way round (of a gated block's two, the one that no activation
    follows).  ``pattern`` (a module name, or a shell pattern such as ``*.mlp.c_proj``) chooses by
    name instead; ``layers``, ``linear`` and ``side`` then do not apply.

    Args:
        model: of one of the three forms.
        layers: how many blocks; of an encoder-decoder in each half.  None for the last six, or all
            of fewer.
        pattern: names in place of all that.
        linear: which layer of the feed-forward block.
        side: which half of an encoder-decoder.

    Raises:
        ModelError: no such layer, or one that cannot be edited, with the reason.
    """
    given = {"layers": layers, "linear": linear, "side": side}
    for said in faults(given, {"layers": int | None, "linear": Linear, "side": Side}):
        raise ModelError(f"{said}.")
    if pattern is not None:
        return _named_sites(model, pattern)
    stacks = [stack for stack in find_stacks(model) if side in ("both", _side(model, stack))]
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} is no encoder-decoder, so it has no side {side!r}; leave "
            "--side out."
        )
    shortest = min(len(stack.blocks) for stack in stacks)
    layers = min(LAYERS, shortest) if layers is None else layers
    if not 1 <= layers <= shortest:
        raise ModelError(
            f"{counted(layers, 'layer')} to edit, expected 1 to {shortest}, the number of blocks "
            "of this model; change --layers."
        )
    runs = run_matrices(model, stacks)
    order, sites = list(runs), []
    for stack in stacks:
        for index in range(len(stack.blocks) - layers, len(stack.blocks)):
            block = f"{stack.prefix}.{index}"
            mine = [name for name in order if name.startswith(f"{block}.")]
            stands_as = next(n for n, m in model.named_modules() if m is stack.blocks[index])
            if stands_as != block:
                raise ModelError(
                    f"Block {block} shares its weights with {stands_as}, so that an edit would "
                    "change both; choose another layer with --sites."
                )
            second = _second(model, block, mine)
            names = [second] if linear == "second" else [_first(model, block, mine[:-1], second)]
            names += [second] if linear == "both" else []
            for name in names:
                sites.append(_checked_site(model, name, stack))
                check_runs(model, name, stack, runs)
    return tuple(sites)


def usual_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Where a model that is only asked is cut: as editors do, or nowhere, as of experts."""
    try:
        return find_sites(model)
    except ModelError:
        return ()


def feed_forward_sites(model: PreTrainedModel, layers: int | None) -> tuple[Site, ...]:
    """Both layers of each of the last blocks, or the second of one whose first is fused.

    Raises:
        ModelError: as :func:`find_sites`.
    """
    seconds = find_sites(model, layers)
    try:
        return find_sites(model, layers, linear="both")
    except NoFirst:  # one that is there and cannot be edited is no reason to edit less
        return seconds


def around(model: PreTrainedModel, sites: Sequence[Site]) -> tuple[Site, ...]:
    """These sites, and of their blocks and the one below them what else feeds or follows attention.

    That is, of each block, the attention's output (of the layers that give the model's width the
    last before the feed-forward part) and both feed-forward layers; those of them that can be
    edited.  In the order in which they are run.  Of a decoder.
    """
    stack = stack_of(model, sites[0].name)
    runs = run_matrices(model, [stack])
    blocks = [stack.number_of(site.name) for site in sites]
    found = {site.name: site for site in sites}
    for index in range(max(min(blocks) - 1, 0), max(blocks) + 1):
        block = f"{stack.prefix}.{index}"
        for name in _attention_and_feed_forward(model, block, list(runs)):
            with suppress(ModelError):
                site = _checked_site(model, name, stack)
                check_runs(model, name, stack, runs)
                found.setdefault(name, site)
    order = list(runs)
    return tuple(found[name] for name in sorted(found, key=order.index))


def _attention_and_feed_forward(
    model: PreTrainedModel, block: str, order: list[str]
) -> Iterator[str]:
    """Names of a block's attention output and feed-forward layers, those that can be told."""
    mine = [name for name in order if name.startswith(f"{block}.")]
    ends = len(mine)
    with suppress(ModelError):
        second = _second(model, block, mine)
        ends = mine.index(second)
        yield second
        first = _first(model, block, mine[:ends], second)
        ends = mine.index(first)
        yield first
    width = _width(model)
    for name in reversed(mine[:ends]):
        module = model.get_submodule(name)
        if is_linear(module) and Site("", module).shape_VK[0] == width:
            yield name
            return


def _side(model: PreTrainedModel, stack: Stack) -> str:
    if not model.config.is_encoder_decoder:
        return "the only one"
    return "encoder" if stack.in_encoder else "decoder"


def _second(model: PreTrainedModel, block: str, order: list[str]) -> str:
    """The name of the layer that a block runs last."""
    width = _width(model)
    last = model.get_submodule(order[-1]) if order else None
    if last is None or not is_linear(last) or Site("", last).shape_VK[0] != width:
        what = "nothing that multiplies" if last is None else type(last).__name__
        raise ModelError(
            f"Block {block} ends in {what}, expected a plain linear layer of output width {width} "
            "(mixture-of-experts, fused and quantised layers cannot be edited, nor blocks without "
            "a feed-forward part); choose layers by name with --sites, or load the model "
            "unquantised."
        )
    if 2 * Site("", last).shape_VK[1] < width:
        raise ModelError(
            f"Block {block} ends in {order[-1]}, which reads less than half of what it gives, so "
            "that it is no feed-forward's second layer (but a shared expert, or an input of the "
            "block's own); choose layers by name with --sites."
        )
    return order[-1]


def _first(model: PreTrainedModel, block: str, before: list[str], second: str) -> str:
    """The name of the layer whose output, after the activation, is the second's input."""
    value_width, key_width = Site("", model.get_submodule(second)).shape_VK
    for name in reversed(before):
        module = model.get_submodule(name)
        if is_linear(module) and Site("", module).shape_VK == (key_width, value_width):
            return name
    raise NoFirst(
        f"Block {block} has no linear layer of shape {key_width} x {value_width} before {second} "
        "(it may be fused with the gate, or be part of the attention); edit the second layer, or "
        "choose one by name with --sites."
    )


def _width(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _named_sites(model: PreTrainedModel, pattern: str) -> tuple[Site, ...]:
    sites = linear_sites(model, pattern)
    runs = run_matrices(model, find_stacks(model))
    for site in sites:
        check_runs(model, site.name, stack_of(model, site.name), runs)
    return sites


def linear_sites(model: PreTrainedModel, pattern: str) -> tuple[Site, ...]:
    """The linear layers of the blocks by name, for methods that read no keys of theirs.

    So they may be experts, or read another half's tokens.

    Raises:
        ModelError: no such layer, or one whose weight is not a plain parameter of its own.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    chosen = fnmatch.filter(linears, pattern)
    if not chosen:
        raise ModelError(
            f"No linear layer is named {pattern!r}{nearest(pattern, linears) or '.'} "
            "Give a name, or a pattern with *, from `malmend inspect`."
        )
    return tuple(_checked_site(model, name, stack_of(model, name)) for name in chosen)


def stack_of(model: PreTrainedModel, name: str) -> Stack:
    """The stack whose blocks hold a layer.

    Raises:
        ModelError: none does.
    """
    stacks = find_stacks(model)
    for stack in stacks:
        if name.startswith(f"{stack.prefix}."):
            return stack
    inside = " or ".join(f"{stack.prefix}.*" for stack in stacks)
    raise ModelError(f"{name} lies outside the blocks {inside}, choose a layer in them.")


def shared_with(model: PreTrainedModel, site: Site) -> str | None:
    """The name of another weight that is the site's own; None where there is none."""
    for name, other in model.named_parameters(remove_duplicate=False):
        if other is site.weight and name != f"{site.name}.weight":
            return name
    return None


def _checked_site(model: PreTrainedModel, name: str, stack: Stack) -> Site:
    site = Site(name, model.get_submodule(name), stack.in_encoder)
    weight = site.weight
    if shared := shared_with(model, site):
        raise ModelError(
            f"{name} shares its weight with {shared}, so that an edit would change both; "
            "choose another layer with --sites."
        )
    if type(weight) is not nn.Parameter:
        raise ModelError(
            f"{name} keeps its weight as {type(weight).__name__} (quantised, or computed before "
            "each pass), expected a plain parameter; load the model unquantised."
        )
    if weight.is_meta:
        raise ModelError(f"{name} is offloaded from its device; load the model whole onto one.")
    if weight.dtype not in PLAIN or weight.ndim != 2:
        raise ModelError(
            f"{name} keeps its weight as {weight.dtype} of shape {tuple(weight.shape)} (quantised?)"
            ", expected a floating-point matrix; load the model unquantised."
        )
    return site
