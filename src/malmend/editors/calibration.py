"""What an editor must know of a model before its first edit, found once and kept.

Per site: mean and spread of keys and value gradients over calibration facts, and the second moments
of keys that the prior holds (see keymoments.py).  Then starting values of eta and the prior's
weights, by a search that edits calibration facts and takes the candidate with the least meta-loss
on their paraphrases and on unrelated questions: for one fact in eight its own (a near one: the same
relation of another subject), for the others a general question (a far one), or where there are
none, the end of a line of the text, the last lines first: they are the least likely to be in C.

Everything is fixed from then on, so that what is asked of a token depends on its fact alone.

Shape letters: K key width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.keymoments import end_of, key_moments, others_of, passages_of
from malmend.editors.metaloss import Judged, meta_loss
from malmend.editors.settings import EditorSettings
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, Question, spread
from malmend.facts.tokens import Encoder
from malmend.given import check_fields, check_range
from malmend.models.capture import Captured, capture, token_counts
from malmend.models.device import wide_device
from malmend.models.trunk import Trunk
from malmend.numerics.moments import RunningMoments
from malmend.patch import shifted
from malmend.progress import Progress, counting, silent


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is calibrated.

    Attributes:
        moment_facts: facts whose keys and value gradients are averaged.
        prior_facts: facts whose questions and paraphrases the prior's moments are taken of.
        search_facts: facts edited at once while eta and alpha are searched.
        text_tokens: tokens of general text that C is averaged over.
        etas: candidates; for the published form they span orders of magnitude.
        alphas: candidates of the text's weight; more than 30 looks better to a search with few
            facts, and then costs edit success at a thousand.
        asked: weight of the questions about others, as a multiple of the text's.
        wording: weight of the wording's spread, by equation (13) at most 1.
        published_etas: candidates of the published form.
        sum_etas: candidates where shifts are summed, which adds up what the facts share.
        unrelated_tokens: tokens at a line's end that count as an unrelated answer.
        ridge: lambda as a share of alpha times the mean of C's diagonal.
        locality: weight of the KL in the meta-loss that the search minimises.
    """

    moment_facts: int = 256
    prior_facts: int = 256
    search_facts: int = 192
    text_tokens: int = 16_000
    etas: tuple[float, ...] = (1.0, 1.25, 1.5, 1.8, 2.2)
    published_etas: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    sum_etas: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
    alphas: tuple[float, ...] = (10.0, 30.0)
    asked: float = 3.0
    wording: float = 0.03
    unrelated_tokens: int = 5
    ridge: float = 0.01
    locality: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        counts = ("moment_facts", "prior_facts", "search_facts", "text_tokens", "unrelated_tokens")
        check_range(self, counts, 1, prefix="Calibration's ")
        tried = ("etas", "published_etas", "sum_etas", "alphas")
        check_range(self, tried, prefix="Calibration's ")
        check_range(self, ("asked", "wording", "ridge", "locality"), 0.0, prefix="Calibration's ")

    def weights(self, terms: Sequence[str], alpha: float) -> tuple[float, ...]:
        """The starting weight of each term of a prior, from the text's."""
        known = {"text": alpha, "asked": self.asked * alpha, "wording": self.wording}
        return tuple(known[term] for term in terms)


@dataclass(frozen=True)
class Calibration:
    """The result: statistics by site name, starting values, and every pair that was tried.

    ``digest``: of the facts, questions, text and settings that it is of, where it is known.
    """

    statistics: dict[str, SiteStatistics]
    eta: float
    weights: tuple[float, ...]
    ridge: float
    tried: tuple[dict[str, float], ...] = ()
    digest: str = ""

    def editor(self, settings: EditorSettings, trunk: Trunk, seed: int = 0) -> Editor:
        """An untrained editor that starts from these values."""
        shapes = {site.name: site.shape_VK for site in trunk.sites}
        found = Editor(settings, shapes, self.statistics, self.eta, self.weights, self.ridge, seed)
        return found.on(wide_device(trunk.model))


def calibrate(
    trunk: Trunk,
    encoder: Encoder,
    editor_settings: EditorSettings,
    facts: Sequence[Fact],
    text: str,
    settings: CalibrationSettings = CalibrationSettings(),
    progress: Progress = silent,
    general: Sequence[Question] = (),
    far: Sequence[Question] = (),
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
        general: questions about all kinds of things, which the prior holds.
        far: more of them, which it does not read: the search asks what of these moves.  Without
            any it asks the general ones, and without those the text's last lines.
    """
    usable = [fact for fact in facts if fact.paraphrases]
    if not usable:
        raise MalmendError(
            "No calibration fact has a paraphrase, which the search for eta and alpha needs; "
            "add paraphrases, or leave --calibrate out."
        )
    passages = passages_of(encoder, text)
    terms = editor_settings.terms
    moment_facts = spread(usable, settings.moment_facts)
    captured = capture(
        trunk,
        encoder.encode_all(fact.question for fact in moment_facts),
        editor_settings.tokens,
        editor_settings.descent,
        counting(progress, "value gradients of calibration facts", len(moment_facts)),
    )
    moments = key_moments(
        trunk,
        encoder,
        terms,
        spread(usable, settings.prior_facts),
        text,
        settings.text_tokens,
        general,
        editor_settings.tokens,
        progress,
    )
    statistics = _statistics(trunk, captured, moments)
    # Without a term, lambda is absolute and starts at 1 (log lambda at 0), as published.
    ridge = settings.ridge if terms else 1.0
    start = Calibration(
        statistics, editor_settings.eta or 1.0, settings.weights(terms, settings.alphas[0]), ridge
    )
    if editor_settings.eta is not None:
        return start
    others = encoder.encode_all(far or general) or [
        end_of(one, settings.unrelated_tokens) for one in reversed(passages)
    ]
    unrelated = _unrelated(encoder, moment_facts[: settings.search_facts], others)
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


def _statistics(
    trunk: Trunk, captured: Sequence[Captured], moments: Mapping[str, Sequence[Tensor]]
) -> dict[str, SiteStatistics]:
    """By site name: mean and spread of what was captured, and the prior's moments by term."""
    statistics = {}
    for index, (site, pair) in enumerate(zip(trunk.sites, captured, strict=True)):
        value_width, key_width = site.shape_VK
        known = SiteStatistics(
            RunningMoments(key_width),
            RunningMoments(value_width),
            {term: found[index] for term, found in moments.items()},
        )
        known.keys.add(pair.keys_NK)
        known.value_grads.add(pair.value_grads_NV)
        statistics[site.name] = known
    return statistics


def _unrelated(encoder: Encoder, facts: Sequence[Fact], far: Sequence[Encoded]) -> list[Encoded]:
    """One unrelated question per fact, one in eight of them near."""
    questions = []
    for index, fact in enumerate(facts):
        near = others_of(fact)
        is_near = index % 8 == 7 and near
        questions.append(encoder.encode(near[0]) if is_near else far[index % len(far)])
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
    progress: Progress,
) -> Calibration:
    """Edits the first facts with every (eta, alpha) and keeps the pair of least meta-loss."""
    facts = facts[: settings.search_facts]
    first = encoder.encode_all(fact.question for fact in facts)
    pairs = [
        pair.rows(slice(sum(token_counts(first, editor_settings.tokens, site.in_encoder))))
        for site, pair in zip(trunk.sites, captured, strict=True)
    ]
    states = trunk.unedited_states(unrelated)
    judged = [
        Judged(encoder.encode(fact.equivalents[0]), other, known)
        for fact, other, known in zip(facts, unrelated, states, strict=True)
    ]
    etas = settings.etas if editor_settings.method == "malmen" else settings.sum_etas
    if editor_settings.form == "published":
        etas = settings.published_etas
    # Neither a sum nor a prior without a term has an alpha.
    terms = editor_settings.terms
    alphas = settings.alphas if terms else settings.alphas[:1]
    without_network = replace(editor_settings, network=replace(editor_settings.network, blocks=0))
    tried = list[dict[str, float]]()
    for alpha in alphas:
        weights = settings.weights(terms, alpha)
        editor = replace(start, eta=1.0, weights=weights).editor(without_network, trunk)
        units = editor.shifts(pairs)  # without a network a shift is linear in eta
        for eta in etas:
            with shifted(trunk.sites, {name: eta * unit for name, unit in units.items()}):
                loss = meta_loss(trunk, judged, settings.locality, grads=False)
            tried.append(
                {"eta": eta, "alpha": alpha, "loss": loss.total, "gen": loss.gen, "kl": loss.loc}
            )
            progress("search for eta and alpha", len(tried) / (len(etas) * len(alphas)))
    # A NaN compares as neither less nor more, and would stay if it came first.
    best = min(tried, key=lambda row: math.inf if math.isnan(row["loss"]) else row["loss"])
    if not math.isfinite(best["loss"]):
        raise MalmendError(
            "No eta that was tried on the calibration facts leaves the model finite losses; load "
            "it in float32, or give the editor an eta."
        )
    weights = settings.weights(terms, best["alpha"])
    return replace(start, eta=best["eta"], weights=weights, tried=tuple(tried))
