from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import (
    TERMS,
    captured_of,
    encoder,
    random_facts,
    random_text,
    same,
    tiny_model,
    tiny_trunk,
)

from malmend.editors import calibration
from malmend.editors.calibration import CalibrationSettings, calibrate
from malmend.editors.calibration_file import (
    calibration_key,
    load_calibration,
    save_calibration,
)
from malmend.editors.keymoments import key_moments
from malmend.editors.metaloss import Judged, meta_loss
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import published, training_free
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Question, spread
from malmend.models.descent import Descent
from malmend.patch import shifted
from malmend.progress import silent

SMALL = CalibrationSettings(
    moment_facts=8,
    prior_facts=8,
    search_facts=5,
    text_tokens=60,
    etas=(0.3, 1.0),
    alphas=(1.0, 10.0, 100.0),
)
SMALL = replace(SMALL, asked=2.0, wording=0.2)
EDITOR = replace(training_free(), layers=2, descent=Descent(steps=3))
FACTS = random_facts(10, seed=20, neighbours=1)
USED = spread(FACTS, 8)  # as many as SMALL's statistics are of
TEXT = random_text(25)


@pytest.mark.parametrize("prior", ["wording", "text"])
def test_calibration_knows_the_text_and_the_facts(prior):
    trunk = tiny_trunk(tiny_model())
    # Lines of one word and none have no token but their first.
    text = "w1\n\n  \n" + TEXT.replace("\n", "\n\nw2\n", 3)
    settings, editor = replace(SMALL, text_tokens=10_000), replace(EDITOR, prior=prior)
    found = calibrate(trunk, encoder(), editor, FACTS, text, settings)
    captured = captured_of(trunk, USED, EDITOR)
    # Moments have tests of their own; here only what they are taken over.
    wanted = key_moments(trunk, encoder(), TERMS[prior], USED, TEXT, 10_000)
    assert list(found.statistics) == [site.name for site in trunk.sites]
    for index, (known, pair) in enumerate(zip(found.statistics.values(), captured, strict=True)):
        assert tuple(known.priors_KK) == TERMS[prior]
        for term, moment_KK in known.priors_KK.items():
            torch.testing.assert_close(moment_KK, wanted[term][index], rtol=1e-10, atol=1e-12)
        for moments, rows in (
            (known.keys, pair.keys_NK),
            (known.value_grads, pair.value_grads_NV),
        ):
            assert moments.count == len(rows)
            torch.testing.assert_close(moments.mean_F, rows.mean(0), rtol=1e-10, atol=1e-12)
            std_F = (moments.m2_F / len(rows)).sqrt()
            torch.testing.assert_close(std_F, rows.std(0, correction=0), rtol=1e-9, atol=1e-12)


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
    pairs = [(eta, alpha) for alpha in SMALL.alphas for eta in SMALL.etas]
    assert [(row["eta"], row["alpha"]) for row in found.tried] == pairs
    best = min(found.tried, key=lambda row: row["loss"])
    assert (found.eta, found.ridge) == (best["eta"], SMALL.ridge)
    assert found.weights == (best["alpha"], 2.0 * best["alpha"], 0.2)
    assert len({row["loss"] for row in found.tried}) == len(pairs)
    for row in found.tried:
        assert row["loss"] == pytest.approx(row["gen"] + row["kl"])
        assert row["kl"] > 0
    assert same(trunk.model.state_dict(), tiny_model().state_dict()), "the model is left as it was"


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("neighbours", [True, False])
def test_the_search_scores_the_edit_of_its_facts(tokens, neighbours):
    """One row of ``tried``, done by hand: the first nine facts edited, then asked."""
    trunk, settings = tiny_trunk(tiny_model()), replace(EDITOR, tokens=tokens)
    facts = FACTS if neighbours else [replace(fact, neighbours=()) for fact in FACTS]
    sizes = replace(SMALL, moment_facts=10, prior_facts=10, search_facts=9)
    found = calibrate(trunk, encoder(), settings, facts, TEXT, sizes)
    row = found.tried[2]
    weights = (row["alpha"], 2.0 * row["alpha"], 0.2)
    editor = replace(found, eta=row["eta"], weights=weights).editor(settings, trunk)
    shifts = editor.shifts(captured_of(trunk, facts[:9], settings))
    unrelated = []
    for index in range(9):
        ids = encoder().passage_ids(TEXT.splitlines()[-1 - index])
        unrelated.append(Encoded(ids, max(1, len(ids) - 5), len(ids)))
    near = facts[7].neighbours if neighbours else facts[7].unrelated
    unrelated[7] = encoder().encode(near[0])  # every eighth is near
    judged = [
        Judged(encoder().encode(fact.equivalents[0]), other, known)
        for fact, other, known in zip(
            facts, unrelated, trunk.unedited_states(unrelated), strict=False
        )
    ]
    with shifted(list(trunk.sites), shifts):
        loss = meta_loss(trunk, judged, grads=False)
    assert (loss.gen, loss.loc) == pytest.approx((row["gen"], row["kl"]), rel=1e-6)


def test_general_questions_are_the_far_ones_of_the_search():
    """In their order and round again; every eighth stays the fact's own, and near."""
    trunk = tiny_trunk(tiny_model())
    general = tuple(Question(f"w{index} w1", f"w{index + 9} w2") for index in range(3))
    sizes = replace(
        SMALL, moment_facts=10, prior_facts=10, search_facts=9, etas=(1.0,), alphas=(10.0,)
    )
    found = calibrate(trunk, encoder(), EDITOR, FACTS, TEXT, sizes, general=general)
    (row,) = found.tried
    editor = found.editor(EDITOR, trunk)
    asked = [general[index % 3] for index in range(9)]
    asked[7] = FACTS[7].neighbours[0]
    unrelated = encoder().encode_all(asked)
    judged = [
        Judged(encoder().encode(fact.equivalents[0]), other, known)
        for fact, other, known in zip(
            FACTS, unrelated, trunk.unedited_states(unrelated), strict=False
        )
    ]
    with shifted(list(trunk.sites), editor.shifts(captured_of(trunk, FACTS[:9], EDITOR))):
        loss = meta_loss(trunk, judged, grads=False)
    assert (loss.gen, loss.loc) == pytest.approx((row["gen"], row["kl"]), rel=1e-6)
    # They are in the prior too.
    wanted = key_moments(trunk, encoder(), ["asked"], FACTS, TEXT, 60, general)["asked"]
    bare = key_moments(trunk, encoder(), ["asked"], FACTS, TEXT, 60)["asked"]
    for known, mine, without in zip(found.statistics.values(), wanted, bare, strict=True):
        torch.testing.assert_close(known.priors_KK["asked"], mine, rtol=1e-10, atol=1e-12)
        assert (mine - without).norm() > 1e-3 * without.norm()


def test_the_search_asks_what_no_prior_reads():
    sizes = replace(SMALL, search_facts=3, etas=(1.0,), alphas=(10.0,))
    general, far = (tuple(Question(f"w{i} w{j}", "w9") for i in range(3)) for j in (1, 2))

    def found(*questions):
        return calibrate(
            tiny_trunk(tiny_model()), encoder(), EDITOR, FACTS, TEXT, sizes, silent, *questions
        )

    both, read, never = found(general, far), found(general), found((), far)
    for known, mine in zip(both.statistics.values(), read.statistics.values(), strict=True):
        torch.testing.assert_close(known.priors_KK["asked"], mine.priors_KK["asked"])
    assert both.tried[0]["gen"] == pytest.approx(read.tried[0]["gen"], rel=1e-12)
    assert both.tried[0]["kl"] != pytest.approx(read.tried[0]["kl"], rel=1e-3)
    # The search alone is asked them: the prior is that of no question at all.
    bare = found()
    for known, mine in zip(never.statistics.values(), bare.statistics.values(), strict=True):
        torch.testing.assert_close(known.priors_KK["asked"], mine.priors_KK["asked"])


def test_a_search_without_a_finite_loss_is_said(monkeypatch):
    """The first candidate was taken, and kept for every later edit."""

    def broken(*rest, **more):
        return replace(meta_loss(*rest, **more), gen=math.nan)

    monkeypatch.setattr(calibration, "meta_loss", broken)
    with pytest.raises(MalmendError, match="finite losses"):
        calibrate(tiny_trunk(tiny_model()), encoder(), EDITOR, FACTS, TEXT, SMALL)


def test_the_search_minds_the_weight_of_locality():
    trunk = tiny_trunk(tiny_model())
    heavy = calibrate(trunk, encoder(), EDITOR, FACTS, TEXT, replace(SMALL, locality=100.0))
    for row in heavy.tried:
        assert row["loss"] == pytest.approx(row["gen"] + 100 * row["kl"])
    best = min(heavy.tried, key=lambda row: row["loss"])
    assert (heavy.eta, heavy.weights[0]) == (best["eta"], best["alpha"])


@pytest.mark.parametrize(
    ("editor", "etas", "alphas"),
    [
        (EDITOR, SMALL.etas, SMALL.alphas),
        (replace(EDITOR, form="published"), SMALL.published_etas, SMALL.alphas),
        (replace(EDITOR, method="mend"), SMALL.sum_etas, SMALL.alphas[:1]),
        (replace(EDITOR, prior="text"), SMALL.etas, SMALL.alphas),
        (replace(EDITOR, prior="identity"), SMALL.etas, SMALL.alphas[:1]),
    ],
    ids=["malmen", "published form", "mend", "text prior", "identity prior"],
)
def test_what_is_searched_fits_the_editor(editor, etas, alphas):
    found = calibrate(tiny_trunk(tiny_model()), encoder(), editor, FACTS, TEXT, SMALL)
    assert {row["eta"] for row in found.tried} == set(etas)
    assert {row["alpha"] for row in found.tried} == set(alphas)
    known = next(iter(found.statistics.values()))
    # A sum has no prior at all.
    terms = TERMS[editor.prior] if editor.method == "malmen" else ()
    assert tuple(known.priors_KK) == terms
    assert len(found.weights) == len(terms)


def test_an_eta_that_is_given_is_not_searched():
    settings = replace(published(), layers=2, network=NetworkSettings(blocks=0))
    found = calibrate(tiny_trunk(tiny_model()), encoder(), settings, FACTS, TEXT, SMALL)
    assert found.tried == ()
    assert (found.eta, found.weights, found.ridge) == (1e-6, (), 1.0)
    assert all(not known.priors_KK for known in found.statistics.values())


def test_an_eta_that_is_given_leaves_the_weights_at_their_start():
    settings = replace(EDITOR, eta=0.5)
    found = calibrate(tiny_trunk(tiny_model()), encoder(), settings, FACTS, TEXT, SMALL)
    assert found.tried == ()
    first = SMALL.alphas[0]
    assert (found.eta, found.ridge) == (0.5, SMALL.ridge)
    assert found.weights == (first, 2.0 * first, 0.2)


def test_the_weights_of_a_prior_follow_its_terms():
    assert SMALL.weights(TERMS["wording"], 7.0) == (7.0, 14.0, 0.2)
    assert SMALL.weights(TERMS["text"], 7.0) == (7.0,)
    assert SMALL.weights(TERMS["identity"], 7.0) == ()


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
    assert (found.eta, found.weights[0]) == (best["eta"], best["alpha"])


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
    assert len(stages) == 5
    assert sum(len(shares) > 1 for shares in stages.values()) >= 3
    for shares in stages.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1


@pytest.mark.parametrize("prior", ["wording", "text", "identity"])
def test_a_calibration_comes_back_from_disk(tmp_path, prior):
    trunk, settings = tiny_trunk(tiny_model()), replace(EDITOR, prior=prior)
    found = calibrate(trunk, encoder(), settings, FACTS, TEXT, SMALL)
    save_calibration(found, tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    again = load_calibration(tmp_path / "one.safetensors")
    for name in ("eta", "weights", "ridge", "tried"):
        assert getattr(again, name) == getattr(found, name)
    assert again.statistics.keys() == found.statistics.keys()
    for name, known in found.statistics.items():
        other = again.statistics[name]
        for mine, theirs in ((known.keys, other.keys), (known.value_grads, other.value_grads)):
            assert mine.count == theirs.count
            assert torch.equal(mine.mean_F, theirs.mean_F)
            assert torch.equal(mine.m2_F, theirs.m2_F)
        assert tuple(other.priors_KK) == TERMS[prior]
        assert same(known.priors_KK, other.priors_KK)
    network = replace(settings, network=NetworkSettings(rank=4))
    editors = [one.editor(network, trunk, 3) for one in (found, again)]
    assert same(editors[0].state_dict(), editors[1].state_dict())
    assert editors[0].log_eta_S.exp().tolist() == pytest.approx([found.eta] * 2, rel=1e-6)
    weights_SP = editors[0].log_weights_SP.exp()
    assert weights_SP.flatten().tolist() == pytest.approx([*found.weights] * 2, rel=1e-6)


def test_the_key_names_what_the_calibration_depends_on():
    trunk = tiny_trunk(tiny_model())

    def key(
        model="print",
        tokenizer="cuts",
        cut=trunk,
        editor=EDITOR,
        settings=SMALL,
        facts=tuple(FACTS),
        text=TEXT,
        general=(),
    ) -> str:
        return calibration_key(model, tokenizer, cut, editor, settings, facts, text, general)

    first, *rest = FACTS
    other_question = replace(first.unrelated[0], answer="w9 w9 w9")
    others = [
        key(model="other"),
        key(tokenizer="other"),
        key(cut=tiny_trunk(tiny_model(), layers=1)),
        key(cut=tiny_trunk(tiny_model(dtype=torch.float32))),
        key(editor=replace(EDITOR, method="mend")),
        key(editor=replace(EDITOR, form="published")),
        key(editor=replace(EDITOR, tokens="all")),
        key(editor=replace(EDITOR, end_of_answer="none")),
        key(editor=replace(EDITOR, descent=None)),
        key(editor=replace(EDITOR, descent=Descent(steps=4))),
        key(editor=replace(EDITOR, prior="identity")),
        key(editor=replace(EDITOR, prior="text")),
        key(editor=replace(EDITOR, eta=0.5)),
        key(editor=replace(EDITOR, network=NetworkSettings(normalise=False))),
        key(settings=replace(SMALL, etas=(0.3, 1.1))),
        key(settings=replace(SMALL, text_tokens=61)),
        key(settings=replace(SMALL, asked=2.5)),
        key(settings=replace(SMALL, wording=0.3)),
        key(facts=tuple(rest)),
        key(facts=(*rest, first)),
        key(facts=(replace(first, prompt="w1"), *rest)),
        key(facts=(replace(first, answer="w1 w1 w1 w1"), *rest)),
        key(facts=(replace(first, paraphrases=("w1",)), *rest)),
        key(facts=(replace(first, paraphrases=(first.paraphrases[0], "w1")), *rest)),
        key(facts=(replace(first, unrelated=(other_question,)), *rest)),
        key(facts=(replace(first, unrelated=(first.unrelated[0], other_question)), *rest)),
        key(facts=(replace(first, neighbours=(Question("w3 w4", "w5"),)), *rest)),
        key(text=TEXT + "\nw1 w2"),
        key(general=(Question("w1", "w2"),)),
        key(general=(Question("w1", "w3"),)),
        key(general=(Question("w1", "w2"), Question("w3", "w4"))),
        key(general=(Question("w3", "w4"), Question("w1", "w2"))),
    ]
    assert len({key(), *others}) == len(others) + 1
    # Neither a network's size nor what is not read of a fact matters.
    assert key() == key(editor=replace(EDITOR, network=NetworkSettings(rank=7)))
    other = {"relation": "r", "alternative": "w1", "reversed": Question("w2", "w3")}
    assert key() == key(facts=(replace(first, id="x", line=9, tags=("t",), **other), *rest))
    assert key() == key(cut=tiny_trunk(tiny_model(), batch_tokens=9))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"moment_facts": 0}, "moment_facts is 0, expected 1 or more"),
        ({"text_tokens": -5}, "text_tokens is -5, expected 1 or more"),
        ({"alphas": ()}, r"alphas is \(\), expected one or more numbers above 0"),
        ({"etas": (1.0, -1.0)}, r"etas is \(1.0, -1.0\)"),
        ({"sum_etas": (math.inf,)}, r"sum_etas is \(inf,\)"),
        ({"ridge": -0.1}, "ridge is -0.1, expected a number from 0 to"),
        ({"locality": math.nan}, "locality is nan"),
    ],
)
def test_settings_that_make_no_sense(given, said):
    with pytest.raises(MalmendError, match=said):
        replace(SMALL, **given)
