"""The meta-gradient of every family of decoders, by either layer of its feed-forward blocks."""

from __future__ import annotations

import pytest
import torch
from support import captured_of, random_editor, random_facts
from test_metagradient import _captured_alone, _decoupled, _through_the_edit

import tiny
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import ModelError
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk, TrunkSettings

FUSED = ("phi3", "glm")


@pytest.mark.parametrize("family", tiny.EVERY)
@pytest.mark.parametrize("linear", ["first", "second"])
def test_metagradient_of_every_family(family, linear):
    """Wherever a family is cut, and whatever stands between layer and residual."""
    model = tiny.model_of(family)
    facts = random_facts(3, seed=6)
    settings = EditorSettings(descent=None, network=NetworkSettings(rank=3))
    if linear == "first" and family in FUSED:
        with pytest.raises(ModelError, match="fused with the gate"):
            find_sites(model, 2, None, linear)
        return
    sites = find_sites(model, 2, None, linear)
    trunk = Trunk(model, sites, TrunkSettings(64))
    captured = captured_of(trunk, facts, settings)
    editor = random_editor(settings, trunk, captured, eta=0.3).double()
    pairs = _captured_alone(model, editor.names, facts, "answer")
    wanted_loss, wanted = _through_the_edit(model, editor, pairs, facts)
    loss, found = _decoupled(editor, trunk, facts, 4)
    # Some take norms or attention in float32 whatever their type.
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert wanted["log_eta_S"].abs().max() > 1e-6
    for name, grad in wanted.items():
        close = 1e-5 * grad.abs().max().item() + 1e-9
        assert torch.allclose(found[name], grad, rtol=0, atol=close), name
