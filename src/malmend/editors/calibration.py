"""What an editor must know of a model before its first edit, found once and kept.

Per site: mean and spread of keys and value gradients over calibration facts, and C, the mean of
k k^T over the tokens of general text (all but each line's first token: it is an attention sink and
holds 99% of the trace).  Then starting values of eta and alpha, by a search that edits calibration
facts and takes the pair with the least meta-loss on their paraphrases and on unrelated questions:
for one fact in eight its own (a near one: the same relation of another subject), for the others the
end of a line of the text (a far one).

Everything is fixed from then on, so that what is asked of a token depends on its fact alone.

Shape letters: K key width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from malmend.editors.editor import Editor, EditorSettings, SiteStatistics
from malmend.editors.metaloss import Judged, meta_loss
from malmend.errors import MalmendError
from malmend.facts.fact import Fact
from malmend.facts.tokens import Encoded, Encoder
from malmend.files import written_beside
from malmend.models.capture import Captured, capture, tracing
from malmend.models.trunk import Trunk
from malmend.numerics.moments import RunningMoments
from malmend.patch import shifted

FORMAT = 4


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is calibrated.

    Attributes:
        moment_facts: facts whose keys and value gradients are averaged.
        search_facts: facts edited at once while eta and alpha are searched.
        text_tokens: tokens of general text that C is averaged over.
        etas: candidates; for the published form they span orders of magnitude.
        alphas: candidates; more than 30 looks better to a search with few facts, and then costs
            edit success at a thousand.
        published_etas: candidates of the published form.
        sum_etas: candidates where shifts are summed, which adds up what the facts share.
        unrelated_tokens: tokens at a line's end that count as an unrelated answer.
        ridge: lambda as a share of alpha times the mean of C's diagonal.
        locality: weight of the KL in the meta-loss that the search minimises.
    """

    moment_facts: int = 256
    search_facts: int = 192
    text_tokens: int = 16_000
    etas: tuple[float, ...] = (0.8, 1.0, 1.15, 1.3, 1.5)
    published_etas: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    sum_etas: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
    alphas: tuple[float, ...] = (10.0, 30.0)
    unrelated_tokens: int = 5
    ridge: float = 0.01
    locality: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """The result: statistics by site name, starting values, and every pair that was tried."""

    statistics: dict[str, SiteStatistics]
    eta: float
    alpha: float
    ridge: float
    tried: tuple[dict[str, float], ...] = ()

    def editor(self, settings: EditorSettings, trunk: Trunk, seed: int = 0) -> Editor:
        """An untrained editor that starts from these values."""
        shapes = {site.name: site.shape_VK for site in trunk.sites}
        return Editor(settings, shapes, self.statistics, self.eta, self.alpha, self.ridge, seed)


def calibrate(
    trunk: Trunk,
    encoder: Encoder,
    editor_settings: EditorSettings,
    facts: Sequence[Fact],
    text: str,
    settings: CalibrationSettings = CalibrationSettings(),
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> Calibration:
    """Finds a model's statistics and starting values.

    Args:
        trunk: the model cut at the sites to be edited.
        encoder: as the edits will be encoded.
        editor_settings: what the editor is; its network's size does not matter here.
        facts: with paraphrases.
        text: general text, one passage per line.
        settings: sizes and candidates.
        progress: called with the stage's name and the share of it that is done.
    """
    usable = [fact for fact in facts if fact.paraphrases]
    if not usable:
        raise MalmendError(
            "No calibration fact has a paraphrase, which the search for eta and alpha needs; "
            "add paraphrases, or leave --calibrate out."
        )
    passages = _passages(encoder, text)
    covariances: list[Tensor | None] = [None] * len(trunk.sites)
    has_covariance = editor_settings.method == "malmen" and editor_settings.prior == "text"
    if has_covariance:
        covariances = [*covariance(trunk, passages, settings.text_tokens, progress)]
    moment_facts = usable[: settings.moment_facts]
    captured = capture(
        trunk,
        encoder.encode_all(fact.question for fact in moment_facts),
        editor_settings.tokens,
        editor_settings.descent,
        _counted(progress, "value gradients of calibration facts", len(moment_facts)),
    )
    statistics = {}
    for site, pair, covariance_KK in zip(trunk.sites, captured, covariances, strict=True):
        value_width, key_width = site.shape_VK
        known = SiteStatistics(
            RunningMoments(key_width), RunningMoments(value_width), covariance_KK
        )
        known.keys.add(pair.keys_NK)
        known.value_grads.add(pair.value_grads_NV)
        statistics[site.name] = known
    # Without C, lambda is absolute and starts at 1 (log lambda at 0), as published.
    ridge = settings.ridge if has_covariance else 1.0
    start = Calibration(statistics, editor_settings.eta or 1.0, settings.alphas[0], ridge)
    if editor_settings.eta is not None:
        return start
    unrelated = _unrelated(encoder, moment_facts, passages, settings)
    return _search(
        trunk,
        encoder,
        editor_settings,
        moment_facts,
        unrelated,
        captured,
        start,
        settings,
        progress,
    )


@torch.no_grad()
def covariance(
    trunk: Trunk,
    passages: Sequence[Encoded],
    most_tokens: int,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> list[Tensor]:
    """C of every site in float64: the mean of k k^T over the text but each line's first token."""
    sizes = torch.tensor([len(one.ids) - 1 for one in passages]).cumsum(0)
    questions = passages[: int((sizes < most_tokens).sum()) + 1]
    count = sum(len(one.ids) - 1 for one in questions)
    sums = [
        torch.zeros(site.shape_VK[1], site.shape_VK[1], dtype=torch.float64) for site in trunk.sites
    ]
    done = 0
    for indices, batch in trunk.batches(questions):
        with tracing(trunk.sites, grads=False) as traces:
            trunk.final_states(batch)
        chosen = batch.tokens.flat_attended
        for total_KK, trace in zip(sums, traces, strict=True):
            keys_NK = trace.keys[chosen.to(trace.keys.device)].to("cpu", torch.float64)
            total_KK.addmm_(keys_NK.T, keys_NK)
        done += len(indices)
        progress("covariance of general text", done / len(questions))
    return [total_KK / count for total_KK in sums]


def _passages(encoder: Encoder, text: str) -> list[Encoded]:
    """The lines of a text that have two tokens or more, without an answer."""
    lines = [encoder.passage_ids(line.strip()) for line in text.splitlines() if line.strip()]
    passages = [Encoded(ids, len(ids), len(ids)) for ids in lines if len(ids) > 1]
    if not passages:
        raise MalmendError("The calibration text has no line of two tokens; give more text.")
    return passages


def _unrelated(
    encoder: Encoder,
    facts: Sequence[Fact],
    passages: Sequence[Encoded],
    settings: CalibrationSettings,
) -> list[Encoded]:
    """One unrelated question per fact, one in eight of them near.

    Of the text, the last lines come first, for they are the least likely to be in C.
    """
    questions = []
    for index, fact in enumerate(facts[: settings.search_facts]):
        ids = passages[-1 - index % len(passages)].ids
        if index % 8 == 7 and fact.unrelated:
            questions.append(encoder.encode(fact.unrelated[0]))
        else:
            start = max(1, len(ids) - settings.unrelated_tokens)
            questions.append(Encoded(ids, start, len(ids)))
    return questions


def _search(
    trunk: Trunk,
    encoder: Encoder,
    editor_settings: EditorSettings,
    facts: Sequence[Fact],
    unrelated: Sequence[Encoded],
    captured: Sequence[Captured],
    start: Calibration,
    settings: CalibrationSettings,
    progress: Callable[[str, float], None],
) -> Calibration:
    """Edits the first facts with every (eta, alpha) and keeps the pair of least meta-loss."""
    facts = facts[: settings.search_facts]
    rows = sum(
        len(encoder.encode(fact.question).sources)
        if editor_settings.tokens == "answer"
        else len(encoder.encode(fact.question).ids) - 1
        for fact in facts
    )
    pairs = [Captured(pair.keys_NK[:rows], pair.value_grads_NV[:rows]) for pair in captured]
    states = trunk.unedited_states(unrelated)
    judged = [
        Judged(encoder.encode(fact.equivalents[0]), other, known)
        for fact, other, known in zip(facts, unrelated, states, strict=True)
    ]
    etas = settings.etas if editor_settings.method == "malmen" else settings.sum_etas
    if editor_settings.form == "published":
        etas = settings.published_etas
    # Neither a sum nor a prior without C has an alpha.
    has_alpha = editor_settings.method == "malmen" and editor_settings.prior == "text"
    alphas = settings.alphas if has_alpha else settings.alphas[:1]
    without_network = replace(editor_settings, network=replace(editor_settings.network, blocks=0))
    tried = []
    candidates = list(itertools.product(etas, alphas))
    for index, (eta, alpha) in enumerate(candidates):
        editor = replace(start, eta=eta, alpha=alpha).editor(without_network, trunk)
        with shifted(list(trunk.sites), editor.shifts(pairs)):
            loss = meta_loss(trunk, judged, settings.locality, grads=False)
        tried.append(
            {"eta": eta, "alpha": alpha, "loss": loss.total, "gen": loss.gen, "kl": loss.loc}
        )
        progress("search for eta and alpha", (index + 1) / len(candidates))
    # A NaN compares as neither less nor more, and would stay if it came first.
    best = min(tried, key=lambda row: math.inf if math.isnan(row["loss"]) else row["loss"])
    return replace(start, eta=best["eta"], alpha=best["alpha"], tried=tuple(tried))


def _counted(
    progress: Callable[[str, float], None], stage: str, total: int
) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, done / max(total, 1))

    return count


def calibration_key(
    fingerprint: str,
    trunk: Trunk,
    editor_settings: EditorSettings,
    settings: CalibrationSettings,
    facts: Sequence[Fact],
    text: str,
) -> str:
    """A name for the calibration that these inputs give."""
    used = [
        (f.prompt, f.answer, f.paraphrases[:1], [(q.prompt, q.answer) for q in f.unrelated[:1]])
        for f in facts
    ]
    what = {
        "format": FORMAT,
        "model": [fingerprint, str(trunk.model.dtype)],
        "sites": [site.name for site in trunk.sites],
        "editor": {**asdict(editor_settings), "network": None},
        "settings": asdict(settings),
        "facts": used,
        "text": hashlib.sha256(text.encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a calibration to one safetensors file."""
    tensors = {}
    for name, known in calibration.statistics.items():
        for part, moments in (("key", known.keys), ("grad", known.value_grads)):
            tensors[f"{name}.{part}_mean"] = moments.mean_F
            tensors[f"{name}.{part}_m2"] = moments.m2_F
        if known.covariance_KK is not None:
            tensors[f"{name}.covariance"] = known.covariance_KK.contiguous()
    counts = {name: known.keys.count for name, known in calibration.statistics.items()}
    header = {
        "eta": calibration.eta,
        "alpha": calibration.alpha,
        "ridge": calibration.ridge,
        "tried": list(calibration.tried),
        "counts": counts,
    }
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata={"calibration": json.dumps(header)})


def load_calibration(path: Path) -> Calibration:
    """Reads what :func:`save_calibration` wrote."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["calibration"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    statistics = {}
    for name, count in header["counts"].items():
        moments = []
        for part in ("key", "grad"):
            one = RunningMoments(len(tensors[f"{name}.{part}_mean"]))
            one.count = count
            one.mean_F, one.m2_F = tensors[f"{name}.{part}_mean"], tensors[f"{name}.{part}_m2"]
            moments.append(one)
        covariance_KK = tensors.get(f"{name}.covariance")
        statistics[name] = SiteStatistics(moments[0], moments[1], covariance_KK)
    return Calibration(
        statistics, header["eta"], header["alpha"], header["ridge"], tuple(header["tried"])
    )
