"""The decoupled meta-gradient as training takes it, and autograd through the whole edit.

The second shares no code with the pipeline: it writes the network out, solves the primal normal
equations by LU, and asks ``logs`` for the log-probabilities of one question at a time, with given
weights in place of the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from support import TERMS
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from malmend.editors.editor import Editor
from malmend.editors.metaloss import Judged, meta_loss
from malmend.facts.encoded import Encoded
from malmend.models.capture import Captured, capture
from malmend.models.trunk import Trunk
from malmend.patch import shifted

LOCALITY = 0.7
BATCHINGS = [(1, 1), (30, 3), (4096, 4096)]  # trunk positions, network tokens at once
Asked = Sequence[tuple[Encoded, Encoded]]  # an equivalent and an unrelated question of each fact


def decoupled(
    editor: Editor, trunk: Trunk, edits: Sequence[Encoded], asked: Asked, chunk: int
) -> tuple[float, dict[str, Tensor | None]]:
    """L_meta and its gradients as training takes them."""
    captured = capture(trunk, edits, editor.settings.tokens, editor.settings.descent)
    states = trunk.unedited_states([unrelated for _, unrelated in asked])
    judged = [Judged(*pair, known) for pair, known in zip(asked, states, strict=True)]
    for parameter in editor.parameters():
        parameter.grad = None
    aggregations = editor.aggregate(captured, chunk)
    shifts = {name: one.shift() for name, one in zip(editor.names, aggregations, strict=True)}
    with shifted(list(trunk.sites), shifts):
        loss = meta_loss(trunk, judged, LOCALITY)
    editor.backward(captured, aggregations, loss.shift_grads, chunk)
    return loss.total, {name: p.grad for name, p in editor.named_parameters()}


def through_the_edit(
    model: PreTrainedModel,
    editor: Editor,
    pairs: Sequence[Captured],
    asked: Asked,
    logs: Callable[[dict[str, Tensor], Encoded], Tensor],
) -> tuple[float, dict[str, Tensor]]:
    """L_meta and its gradients by autograd, with the edit inside the graph."""
    weights = {}
    for index, (name, pair) in enumerate(zip(editor.names, pairs, strict=True)):
        module = model.get_submodule(name)
        shift_VK = _shift(editor, index, pair)
        shift = shift_VK.T if isinstance(module, Conv1D) else shift_VK
        weights[f"{name}.weight"] = module.weight + shift
    loss = torch.zeros((), dtype=torch.float64)
    for equivalent, unrelated in asked:
        loss = loss - logs(weights, equivalent)[picked(equivalent)].sum() / len(asked)
        before, after = (logs(w, unrelated) for w in ({}, weights))
        kl = torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum")
        loss = loss + LOCALITY * kl / len(asked)
    names, parameters = zip(*editor.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    filled = [
        torch.zeros_like(p) if grad is None else grad
        for p, grad in zip(parameters, grads, strict=True)
    ]
    return loss.item(), dict(zip(names, filled, strict=True))


def picked(asked: Encoded) -> tuple[Tensor, Tensor]:
    """Row and column of each label in the log-probabilities."""
    labels = torch.tensor(asked.ids[asked.answer_start :])
    return torch.arange(len(labels)), labels


def compare(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, reference in wanted.items():
        got = torch.zeros_like(reference) if found[name] is None else found[name]
        assert (got - reference).norm() <= 1e-8 * reference.norm(), name


def _shift(editor: Editor, index: int, pair: Captured) -> Tensor:
    settings, name = editor.settings, editor.names[index]
    u, g = pair.keys_NK, pair.value_grads_NV
    buffers = dict(editor.named_buffers())
    mean_u, std_u = buffers[f"key_mean_{index}"], buffers[f"key_std_{index}"]
    mean_g, std_g = buffers[f"grad_mean_{index}"], buffers[f"grad_std_{index}"]
    x = torch.cat([(u - mean_u) / std_u, (g - mean_g) / std_g], 1)
    if settings.form == "residual":  # no farther than three usual tokens
        x = x / (x.norm(dim=1, keepdim=True) / (3 * x.shape[1] ** 0.5)).clamp(min=1)
    alike = [other for other in editor.names if editor.shapes[other] == editor.shapes[name]]
    value_width, key_width = editor.shapes[name]
    y = _network(editor, f"networks.{value_width}x{key_width}", alike.index(name), x)
    a, b = y[:, :key_width], y[:, key_width:]
    eta = editor.log_eta_S[index].exp()
    if settings.form == "published":
        key, grad = a, eta * b
    else:
        key = (u + std_u * (a - x[:, :key_width])) / (u * u).sum(1)[:, None]
        grad = eta * (g + std_g * (b - x[:, key_width:]))
    if settings.method == "mend":
        return -sum(torch.outer(g_j, u_j) for g_j, u_j in zip(grad, key, strict=True))
    diffs = torch.stack([-(k @ u_j) * g_j for k, u_j, g_j in zip(key, u, grad, strict=True)])
    prior = editor.log_ridge_S[index].exp() * torch.eye(key_width, dtype=torch.float64)
    for place, term in enumerate(TERMS[settings.prior]):
        # Equation (13): the wording's spread counts once for each token of the edit.
        times = len(u) if term == "wording" else 1
        # Equation (15): the weight follows a learned power of the edit's size, from 512 tokens on.
        weight = editor.log_weights_SP[index, place].exp()
        weight = weight * (512 / 2048) ** editor.powers_SP[index, place]
        prior = prior + times * weight * buffers[f"prior_{term}_{index}"]
    # Equation (14): one diagonal of weights, the end tokens' alike and learned.
    weights = torch.ones(len(u), dtype=torch.float64)
    if pair.ends_N is not None:
        weights = torch.where(pair.ends_N, editor.log_end_weight_S[index].exp(), weights)
    weighted = weights.diag() @ u
    return torch.linalg.solve(u.T @ weighted + prior, weighted.T @ diffs).T


def _network(editor: Editor, prefix: str, site: int, x: Tensor) -> Tensor:
    known = dict(editor.named_parameters())
    for block in range(editor.settings.network.blocks):
        start = f"{prefix}.blocks.{block}"
        down, up, bias = (known[f"{start}.{part}"] for part in ("down_RF", "up_FR", "bias_F"))
        scale, offset = known[f"{start}.scale_SF"][site], known[f"{start}.offset_SF"][site]
        low = torch.einsum("fr,re,ne->nf", up, down, x) + bias
        if editor.settings.network.placement == "before":
            x = x + _sigma(scale * low + offset)
        else:
            x = x + scale * _sigma(low) + offset
    return x


def _sigma(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, torch.zeros_like(x))
