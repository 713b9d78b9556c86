from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import (
    TERMS,
    captured_of,
    copies,
    random_editor,
    random_facts,
    same,
    statistics_of,
    tiny_model,
    tiny_trunk,
)

from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings, published, training_free
from malmend.errors import EditorError
from malmend.models.capture import Captured
from malmend.numerics.chunks import chunks
from malmend.numerics.moments import RunningMoments

V, K = 5, 9
NETWORK = NetworkSettings(rank=4)


def random_pair(count: int, seed: int = 0) -> Captured:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return Captured(torch.randn(count, K, **draw) + 0.5, 0.3 * torch.randn(count, V, **draw))


def lone_editor(settings: EditorSettings, priors=None, **scalars) -> Editor:
    """One site; statistics of other tokens than any that are edited here."""
    if priors is None:
        settings = replace(settings, prior="identity")
    known = SiteStatistics(RunningMoments(K), RunningMoments(V), priors or {})
    other = random_pair(50, seed=99)
    known.keys.add(other.keys_NK)
    known.value_grads.add(other.value_grads_NV)
    return Editor(settings, {"site": (V, K)}, {"site": known}, **scalars).double()


def moments(*ranks: int) -> dict[str, torch.Tensor]:
    """A matrix per term, float32 as editors keep them."""
    known = {}
    for index, (term, rank) in enumerate(zip(("text", "asked", "wording"), ranks, strict=False)):
        generator = torch.Generator().manual_seed(40 + index)
        rows = torch.randn(rank, K, generator=generator, dtype=torch.float64)
        known[term] = (rows.T @ rows / rank).float()
    return known


@pytest.mark.parametrize("blocks", [0, 2])
def test_residual_form_at_the_start_asks_for_minus_eta_g(blocks):
    network = replace(NETWORK, blocks=blocks)
    editor = lone_editor(EditorSettings(network=network), eta=0.7)
    pair, eta = random_pair(6), editor.log_eta_S[0].exp()
    pseudo = editor.pseudo(0, pair)
    gain = (pair.keys_NK**2).sum(1, keepdim=True)
    torch.testing.assert_close(pseudo.keys_NK, pair.keys_NK / gain, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pseudo.grads_NV, eta * pair.value_grads_NV, rtol=1e-12, atol=1e-14)
    diffs = editor.aggregate([pair])[0].diffs_NV
    torch.testing.assert_close(diffs, -eta * pair.value_grads_NV, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("blocks", [0, 2])
def test_residual_form_at_the_start_sums_to_outer_products(blocks):
    network = replace(NETWORK, blocks=blocks)
    editor = lone_editor(EditorSettings(method="mend", network=network), eta=0.7)
    pair = random_pair(6)
    wanted = torch.zeros(V, K, dtype=torch.float64)
    for u, g in zip(pair.keys_NK, pair.value_grads_NV, strict=True):
        wanted -= editor.log_eta_S[0].exp() * torch.outer(g, u) / (u @ u)
    for chunk in (1, 4, 100):
        shift = editor.shifts([pair], chunk)["site"]
        torch.testing.assert_close(shift, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("blocks", [0, 2])
def test_published_form_at_the_start_gives_normalised_rows(blocks):
    settings = replace(published(), network=replace(NETWORK, blocks=blocks, placement="after"))
    editor = lone_editor(settings, eta=0.02)
    pair, known = random_pair(6), random_pair(50, seed=99)
    pseudo = editor.pseudo(0, pair)
    for rows, mine, calibration, factor in (
        (pseudo.keys_NK, pair.keys_NK, known.keys_NK, 1.0),
        (pseudo.grads_NV, pair.value_grads_NV, known.value_grads_NV, 0.02),
    ):
        spread = calibration.std(0, correction=0)
        wanted = factor * (mine - calibration.mean(0)) / spread
        torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-6)  # kept in float32


def test_residual_form_scales_what_the_network_adds():
    editor = lone_editor(EditorSettings(network=NETWORK), eta=0.5)
    with torch.no_grad():
        for block in editor.networks[f"{V}x{K}"].blocks:
            block.up_FR.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    pair = random_pair(6)
    buffers = dict(editor.named_buffers())
    x = torch.cat(
        [
            (pair.keys_NK - buffers["key_mean_0"]) / buffers["key_std_0"],
            (pair.value_grads_NV - buffers["grad_mean_0"]) / buffers["grad_std_0"],
        ],
        1,
    )
    added = editor.networks[f"{V}x{K}"](x, 0) - x
    assert added.abs().max() > 0.1
    pseudo = editor.pseudo(0, pair)
    gain = pair.keys_NK.square().sum(1, keepdim=True)
    keys = (pair.keys_NK + buffers["key_std_0"] * added[:, :K]) / gain
    grads = editor.log_eta_S[0].exp() * (pair.value_grads_NV + buffers["grad_std_0"] * added[:, K:])
    torch.testing.assert_close(pseudo.keys_NK, keys, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pseudo.grads_NV, grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["residual", "published"])
def test_mend_sums_the_outer_products_of_its_pseudo_rows(form):
    settings = EditorSettings(method="mend", form=form, network=NETWORK)
    editor = lone_editor(settings, eta=0.1)
    pair = random_pair(20)
    pseudo = editor.pseudo(0, pair)
    wanted = sum(-torch.outer(g, u) for g, u in zip(pseudo.grads_NV, pseudo.keys_NK, strict=True))
    torch.testing.assert_close(editor.shifts([pair], 7)["site"], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["residual", "published"])
@pytest.mark.parametrize("prior", ["wording", "text", "identity"])
@pytest.mark.parametrize("count", [4, 30])
def test_malmen_solves_the_ridge_problem(form, prior, count):
    """At the minimum of (1), the derivative by S is zero."""
    settings = EditorSettings(form=form, prior=prior, network=NETWORK)
    known, weights = moments(2 * K, 4, 3), (2.0, 0.7, 0.1)[: len(TERMS[prior])]
    editor = lone_editor(settings, known, eta=0.3, weights=weights, ridge=0.05)
    pair = random_pair(count)
    shift, diffs = editor.shifts([pair], 3)["site"], editor.aggregate([pair])[0].diffs_NV
    pseudo = editor.pseudo(0, pair)
    for u, key, grad, d in zip(pair.keys_NK, pseudo.keys_NK, pseudo.grads_NV, diffs, strict=True):
        torch.testing.assert_close(d, -(key @ u) * grad, rtol=1e-12, atol=1e-14)
    ridge = 0.05 * (2.0 * known["text"].double().diagonal().mean() if weights else 1.0)
    total = ridge * torch.eye(K, dtype=torch.float64)
    for term, weight, times in zip(TERMS[prior], weights, (1, 1, count), strict=False):
        total += times * weight * known[term].double()
    slope = (pair.keys_NK @ shift.T - diffs).T @ pair.keys_NK + shift @ total
    assert slope.norm() < 1e-6 * (diffs.T @ pair.keys_NK).norm()  # scalars are float32


@pytest.mark.parametrize("count", [3, K, 24])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_wordings_term_fits_the_shift_to_keys_that_are_moved(count, weight):
    """Equation (13), by least squares over moved keys that are written out, one row each.

    Each of four e moves each key with either sign: the cross term vanishes, exactly.  A weight
    below 1 is a share of the rows that are moved at all; here every row has it for its own weight.
    """
    generator = torch.Generator().manual_seed(8)
    # Whole numbers, so that the mean of e e^T is exact in the float32 that editors keep.
    moves = torch.randint(-3, 4, (4, K), generator=generator).double()
    known = moments(2 * K, 4) | {"wording": (moves.T @ moves / 4).float()}
    settings = replace(training_free(), prior="wording")
    editor = lone_editor(settings, known, eta=0.8, weights=(0.5, 0.2, weight), ridge=0.1)
    pair = random_pair(count)
    shift = editor.shifts([pair])["site"]
    prior = editor.prior(0, count)

    keys, targets = [], []
    for u, g in zip(pair.keys_NK, pair.value_grads_NV, strict=True):
        d = -editor.log_eta_S[0].exp() * g
        # |S u - d|^2 = (1 - w) |S u - d|^2 + w |S u - d|^2, and the second part is moved.
        keys.append((1 - weight) ** 0.5 * u)
        targets.append((1 - weight) ** 0.5 * d)
        for e in moves:
            for sign in (1, -1):
                keys.append((weight / 8) ** 0.5 * (u + sign * e))
                targets.append((weight / 8) ** 0.5 * d)
    keys.extend(prior.ridge**0.5 * torch.eye(K, dtype=torch.float64))
    for matrix, times in zip((known["text"], known["asked"]), prior.weights, strict=False):
        values, vectors = torch.linalg.eigh(matrix.double())
        keys.extend((times * values.clamp(min=0)).sqrt()[:, None] * vectors.T)
    rows = torch.stack(keys)
    asked = torch.zeros(len(rows), V, dtype=torch.float64)
    asked[: len(targets)] = torch.stack(targets)
    wanted = torch.linalg.lstsq(rows, asked, driver="gelsd").solution.T
    # The weight 0.3 is kept as the logarithm in float32; else condition times rounding.
    torch.testing.assert_close(shift, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    # The case is hard enough: without the term the shift is another one.
    other = lone_editor(settings, known, eta=0.8, weights=(0.5, 0.2, 1e-9), ridge=0.1)
    assert (other.shifts([pair])["site"] - wanted).norm() > 0.05 * wanted.norm()


def test_ridge_is_relative_to_the_prior_only_where_there_is_one():
    known = moments(2 * K, 4, 3) | {"text": torch.diag(torch.arange(1.0, K + 1))}
    for prior, weights in (("text", (4.0,)), ("wording", (4.0, 3.0, 0.5))):
        with_prior = lone_editor(
            replace(training_free(), prior=prior), known, weights=weights, ridge=0.1
        )
        assert with_prior.prior(0, 1).ridge == pytest.approx(0.1 * 4.0 * (K + 1) / 2, rel=1e-6)
    without = lone_editor(training_free(), ridge=0.1)
    assert without.prior(0, 1).ridge == pytest.approx(0.1, rel=1e-6)
    assert without.prior(0, 1).matrices_KK == ()


def test_only_the_wordings_weight_grows_with_the_tokens():
    known = moments(2 * K, 4, 3)
    editor = lone_editor(EditorSettings(network=NETWORK), known, weights=(4.0, 3.0, 0.5))
    for tokens in (1, 7, 2000):
        prior = editor.prior(0, tokens)
        assert prior.weights == pytest.approx((4.0, 3.0, 0.5 * tokens), rel=1e-6)
        for term, matrix in zip(TERMS["wording"], prior.matrices_KK, strict=True):
            assert torch.equal(matrix, known[term].double()), term


def test_another_number_of_weights_than_terms_is_refused():
    known, settings = moments(2 * K, 4, 3), EditorSettings(network=NETWORK)
    for weights in ((), (1.0,), (1.0, 2.0), (1.0,) * 4):
        with pytest.raises(
            EditorError,
            match=rf"{len(weights)} weights of the prior .* expected 3 \(text, asked, wording\)",
        ):
            lone_editor(settings, known, weights=weights)
    for other in (replace(settings, prior="identity"), replace(settings, method="mend")):
        with pytest.raises(EditorError, match=r"expected 0 \(none\)"):
            lone_editor(other, known, weights=(1.0,))
        assert lone_editor(other, known).log_weights_SP.shape == (1, 0)


def test_mend_and_malmen_agree_on_one_token_without_a_prior():
    """S = d u^T / |u|^2 at lambda = 0; both are -eta g u^T / |u|^2 when u~ is along u."""
    pair = random_pair(1)
    mend = lone_editor(training_free("mend"), eta=0.6).shifts([pair])["site"]
    malmen = lone_editor(training_free(), eta=0.6, ridge=0.0).shifts([pair])["site"]
    torch.testing.assert_close(malmen, mend, rtol=1e-12, atol=1e-14)
    nearly = lone_editor(training_free(), eta=0.6, ridge=1e-9).shifts([pair])["site"]
    torch.testing.assert_close(nearly, mend, rtol=1e-8, atol=1e-12)
    held = lone_editor(training_free(), eta=0.6, ridge=1e3).shifts([pair])["site"]
    assert held.norm() < 0.1 * mend.norm()


def test_what_a_token_is_asked_depends_on_its_fact_alone():
    editor = lone_editor(EditorSettings(network=NETWORK), eta=0.6)
    with torch.no_grad():
        for block in editor.networks[f"{V}x{K}"].blocks:
            block.up_FR.normal_(generator=torch.Generator().manual_seed(5))
    pair = random_pair(12)
    together = editor.aggregate([pair])[0].diffs_NV
    for index in range(12):
        alone = editor.aggregate([pair.rows(slice(index, index + 1))])[0].diffs_NV
        torch.testing.assert_close(alone[0], together[index], rtol=1e-12, atol=1e-14)


def test_a_key_of_zeros_asks_for_nothing_and_breaks_nothing():
    pair = random_pair(3)
    pair.keys_NK[1] = 0
    for method in ("malmen", "mend"):
        shift = lone_editor(training_free(method)).shifts([pair])["site"]
        assert shift.isfinite().all()


def test_editing_changes_nothing_of_the_editor_and_keeps_no_graph():
    trunk = tiny_trunk(tiny_model(dtype=torch.float32))
    settings = EditorSettings(layers=2, network=NETWORK)
    captured = captured_of(trunk, random_facts(5), settings)
    editor = random_editor(settings, trunk, captured)
    before = copies(editor.state_dict())
    for one in editor.aggregate(captured, 3):
        assert not one.shift().requires_grad
        assert one.shift().dtype == torch.float64
    assert same(before, editor.state_dict())
    assert all(parameter.grad is None for parameter in editor.parameters())


def test_sites_of_one_shape_share_a_network_and_other_shapes_do_not():
    model = tiny_model("gpt2", torch.float32)
    trunk = tiny_trunk(model, pattern="transformer.h.[12].mlp.*")
    settings = EditorSettings(descent=None, network=NETWORK)
    captured = captured_of(trunk, random_facts(5), settings)
    editor = random_editor(settings, trunk, captured)
    assert {name: len(net.blocks[0].scale_SF) for name, net in editor.networks.items()} == {
        "32x16": 2,
        "16x32": 2,
    }
    shifts = editor.shifts(captured)
    assert list(shifts) == [site.name for site in trunk.sites]
    assert [tuple(shift.shape) for shift in shifts.values()] == [(32, 16), (16, 32)] * 2


def test_the_seed_decides_the_networks():
    trunk = tiny_trunk(tiny_model())
    settings = EditorSettings(network=NETWORK)
    known = statistics_of(trunk, captured_of(trunk, random_facts(3), settings))
    shapes = {site.name: site.shape_VK for site in trunk.sites}
    states = [Editor(settings, shapes, known, seed=seed).state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_an_editor_refuses_another_models_layers():
    small, settings = tiny_trunk(tiny_model(), layers=1), EditorSettings(network=NETWORK)
    captured = captured_of(small, random_facts(3), settings)
    editor = random_editor(settings, small, captured)
    editor.check_fits(small.sites)
    with pytest.raises(
        EditorError, match=r"made for the layers model\.layers\.2\.mlp\.down_proj 16x32, .* offers"
    ):
        editor.check_fits(tiny_trunk(tiny_model(), layers=2).sites)
    with pytest.raises(EditorError, match=r"offers transformer\.h\.2\.mlp\.c_proj 16x32;"):
        editor.check_fits(tiny_trunk(tiny_model("gpt2"), layers=1).sites)
    wider = Editor(
        replace(settings, prior="identity"),
        {editor.names[0]: (V, K)},
        {editor.names[0]: SiteStatistics(RunningMoments(K), RunningMoments(V))},
    )
    with pytest.raises(EditorError, match=rf"down_proj {V}x{K}, this model offers .* 16x32;"):
        wider.check_fits(small.sites)


def test_an_editor_refuses_its_layers_in_another_order():
    """Captured pairs come without names, in the order of the sites."""
    trunk, settings = tiny_trunk(tiny_model()), EditorSettings(network=NETWORK)
    editor = random_editor(settings, trunk, captured_of(trunk, random_facts(3), settings))
    editor.check_fits(trunk.sites)
    with pytest.raises(EditorError, match="made for the layers"):
        editor.check_fits(trunk.sites[::-1])


def test_another_number_of_captured_sites_is_refused():
    editor = lone_editor(training_free())
    with pytest.raises(EditorError, match="2 sites were captured, expected 1: site"):
        editor.shifts([random_pair(2), random_pair(2)])
    with pytest.raises(EditorError, match="0 sites were captured, expected 1: site"):
        editor.aggregate([])


def test_named_settings():
    assert published().tokens == "answer"  # of a classifier too: MALMEN takes the first token
    assert training_free("mend").method == "mend"
    assert training_free().network.blocks == 0
    paper = published("mend")
    assert (paper.method, paper.form, paper.descent) == ("mend", "published", None)
    assert (paper.network.rank, paper.network.blocks) == (1920, 2)
    assert (paper.network.placement, paper.network.start) == ("after", "normal")
    assert paper.end_of_answer == "none"


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (3, 3), (10, 3), (10, 100), (4, 1)])
def test_chunks_cover_every_row_once(count, size):
    seen = [index for rows in chunks(count, size) for index in range(count)[rows]]
    assert seen == list(range(count))
    assert all(rows.stop - rows.start <= size for rows in chunks(count, size))


def test_a_network_is_asked_about_no_token_farther_than_three_usual_ones():
    """A key of 1,000 beside usual ones of 50 once made a shift of 19,000 (Natural Questions)."""
    editor = lone_editor(EditorSettings(network=NETWORK), eta=0.5)
    with torch.no_grad():
        for block in editor.networks[f"{V}x{K}"].blocks:
            block.up_FR.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    buffers, pair = dict(editor.named_buffers()), random_pair(6)
    far = Captured(pair.keys_NK * 40, pair.value_grads_NV)
    pseudo = editor.pseudo(0, far)
    x = torch.cat(
        [
            (far.keys_NK - buffers["key_mean_0"]) / buffers["key_std_0"],
            (far.value_grads_NV - buffers["grad_mean_0"]) / buffers["grad_std_0"],
        ],
        1,
    )
    assert (x.norm(dim=1) > 3 * (V + K) ** 0.5).all()
    x = x / x.norm(dim=1, keepdim=True) * 3 * (V + K) ** 0.5
    added = editor.networks[f"{V}x{K}"](x, 0) - x
    keys = far.keys_NK + buffers["key_std_0"] * added[:, :K]
    keys = keys / far.keys_NK.square().sum(1, keepdim=True)
    grads = 0.5 * (far.value_grads_NV + buffers["grad_std_0"] * added[:, K:])
    torch.testing.assert_close(pseudo.keys_NK, keys, rtol=1e-6, atol=1e-9)  # eta is float32
    torch.testing.assert_close(pseudo.grads_NV, grads, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["residual", "published"])
def test_without_normalisation_the_network_reads_keys_and_gradients_as_they_are(form):
    settings = EditorSettings(form=form, network=replace(NETWORK, normalise=False))
    editor, pair = lone_editor(settings, eta=0.7), random_pair(4)
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(0.3)
    x_NF = torch.cat([pair.keys_NK, pair.value_grads_NV], dim=1)
    out_NF = editor.networks[f"{V}x{K}"](x_NF, 0)
    wanted = (out_NF[:, :K], 0.7 * out_NF[:, K:])
    if form == "residual":
        wanted = (wanted[0] / pair.keys_NK.square().sum(1, keepdim=True), wanted[1])
    pseudo = editor.pseudo(0, pair)
    for got, expected in zip((pseudo.keys_NK, pseudo.grads_NV), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
