"""The tokens that output the answers, run behind prompts whose keys and values are kept.

What a descent adds to a layer's output at the tokens that output the answer reaches no earlier
position of a decoder.  So what stands before them is run once, without gradients, into the model's
own cache of keys and values, and every step runs a few tokens.  :func:`splits` tries whether a
model can be run so; one whose cache holds something else, as a recurrent one's, is run whole.

Shape letters: B questions, T positions, P positions of the longest prefix, S tokens of the longest
suffix, F stored width, A answer tokens, W vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from malmend.facts.encoded import Encoded, TokenBatch, collate
from malmend.models.cut import Cut
from malmend.models.forms import Unrun, at_places, output_reads, tried, without_cudnn


class Suffix:
    """The suffixes of a micro-batch: of each question the tokens that output its answer.

    The model's weights must stay as they are between the prefix, which is run here, and the rest.

    Args:
        cut: of a decoder.
        tokens: of whole questions, each with a token before the first that outputs its answer.
        stored_BTF: their trunk activations.

    Attributes:
        kept: P, or that of a batch which this one was part of.
        width: S.
        flat_A: indices of the sources in the flattened B x S positions.
    """

    def __init__(self, cut: Cut, tokens: TokenBatch, stored_BTF: Tensor):
        self._cut, self._stored_BTF = cut, stored_BTF
        first_B = torch.tensor([one.sources[0] for one in tokens.questions])
        # Padded on the left, so that distances are what they are in the whole question.
        self.kept = int(first_B.max())
        at_BP = first_B[:, None] - self.kept + torch.arange(self.kept)
        at_BP, is_there_BP = at_BP.clamp(min=0), at_BP >= 0
        hardly = torch.zeros(1, dtype=torch.long)  # only keys and values are read
        with torch.no_grad(), cut.heading(self._stored_at(at_BP)), cut.ending_at(hardly):
            ids_BP = tokens.ids_BT.gather(1, at_BP)
            self._cache = _run(cut, ids_BP, is_there_BP, at_BP, lambda states: states[:0, :0])[1]
        self._lay_out(tokens)

    def _lay_out(self, tokens: TokenBatch) -> None:
        first_B1 = torch.tensor([[one.sources[0]] for one in tokens.questions])
        count_B1 = torch.tensor(tokens.sources)[:, None]
        self.width = int(count_B1.max())
        along_S = torch.arange(self.width)
        is_there_BS = along_S < count_B1
        self.flat_A = is_there_BS.flatten().nonzero().squeeze(1)
        # A row that ends sooner goes on with its last token, which nothing reads.
        self._at_BS = first_B1 + along_S.minimum(count_B1 - 1)
        is_before_BP = torch.arange(self.kept) >= self.kept - first_B1
        self._mask = torch.cat([is_before_BP, is_there_BS], dim=1)
        self._ids_BS = tokens.ids_BT.gather(1, self._at_BS)
        self._stored_BSF = self._stored_at(self._at_BS)

    def _stored_at(self, at: Tensor) -> Tensor:
        """The trunk's activations at these positions of each question."""
        index = at.to(self._stored_BTF.device)[..., None].expand(-1, -1, self._stored_BTF.shape[-1])
        return self._stored_BTF.gather(1, index)

    def logits(self) -> Tensor:
        """At the answer tokens, A x W, as :meth:`Trunk.logits`; gradients reach the suffixes."""
        cache = _copied(self._cache)
        _fill(cache.layers)
        with self._cut.heading(self._stored_BSF):
            inputs = (self._ids_BS, self._mask, self._at_BS)
            chosen = partial(at_places, flat_A=self.flat_A)
            logits_1AW = _run(self._cut, *inputs, chosen, cache)[0]
        return logits_1AW.squeeze(0)

    def subset(self, rows: Sequence[int], tokens: TokenBatch) -> Suffix:
        """Some of the questions, whose tokens these are."""
        other = copy.copy(self)
        other._cache = _copied(self._cache)
        chosen = torch.tensor(rows, device=self._stored_BTF.device)
        for layer in other._cache.layers:
            if layer.is_initialized:
                layer.batch_select_indices(chosen.to(layer.keys.device))
        other._stored_BTF = self._stored_BTF[chosen]
        other._lay_out(tokens)
        return other


def splits(cut: Cut) -> bool:
    """Whether suffixes behind a kept prefix say what whole questions do, on a trial batch."""
    if cut.form != "causal":
        return False
    trial = collate([Encoded((0, 1, 2, 1, 2), 3, 5), Encoded((2, 1, 0), 2, 3)])
    with torch.no_grad():
        stored = nn.utils.rnn.pad_sequence(cut.activations(trial), batch_first=True)
        stored = stored.to(cut.model.device)
        whole = cut.head(trial, stored, lambda states_AH: states_AH)
        try:
            with tried():
                suffix = Suffix(cut, trial, stored)
                found = [suffix.logits(), suffix.subset([1], collate(trial.questions[1:])).logits()]
        except Unrun:
            return False  # the cache is of another kind, or made otherwise by this transformers
    return cut.agree(found[0], whole) and cut.agree(found[1], whole[2:])


def _run(
    cut: Cut,
    ids: Tensor,
    mask: Tensor,
    at: Tensor,
    choose: Callable[[Tensor], Tensor],
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """Logits of what ``choose`` picks, and the cache."""
    model, device = cut.model, cut.model.device
    takes = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # by the version of transformers
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    if cache is not None:
        inputs[name] = cache
    if "position_ids" in takes:
        inputs["position_ids"] = at.to(device)
    with output_reads(model, choose), without_cudnn():
        out = model(**inputs, use_cache=True)
    return out.logits, out[name]


def _copied(cache: Any) -> Any:
    """A cache of its own with the same tensors, which a layer replaces where it grows."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _fill(layers: list[Any]) -> None:
    """Gives layers that were not run what stands in another: the first one says the length."""
    ran = [layer for layer in layers if layer.is_initialized]
    for index, layer in enumerate(layers):
        if not layer.is_initialized:
            alike = [other for other in ran if type(other) is type(layer)]
            layers[index] = copy.copy((alike or ran)[0])
