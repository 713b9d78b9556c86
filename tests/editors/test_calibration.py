from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import (
    captured_of,
    encoder,
    random_facts,
    random_text,
    same,
    tiny_model,
    tiny_trunk,
)
from transformers import PreTrainedModel

from malmend.editors import calibration
from malmend.editors.calibration import (
    CalibrationSettings,
    calibrate,
    calibration_key,
    covariance,
    load_calibration,
    save_calibration,
)
from malmend.editors.editor import published, training_free
from malmend.editors.metaloss import Judged, meta_loss
from malmend.editors.network import NetworkSettings
from malmend.errors import MalmendError
from malmend.facts.tokens import Encoded
from malmend.models.capture import Descent
from malmend.models.trunk import Trunk
from malmend.patch import shifted

SMALL = CalibrationSettings(
    moment_facts=8, search_facts=5, text_tokens=60, etas=(0.3, 1.0), alphas=(1.0, 10.0, 100.0)
)
EDITOR = replace(training_free(), layers=2, descent=Descent(steps=3))
FACTS = random_facts(10, seed=20)
TEXT = random_text(25)


def passages_of(text: str) -> list[Encoded]:
    lines = [encoder().passage_ids(line) for line in text.splitlines()]
    return [Encoded(ids, len(ids), len(ids)) for ids in lines]


def covariances_alone(model: PreTrainedModel, trunk: Trunk, lines: list[str]) -> list[torch.Tensor]:
    """A loop over lines and tokens, each line alone through the whole model."""
    sums = [torch.zeros(s.shape_VK[1], s.shape_VK[1], dtype=torch.float64) for s in trunk.sites]
    count = 0
    for line in lines:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            site.module.register_forward_pre_hook(
                lambda _, args, seen=seen, name=site.name: seen.update({name: args[0][0]})
            )
            for site in trunk.sites
        ]
        ids = encoder().passage_ids(line)
        model(input_ids=torch.tensor([ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        for total, site in zip(sums, trunk.sites, strict=True):
            for key in seen[site.name][1:]:
                total += torch.outer(key.double(), key.double())
        count += len(ids) - 1
    return [total / count for total in sums]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_covariance_is_the_mean_over_tokens_but_each_lines_first(family, batch_tokens):
    model = tiny_model(family)
    trunk = tiny_trunk(model, batch_tokens=batch_tokens)
    wanted = covariances_alone(model, trunk, TEXT.splitlines())
    found = covariance(trunk, passages_of(TEXT), 10_000)
    assert len(found) == 2
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("most", [1, 2, 20, 40, "exactly three lines"])
def test_covariance_stops_at_the_line_that_reaches_the_bound(most):
    model = tiny_model()
    trunk, lines, used, tokens = tiny_trunk(model), TEXT.splitlines(), [], 0
    if isinstance(most, str):
        most = sum(len(line.split()) - 1 for line in lines[:3])
    for line in lines:
        if tokens >= most:
            break
        used.append(line)
        tokens += len(line.split()) - 1
    assert len(used) < len(lines)
    wanted = covariances_alone(model, trunk, used)
    for mine, theirs in zip(covariance(trunk, passages_of(TEXT), most), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_calibration_knows_the_text_and_the_facts():
    model = tiny_model()
    trunk = tiny_trunk(model)
    # Lines of one word and none have no token but their first.
    text = "w1\n\n  \n" + TEXT.replace("\n", "\n\nw2\n", 3)
    settings = replace(SMALL, text_tokens=10_000)
    found = calibrate(trunk, encoder(), EDITOR, FACTS, text, settings)
    captured = captured_of(trunk, FACTS[:8], EDITOR)
    wanted = covariances_alone(model, trunk, TEXT.splitlines())
    assert list(found.statistics) == [site.name for site in trunk.sites]
    for known, pair, covariance_KK in zip(found.statistics.values(), captured, wanted, strict=True):
        torch.testing.assert_close(known.covariance_KK, covariance_KK, rtol=1e-10, atol=1e-12)
        for moments, rows in (
            (known.keys, pair.keys_NK),
            (known.value_grads, pair.value_grads_NV),
        ):
            assert moments.count == len(rows)
            torch.testing.assert_close(moments.mean_F, rows.mean(0), rtol=1e-10, atol=1e-12)
            spread = (moments.m2_F / len(rows)).sqrt()
            torch.testing.assert_close(spread, rows.std(0, correction=0), rtol=1e-9, atol=1e-12)


def test_text_without_a_line_of_two_tokens_is_refused():
    with pytest.raises(MalmendError, match="no line of two tokens; give more text"):
        calibrate(tiny_trunk(tiny_model()), encoder(), EDITOR, FACTS, "w1\nw2\n\n", SMALL)


def test_facts_without_paraphrases():
    bare = [replace(fact, paraphrases=()) for fact in FACTS]
    trunk = tiny_trunk(tiny_model())
    with pytest.raises(MalmendError, match=r"No calibration fact has a paraphrase, .* --calibrate"):
        calibrate(trunk, encoder(), EDITOR, bare, TEXT, SMALL)
    mixed = [*bare[:3], *FACTS[3:]]
    found = calibrate(trunk, encoder(), EDITOR, mixed, TEXT, SMALL)
    only = calibrate(trunk, encoder(), EDITOR, FACTS[3:], TEXT, SMALL)
    assert found.tried == only.tried, "facts without a paraphrase are left out"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_the_search_tries_every_pair_and_keeps_the_best(tokens):
    trunk = tiny_trunk(tiny_model())
    settings = replace(EDITOR, tokens=tokens)
    found = calibrate(trunk, encoder(), settings, FACTS, TEXT, SMALL)
    pairs = [(eta, alpha) for eta in SMALL.etas for alpha in SMALL.alphas]
    assert [(row["eta"], row["alpha"]) for row in found.tried] == pairs
    best = min(found.tried, key=lambda row: row["loss"])
    assert (found.eta, found.alpha, found.ridge) == (best["eta"], best["alpha"], SMALL.ridge)
    assert len({row["loss"] for row in found.tried}) == len(pairs)
    for row in found.tried:
        assert row["loss"] == pytest.approx(row["gen"] + row["kl"])
        assert row["kl"] > 0
    assert same(trunk.model.state_dict(), tiny_model().state_dict()), "the model is left as it was"


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_the_search_scores_the_edit_of_its_facts(tokens):
    """One row of ``tried``, done by hand: the first nine facts edited, then asked."""
    trunk, settings = tiny_trunk(tiny_model()), replace(EDITOR, tokens=tokens)
    sizes = replace(SMALL, moment_facts=10, search_facts=9)
    found = calibrate(trunk, encoder(), settings, FACTS, TEXT, sizes)
    row = found.tried[2]
    editor = replace(found, eta=row["eta"], alpha=row["alpha"]).editor(settings, trunk)
    shifts = editor.shifts(captured_of(trunk, FACTS[:9], settings))
    unrelated = []
    for index in range(9):
        ids = encoder().passage_ids(TEXT.splitlines()[-1 - index])
        unrelated.append(Encoded(ids, max(1, len(ids) - 5), len(ids)))
    unrelated[7] = encoder().encode(FACTS[7].unrelated[0])  # every eighth is near
    judged = [
        Judged(encoder().encode(fact.equivalents[0]), other, known)
        for fact, other, known in zip(
            FACTS, unrelated, trunk.unedited_states(unrelated), strict=False
        )
    ]
    with shifted(list(trunk.sites), shifts):
        loss = meta_loss(trunk, judged, grads=False)
    assert (loss.gen, loss.loc) == pytest.approx((row["gen"], row["kl"]), rel=1e-6)


def test_the_search_minds_the_weight_of_locality():
    trunk = tiny_trunk(tiny_model())
    heavy = calibrate(trunk, encoder(), EDITOR, FACTS, TEXT, replace(SMALL, locality=100.0))
    for row in heavy.tried:
        assert row["loss"] == pytest.approx(row["gen"] + 100 * row["kl"])
    best = min(heavy.tried, key=lambda row: row["loss"])
    assert (heavy.eta, heavy.alpha) == (best["eta"], best["alpha"])


@pytest.mark.parametrize(
    ("editor", "etas", "alphas"),
    [
        (EDITOR, SMALL.etas, SMALL.alphas),
        (replace(EDITOR, form="published"), SMALL.published_etas, SMALL.alphas),
        (replace(EDITOR, method="mend"), SMALL.sum_etas, SMALL.alphas[:1]),
        (replace(EDITOR, prior="identity"), SMALL.etas, SMALL.alphas[:1]),
    ],
    ids=["malmen", "published form", "mend", "identity prior"],
)
def test_what_is_searched_fits_the_editor(editor, etas, alphas):
    found = calibrate(tiny_trunk(tiny_model()), encoder(), editor, FACTS, TEXT, SMALL)
    assert {row["eta"] for row in found.tried} == set(etas)
    assert {row["alpha"] for row in found.tried} == set(alphas)
    known = next(iter(found.statistics.values()))
    # A sum has no prior at all.
    needed = editor.method == "malmen" and editor.prior == "text"
    assert (known.covariance_KK is not None) == needed


def test_an_eta_that_is_given_is_not_searched():
    settings = replace(published(), layers=2, network=NetworkSettings(blocks=0))
    found = calibrate(tiny_trunk(tiny_model()), encoder(), settings, FACTS, TEXT, SMALL)
    assert found.tried == ()
    assert (found.eta, found.ridge) == (1e-6, 1.0)
    assert all(known.covariance_KK is None for known in found.statistics.values())


def test_a_candidate_that_breaks_the_model_is_not_kept(monkeypatch):
    calls = []

    def broken(*rest, **more):
        calls.append(1)
        loss = meta_loss(*rest, **more)
        return replace(loss, gen=math.nan) if len(calls) == 1 else loss

    monkeypatch.setattr(calibration, "meta_loss", broken)
    found = calibrate(tiny_trunk(tiny_model()), encoder(), EDITOR, FACTS, TEXT, SMALL)
    assert math.isnan(found.tried[0]["loss"])
    best = min(found.tried[1:], key=lambda row: row["loss"])
    assert (found.eta, found.alpha) == (best["eta"], best["alpha"])


def test_a_text_shorter_than_the_search_is_gone_round():
    text = "\n".join(TEXT.splitlines()[:2])
    found = calibrate(tiny_trunk(tiny_model()), encoder(), EDITOR, FACTS, text, SMALL)
    assert all(math.isfinite(row["loss"]) for row in found.tried)


def test_progress_is_told_to_its_end():
    stages: dict[str, list[float]] = {}
    calibrate(
        tiny_trunk(tiny_model(), batch_tokens=20),
        encoder(),
        EDITOR,
        FACTS,
        TEXT,
        SMALL,
        lambda stage, share: stages.setdefault(stage, []).append(share),
    )
    assert len(stages) == 3
    for shares in stages.values():
        assert len(shares) > 1
        assert shares == sorted(shares)
        assert shares[-1] == 1


@pytest.mark.parametrize("prior", ["text", "identity"])
def test_a_calibration_comes_back_from_disk(tmp_path, prior):
    trunk, settings = tiny_trunk(tiny_model()), replace(EDITOR, prior=prior)
    found = calibrate(trunk, encoder(), settings, FACTS, TEXT, SMALL)
    save_calibration(found, tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    again = load_calibration(tmp_path / "one.safetensors")
    for name in ("eta", "alpha", "ridge", "tried"):
        assert getattr(again, name) == getattr(found, name)
    assert again.statistics.keys() == found.statistics.keys()
    for name, known in found.statistics.items():
        other = again.statistics[name]
        for mine, theirs in ((known.keys, other.keys), (known.value_grads, other.value_grads)):
            assert mine.count == theirs.count
            assert torch.equal(mine.mean_F, theirs.mean_F)
            assert torch.equal(mine.m2_F, theirs.m2_F)
        if prior == "identity":
            assert other.covariance_KK is None
        else:
            assert torch.equal(known.covariance_KK, other.covariance_KK)
    network = replace(settings, network=NetworkSettings(rank=4))
    editors = [one.editor(network, trunk, 3) for one in (found, again)]
    assert same(editors[0].state_dict(), editors[1].state_dict())
    assert editors[0].log_eta_S.exp().tolist() == pytest.approx([found.eta] * 2, rel=1e-6)
    assert editors[0].log_alpha_S.exp().tolist() == pytest.approx([found.alpha] * 2, rel=1e-6)


def test_the_key_names_what_the_calibration_depends_on():
    trunk = tiny_trunk(tiny_model())

    def key(
        model="print", cut=trunk, editor=EDITOR, settings=SMALL, facts=tuple(FACTS), text=TEXT
    ) -> str:
        return calibration_key(model, cut, editor, settings, facts, text)

    first, *rest = FACTS
    other_question = replace(first.unrelated[0], answer="w9 w9 w9")
    others = [
        key(model="other"),
        key(cut=tiny_trunk(tiny_model(), layers=1)),
        key(cut=tiny_trunk(tiny_model(dtype=torch.float32))),
        key(editor=replace(EDITOR, method="mend")),
        key(editor=replace(EDITOR, form="published")),
        key(editor=replace(EDITOR, tokens="all")),
        key(editor=replace(EDITOR, end_of_answer="none")),
        key(editor=replace(EDITOR, descent=None)),
        key(editor=replace(EDITOR, descent=Descent(steps=4))),
        key(editor=replace(EDITOR, prior="identity")),
        key(editor=replace(EDITOR, eta=0.5)),
        key(settings=replace(SMALL, etas=(0.3, 1.1))),
        key(settings=replace(SMALL, text_tokens=61)),
        key(facts=tuple(rest)),
        key(facts=(*rest, first)),
        key(facts=(replace(first, prompt="w1"), *rest)),
        key(facts=(replace(first, answer="w1 w1 w1 w1"), *rest)),
        key(facts=(replace(first, paraphrases=("w1",)), *rest)),
        key(facts=(replace(first, unrelated=(other_question,)), *rest)),
        key(text=TEXT + "\nw1 w2"),
    ]
    assert len({key(), *others}) == len(others) + 1
    # Neither a network's size nor what is not read of a fact matters.
    assert key() == key(editor=replace(EDITOR, network=NetworkSettings(rank=7)))
    assert key() == key(facts=(replace(first, id="x", line=9, tags=("t",)), *rest))
    assert key() == key(cut=tiny_trunk(tiny_model(), batch_tokens=9))
