"""An editor: everything that turns captured pairs into one shift per site, and its settings.

Shape letters: N tokens, K key width, V value width, F = K + V, S sites.

With x = ((u - mean_u) / std_u, (g - mean_g) / std_g) and (a, b) = network(x), the pseudo rows are

    form "published":  u~ = a,                        g~ = eta * b                         (11)
    form "residual":   u~ = (u + std_u * da) / |u|^2,  g~ = eta * (g + std_g * db)          (12)

where (da, db) = (a, b) - x is what the network adds.  There |x| is held below three times the root
of F, the length of a usual token: a network knows nothing of a key that is twenty times as long,
and what it extrapolates to is a shift that breaks the model.  In the residual form an editor whose
network is the identity, or that has none, asks each value to move by exactly -eta * g; the
published form keeps MALMEN's scale, in which eta must be found by orders of magnitude.

The prior of the ridge is P = sum of w_t C_t over the terms t of ``settings.terms``, plus lambda I.
C_text is the mean of k k^T over general text, C_asked over the positions that answer questions
about other subjects: a shift is expensive where either would feel it.  C_wording is the mean of
e e^T over e = (key of a paraphrase) - (key of the edit prompt), times N:

    |S U - D|^2 + N tr(S C_wording S^T)  =  E |S (U + E) - D|^2                             (13)

to the second order, so the shift is fitted to keys as they are *and* as another wording moves them.
How heavy a prior should be depends on how much is edited, so each weight follows a learned power:

    w_t(N) = w_t (n / 2048)^b_t,    b_t = 0 at the start, n = N held between 512 and 4096  (15)

so that outside of what training sees, a single fact above all, the prior stays as it is there.

eta, the weights w_t, lambda and the weight of end-of-answer tokens live in log space, one of each
per site.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from malmend.editors.aggregation import AGGREGATIONS, Aggregation
from malmend.editors.network import EditorNetwork
from malmend.editors.pseudo import Pseudo
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError
from malmend.models.capture import Captured
from malmend.models.sites import Site
from malmend.numerics.chunks import chunks
from malmend.numerics.moments import RunningMoments
from malmend.numerics.prior import Prior
from malmend.processes import ALONE, Processes

TOKENS = 2048  # N at which the weights of the prior are stated; about 500 facts
FEWEST, MOST = 512, 4096  # tokens between which the weights follow N
FARTHEST = 3.0  # times a usual token's distance from the mean is what a network is asked about


@dataclass(eq=False)
class SiteStatistics:
    """What an editor must know of a site: fixed beforehand, never changed by an edit.

    ``priors_KK`` holds C_t by the name of each term of the prior.
    """

    keys: RunningMoments
    value_grads: RunningMoments
    priors_KK: Mapping[str, Tensor] = field(default_factory=dict)


class Editor(nn.Module):
    """Settings, networks by shape, statistics and learned scalars per site.

    Args:
        settings: what the editor is.
        shapes: site name to (V, K), lowest site first.
        statistics: by site name.
        eta, weights, ridge: starting values, the same for every site; one weight per term of the
            prior.  ``ridge`` is lambda as a share of the mean diagonal of w_text C_text, or lambda
            itself where there is no term.
        seed: of the networks.
    """

    def __init__(
        self,
        settings: EditorSettings,
        shapes: Mapping[str, tuple[int, int]],
        statistics: Mapping[str, SiteStatistics],
        eta: float = 1.0,
        weights: Sequence[float] | None = None,
        ridge: float = 0.01,
        seed: int = 0,
    ):
        super().__init__()
        self.settings, self.shapes = settings, dict(shapes)
        self.names = list(shapes)
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            by_shape.setdefault(shape, []).append(name)
        self._index = {name: group.index(name) for group in by_shape.values() for name in group}
        self.networks = nn.ModuleDict(
            {
                f"{value}x{key}": EditorNetwork(value + key, len(group), settings.network, seed)
                for (value, key), group in by_shape.items()
            }
        )
        self.log_eta_S = nn.Parameter(torch.full((len(shapes),), eta).log())
        self.terms = settings.terms
        weights = [1.0] * len(self.terms) if weights is None else list(weights)
        if len(weights) != len(self.terms):
            raise EditorError(
                f"{len(weights)} weights of the prior were given, expected {len(self.terms)} "
                f"({', '.join(self.terms) or 'none'})."
            )
        self.log_weights_SP = nn.Parameter(torch.tensor(weights).log().repeat(len(shapes), 1))
        self.powers_SP = nn.Parameter(torch.zeros(len(shapes), len(self.terms)))
        self.log_ridge_S = nn.Parameter(torch.empty(len(shapes)))
        self.log_end_weight_S = nn.Parameter(torch.full((len(shapes),), settings.end_weight).log())
        for index, name in enumerate(self.names):
            self._keep_statistics(index, statistics[name], weights, ridge)

    def _keep_statistics(
        self, index: int, known: SiteStatistics, weights: Sequence[float], ridge: float
    ) -> None:
        if self.terms:
            text_KK = known.priors_KK[self.terms[0]]
            ridge *= weights[0] * text_KK.diagonal().mean().item()
        with torch.no_grad():
            self.log_ridge_S[index] = torch.tensor(ridge).log()
        values = {
            "key_mean": known.keys.mean_F,
            "key_std": known.keys.std(),
            "grad_mean": known.value_grads.mean_F,
            "grad_std": known.value_grads.std(),
        }
        for part, tensor in values.items():
            if not self.settings.network.normalise:
                tensor = torch.full_like(tensor, float(part.endswith("std")))
            self.register_buffer(f"{part}_{index}", tensor.float())
        for term in self.terms:
            self.register_buffer(f"prior_{term}_{index}", known.priors_KK[term].float())

    @property
    def device(self) -> torch.device:
        """Where its networks run and its least squares are solved; rows come from the CPU."""
        return self.log_eta_S.device

    def on(self, device: torch.device) -> Editor:
        """Itself, moved; but for the matrices of the prior, which go over one at a time."""
        matrices = {name: one for name, one in self._buffers.items() if name.startswith("prior_")}
        self._buffers.update(dict.fromkeys(matrices))  # large, and None is not moved
        self.to(device)
        self._buffers.update(matrices)
        return self

    def prior(self, site: int, tokens: int) -> Prior:
        """P of one site as numbers, for an edit of so many tokens (N of equations 13 and 15)."""
        size = log_size(tokens)
        weights = (self.log_weights_SP[site] + self.powers_SP[site] * size).exp().tolist()
        return Prior(
            ridge=self.log_ridge_S[site].exp().item(),
            weights=by_tokens(weights, self.terms, tokens),
            matrices_KK=tuple(getattr(self, f"prior_{term}_{site}") for term in self.terms),
            device=self.device,
        )

    def row_weights(self, site: int, pair: Captured) -> Tensor | None:
        """w_j of equation (14): one, but the learned weight where an end of answer is output.

        Numbers, as :meth:`prior`; :meth:`backward` has their derivatives.
        """
        if pair.ends_N is None:
            return None
        end_weight = self.log_end_weight_S[site].detach().cpu().double().exp()
        return torch.where(pair.ends_N, end_weight, torch.ones_like(end_weight))

    def pseudo(self, site: int, pair: Captured) -> Pseudo:
        """Equation (11) or (12) for a chunk of one site's tokens; differentiable."""
        keys_NK, grads_NV = pair.keys_NK.to(self.device), pair.value_grads_NV.to(self.device)
        value_width, key_width = self.shapes[self.names[site]]
        eta = self.log_eta_S[site].exp().to(keys_NK.dtype)
        residual = self.settings.form == "residual"
        gain_N1 = keys_NK.square().sum(1, keepdim=True).clamp(min=torch.finfo(keys_NK.dtype).tiny)
        if residual and self.settings.network.blocks == 0:
            return Pseudo(keys_NK / gain_N1, eta * grads_NV)

        def statistic(part: str) -> Tensor:
            return getattr(self, f"{part}_{site}").to(keys_NK.dtype)

        x_NF = torch.cat(
            [
                (keys_NK - statistic("key_mean")) / statistic("key_std"),
                (grads_NV - statistic("grad_mean")) / statistic("grad_std"),
            ],
            dim=1,
        )
        if residual:
            rms_N1 = x_NF.square().mean(1, keepdim=True).sqrt()
            x_NF = x_NF * (FARTHEST / rms_N1.clamp(min=FARTHEST))
        network = self.networks[f"{value_width}x{key_width}"]
        out_NF = network(x_NF, self._index[self.names[site]])
        if not residual:
            return Pseudo(out_NF[:, :key_width], eta * out_NF[:, key_width:])
        added_NF = out_NF - x_NF
        added_keys = statistic("key_std") * added_NF[:, :key_width]
        added_grads = statistic("grad_std") * added_NF[:, key_width:]
        return Pseudo((keys_NK + added_keys) / gain_N1, eta * (grads_NV + added_grads))

    @torch.no_grad()
    def aggregate(
        self, captured: Sequence[Captured], chunk: int = 1024, processes: Processes = ALONE
    ) -> list[Aggregation]:
        """Runs the network over all tokens, chunk by chunk, keeping no graph.

        Of ``processes`` each gives its own tokens, and the shift is of all.
        """
        if len(captured) != len(self.names):
            raise EditorError(
                f"{len(captured)} sites were captured, expected {len(self.names)}: "
                f"{', '.join(self.names)}."
            )
        counts = processes.total(*[len(pair.keys_NK) for pair in captured])
        done = []
        for site, pair in enumerate(captured):
            aggregation = AGGREGATIONS[self.settings.method](
                pair.keys_NK,
                pair.room.empty(*pair.value_grads_NV.shape, dtype=pair.keys_NK.dtype),
                self.prior(site, int(counts[site])),
                self.row_weights(site, pair),
                processes.summed if processes.count > 1 else None,
            )
            for rows in chunks(len(pair.keys_NK), chunk):
                aggregation.add(rows, self.pseudo(site, pair.rows(rows)))
            done.append(aggregation)
        return done

    def shifts(self, captured: Sequence[Captured], chunk: int = 1024) -> dict[str, Tensor]:
        """One shift V x K in float64 per site."""
        found = self.aggregate(captured, chunk)
        return {name: one.shift() for name, one in zip(self.names, found, strict=True)}

    def backward(
        self,
        captured: Sequence[Captured],
        aggregations: Sequence[Aggregation],
        shift_grads: Mapping[str, Tensor],
        chunk: int = 1024,
        processes: Processes = ALONE,
    ) -> None:
        """Adds the meta-gradient to every parameter's ``grad`` (Algorithm 2, second stage).

        ``shift_grads`` holds G = dL/dS per site.  Only one chunk's graph lives at a time.  Of
        ``processes`` each adds its part: that of its own tokens, and of what depends on all tokens
        (the prior) an even share.
        """
        counts = processes.total(*[len(pair.keys_NK) for pair in captured])
        for site, (name, pair) in enumerate(zip(self.names, captured, strict=True)):
            whole, by_weight_N = aggregations[site].receive(shift_grads[name])
            prior_grads = whole.shared(processes.count)
            prior = self.prior(site, int(counts[site]))
            if by_weight_N is not None and pair.ends_N is not None:
                weight = self.log_end_weight_S[site].exp().item()
                by_end = by_weight_N[pair.ends_N].sum().item() * weight
                _add_grad(self.log_end_weight_S, (site,), by_end)
            # dL/dlog w = w dL/dw, whatever N stands in the weight.
            size = log_size(int(counts[site]))
            for term, (by, weight) in enumerate(
                zip(prior_grads.weights, prior.weights, strict=True)
            ):
                _add_grad(self.log_weights_SP, (site, term), by * weight)
                _add_grad(self.powers_SP, (site, term), by * weight * size)
            _add_grad(self.log_ridge_S, (site,), prior_grads.ridge * prior.ridge)
            for rows in chunks(len(pair.keys_NK), chunk):
                pseudo = self.pseudo(site, pair.rows(rows))
                aggregations[site].proxy(rows, pseudo).backward()

    def checksum(self) -> int:
        """48 bits of a SHA-256 over every number that it has, which a float holds exactly."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return int.from_bytes(whole.digest()[:6])

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises EditorError unless these are the sites the editor was made for."""
        found = {site.name: tuple(site.shape_VK) for site in sites}
        wanted = {name: tuple(shape) for name, shape in self.shapes.items()}
        if list(found.items()) != list(wanted.items()):  # pairs come in the order of the sites
            raise EditorError(
                f"The editor was made for the layers {_listed(wanted)}, this model offers "
                f"{_listed(found)}; train or calibrate an editor for this model."
            )


def by_tokens(weights: Sequence[float], terms: Sequence[str], tokens: int) -> tuple[float, ...]:
    """The weights of a prior's terms; the wording's is taken N times, as in equation (13)."""
    pairs = zip(weights, terms, strict=True)
    return tuple(weight * (tokens if term == "wording" else 1) for weight, term in pairs)


def log_size(tokens: int) -> float:
    """log(n / 2048) of equation (15)."""
    return math.log(min(max(tokens, FEWEST), MOST) / TOKENS)


def _add_grad(parameter: nn.Parameter, index: tuple[int, ...], value: float) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[index] += value


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {value}x{key}" for name, (value, key) in shapes.items())
