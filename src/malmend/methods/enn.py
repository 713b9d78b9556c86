"""Editable Neural Networks (ENN; Sinitsin et al. 2020, as in MEND, appendix B.1, equation 5).

The weights W of the edited layers are trained beforehand, so that a few gradient steps on an edit
succeed and disturb little:

    minimise over W, r   L_base(W) + c_edit L_edit(W_k) + c_loc L_loc(W, W_k)

    W_0 = W,   W_(j+1) = W_j - r grad L(W_j),   r = exp(learned) of each layer
    L       mean over the facts edited together of -log p(answer | prompt)
    L_edit  the same on a paraphrase (the prompt itself where there is none)
    L_loc   mean over unrelated questions, one per fact, of KL(W || W_k), summed over answer tokens
    L_base  KL(original || W) on the same questions

No graph spans the steps.  With G_k = dL/dW_k of the last two terms, H_j the second derivatives of L
at W_j,

    G_j = G_(j+1) - H_j (r G_(j+1)),   dL/dlog r = - sum over j of r <G_(j+1), grad L(W_j)>

and dL/dW is G_0 and what L_base and L_loc give at W itself.  H_j times a matrix is summed over
micro-batches, so no result depends on those, and only one micro-batch's graph is in memory, beside
about 2 k + 12 copies of the edited weights, however much is edited.

Deviations: the published L_base is the loss on the model's own training text, which is not at
hand.  Edited are the layers that FT tunes: both of a feed-forward block, of a gated one not the
gate.  The gradient is clipped.  A patch holds trained - original + edit.

Shape letters: A answer tokens, H hidden width, V value width, K key width, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from malmend.editors.checkpoint import check_trained_for
from malmend.editors.folder import read_folder, settings_from, whole
from malmend.errors import EditorError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.given import check_fields, check_range, check_seed
from malmend.methods.method import Found
from malmend.models.sites import Site, feed_forward_sites, put_back
from malmend.models.trunk import Trunk
from malmend.numerics.losses import answer_nll
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

COUNTS = ("layers", "inner_steps", "steps", "facts_per_step", "save_every")

Weights = Sequence[Tensor]  # one per site, as its layer stores it


@dataclass(frozen=True)
class EnnSettings:
    """How the base is trained, and edited afterwards.

    Attributes:
        layers: the feed-forward layers of this many last blocks.
        inner_steps: k, the gradient steps of an edit.
        inner_rate: where every r starts.
        c_edit: weight of L_edit.
        c_loc: weight of L_loc.
        rate: Adam's learning rate for the weights.
        scalar_rate: Adam's learning rate for log r.
        clip: largest norm of the gradient.
        steps: of Adam.
        facts_per_step: facts edited together in each; published is one.
        seed: of the order of the facts and the questions drawn.
        save_every: steps between checkpoints, for whoever runs the training.
        end_of_answer: what is trained after an answer, "eos", "newline" or "none".
    """

    layers: int = 3
    inner_steps: int = 3
    inner_rate: float = 3e-3
    c_edit: float = 0.1
    c_loc: float = 1.0
    rate: float = 1e-5
    scalar_rate: float = 0.03
    clip: float = 1.0
    steps: int = 2000
    facts_per_step: int = 1
    seed: int = 0
    save_every: int = 100
    end_of_answer: EndOfAnswer = "eos"

    def __post_init__(self) -> None:
        check_fields(self)
        check_range(self, COUNTS, 1, prefix="enn.")
        check_range(self, ("inner_rate", "clip"), prefix="enn.")
        check_range(self, ("c_edit", "c_loc", "rate", "scalar_rate"), 0.0, prefix="enn.")
        check_seed(self, "enn.")

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """As :func:`malmend.models.sites.feed_forward_sites`."""
        return feed_forward_sites(model, self.layers)


@dataclass(frozen=True)
class Enn:
    """Edits on a base that ``enn_training.EnnTrainer`` has trained and saved in ``folder``."""

    folder: str

    @property
    def name(self) -> Literal["enn"]:
        """As tables and patches call it."""
        return "enn"

    @property
    def end_of_answer(self) -> EndOfAnswer:
        """As the base was trained."""
        return self._loaded[1].end_of_answer

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """As :meth:`EnnSettings.sites_in`."""
        return self._loaded[1].sites_in(model)

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """The trained base, and from there the inner steps on all facts at once.

        Raises:
            EditorError: the folder is damaged, or was trained for another base or other layers.
        """
        (about, settings, tensors), trunk = self._loaded, bench.trunk
        check_trained_for(bench.loaded, self.folder, about["base"])
        if shapes_of(trunk) != about["sites"]:
            raise EditorError(
                f"The editor {self.folder} is for other layers than the model is cut at; cut it at "
                "those of its sites_in."
            )
        before, sites = copies(trunk), trunk.sites
        pairs = zip(sites, before, strict=True)
        start = [one + site.oriented(tensors[site.name].to(one)) for site, one in pairs]
        rates_S = tensors["log_rates"].to(start[0]).exp()
        prompts = bench.encoder.encode_all(fact.question for fact in facts)
        count = counting(progress, "inner steps", settings.inner_steps)
        path, _, losses = descended(trunk, start, rates_S, prompts, settings.inner_steps, count)
        ends = zip(sites, path[-1], before, strict=True)
        shifts = {s.name: s.oriented(last - one).cpu().double() for s, last, one in ends}
        said = {
            "settings": asdict(settings),
            "editor": self.folder,
            "editor_id": about["identity"],
            "inner_rates": rates_S.tolist(),
            "losses": losses,
        }
        return Found(shifts, max(min(site.shape_VK) for site in sites), said)

    @cached_property
    def _loaded(self) -> tuple[dict[str, Any], EnnSettings, dict[str, Tensor]]:
        return _read(self.folder)


def _read(folder: str) -> tuple[dict[str, Any], EnnSettings, dict[str, Tensor]]:
    """Of what ``EnnTrainer.save`` wrote what it says, the settings, shifts and log rates."""
    with whole(f"The editor in {folder}", "train it again"):
        about, tensors, identity = read_folder(Path(folder), partial(_check_method, folder))
        sites = about["sites"]
        checked(tensors, {**sites, "log_rates": [len(sites)]})
        if not isinstance(about["base"], str):
            raise ValueError("its base is no digest")
        return (
            {**about, "identity": identity},
            settings_from(EnnSettings, about["settings"]),
            tensors,
        )


def _check_method(folder: str, about: Mapping[str, Any]) -> None:
    if about.get("method") != "enn":
        raise EditorError(f"The editor in {folder} is none of ENN; give one that is.")


def checked(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    """Raises ValueError unless the tensors are these, and finite."""
    if {name: [*one.shape] for name, one in tensors.items()} != shapes:
        raise ValueError("its tensors have other names or shapes than it says")
    if not all(one.isfinite().all() for one in tensors.values()):
        raise ValueError("a tensor holds NaN or infinity")


def shapes_of(trunk: Trunk) -> dict[str, list[int]]:
    """(V, K) by site."""
    return {site.name: list(site.shape_VK) for site in trunk.sites}


def copies(trunk: Trunk) -> list[Tensor]:
    """Copies of the edited weights, wide, all where the model's input is given."""
    device = trunk.model.device
    return [site.weight.detach().to(device, trunk.wide, copy=True) for site in trunk.sites]


@contextmanager
def held(sites: Sequence[Site], weights: Weights) -> Iterator[None]:
    """Layers that multiply by these tensors, which a graph may hold; the parameters afterwards.

    Attention in the one implementation of torch that can be differentiated twice.
    """
    kept = [site.weight for site in sites]

    def back() -> None:
        for site, own in zip(sites, kept, strict=True):
            site.module._parameters["weight"] = own

    with put_back(back):
        for site, weight, own in zip(sites, weights, kept, strict=True):
            site.module._parameters["weight"] = weight.to(own)  # type: ignore[assignment]
        with sdpa_kernel(SDPBackend.MATH):
            yield


def descended(
    trunk: Trunk,
    start: Weights,
    rates_S: Tensor,
    prompts: Sequence[Encoded],
    steps: int,
    count: Callable[[int], None] = lambda more: None,
) -> tuple[list[Weights], list[Weights], list[float]]:
    """W_0 to W_k, and at all but the last the gradient of L, and L."""
    path: list[Weights] = [[one.detach() for one in start]]
    slopes, losses = list[Weights](), list[float]()
    for _ in range(steps):
        loss, slope = slope_at(trunk, path[-1], prompts)
        moved = zip(path[-1], rates_S, slope, strict=True)
        path.append([one - rate * grad for one, rate, grad in moved])
        slopes, losses = [*slopes, slope], [*losses, loss]
        count(1)
    return path, slopes, losses


@torch.enable_grad()
def slope_at(
    trunk: Trunk, weights: Weights, questions: Sequence[Encoded], along: Weights = ()
) -> tuple[float, Weights]:
    """Mean loss of the answers with these weights, and its gradient there.

    With ``along``, in place of the gradient that of <gradient, along>: H along.
    """
    leaves = [one.detach().requires_grad_() for one in weights]
    totals, loss = [torch.zeros_like(one) for one in leaves], 0.0
    for _, batch in trunk.batches(questions):  # what lies below is run with the parameters
        labels_A = batch.tokens.labels_A.to(trunk.model.device)
        with held(trunk.sites, leaves):
            part = answer_nll(trunk.logits(batch), labels_A).sum() / len(questions)
        grads = torch.autograd.grad(part, leaves, create_graph=bool(along))
        if along:
            grads = torch.autograd.grad(products(grads, along).sum(), leaves)
        totals = [total + grad for total, grad in zip(totals, grads, strict=True)]
        loss += part.item()
    return loss, totals


def products(left: Weights, right: Weights) -> Tensor:
    """<left, right> of each site."""
    return torch.stack([(one * other).sum() for one, other in zip(left, right, strict=True)])
