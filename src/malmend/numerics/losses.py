"""The losses of editing and of meta-training, per token, always in float32 or wider.

Shape letters: A answer tokens, W vocabulary (words).

    edit and generality   L(a) = -log p(answer token a)                      (MALMEN, eq. 1)
    locality              L(a) = KL(p_before(. | a) || p_after(. | a))        (MALMEN, eq. 1)

Both come unreduced: whoever calls decides between a sum over facts (the edit) and a weighted mean
(training), so that no result depends on how tokens were grouped into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from malmend.numerics.chunks import chunks

IN_CACHE = 1 << 19  # logits


def answer_nll(logits_AW: Tensor, labels_A: Tensor) -> Tensor:
    """Negative log-likelihood of each answer token, shape A, in nats."""
    return functional.cross_entropy(_wide(logits_AW), labels_A, reduction="none")


def kl_per_token(before_AW: Tensor, after_AW: Tensor) -> Tensor:
    """KL(before || after) at each answer token, shape A, in nats; gradients reach ``after``."""
    before_log_AW = functional.log_softmax(_wide(before_AW), dim=-1)
    after_log_AW = functional.log_softmax(_wide(after_AW), dim=-1)
    # Rounding may leave a nearly-zero divergence just below zero; the gradient is kept.
    return (before_log_AW.exp() * (before_log_AW - after_log_AW)).sum(-1)


def nll_and_grad(logits_AW: Tensor, labels_A: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`answer_nll`, shape A, and its derivative by the logits, A x W: softmax less one-hot.

    One matrix of the logits' size is made and no graph, of which autograd would keep several.
    """
    grad_AW, losses = torch.empty_like(logits_AW, dtype=_wide_dtype(logits_AW)), []
    for rows in _few(logits_AW):
        log_AW = functional.log_softmax(_wide(logits_AW.detach()[rows]), dim=-1)
        asked_A1 = (labels_A[rows] >= 0).unsqueeze(1)  # a token without a label costs nothing
        chosen_A1 = labels_A[rows].clamp(min=0).unsqueeze(1)
        nll_A1 = -log_AW.gather(1, chosen_A1) * asked_A1
        less_one_AW = log_AW.exp_().scatter_add_(1, chosen_A1, torch.full_like(nll_A1, -1))
        torch.mul(less_one_AW, asked_A1, out=grad_AW[rows])
        losses.append(nll_A1.squeeze(1))
    return torch.cat(losses), grad_AW


def kl_and_grad(before_AW: Tensor, after_AW: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`kl_per_token`, shape A, and its derivative by ``after``: the softmaxes' difference."""
    grad_AW, losses = torch.empty_like(after_AW, dtype=_wide_dtype(after_AW)), []
    for rows in _few(after_AW):
        before_log_AW = functional.log_softmax(_wide(before_AW.detach()[rows]), dim=-1)
        after_log_AW = functional.log_softmax(_wide(after_AW.detach()[rows]), dim=-1)
        before_p_AW = before_log_AW.exp()
        losses.append(before_log_AW.sub_(after_log_AW).mul_(before_p_AW).sum(-1))
        torch.sub(after_log_AW.exp_(), before_p_AW, out=grad_AW[rows])
    return torch.cat(losses), grad_AW


def _few(logits_AW: Tensor) -> Iterator[slice]:
    """Rows that stay in a processor's cache from one pass over them to the next; elsewhere all."""
    here = logits_AW.device.type == "cpu"
    size = IN_CACHE // logits_AW.shape[1] if here else len(logits_AW)
    return chunks(len(logits_AW), max(1, size))


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(_wide_dtype(logits))
