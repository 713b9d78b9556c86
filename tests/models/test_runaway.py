"""A fact that cannot be made likely does not run away (it once moved by 1e5, and then to NaN)."""

from __future__ import annotations

import torch

import forms_support as forms
from malmend.models.capture import LONGER, Descent, capture
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk


def unsure(family):
    """A model whose head can make nothing likely, whatever its layers give."""
    model = forms.model_of(family)
    head = model.classifier if family == "bert" else model.get_output_embeddings()
    head.weight.data *= 1e-3
    return model


def test_steps_stay_within_ten_times_the_first():
    for family in ("bert", "t5"):
        trunk = Trunk(model := unsure(family), find_sites(model, 1))
        asked = forms.questions(family)
        one, many = (capture(trunk, asked, "answer", Descent(steps)) for steps in (1, 10))
        for first, last in zip(one, many, strict=True):
            assert last.value_grads_NV.isfinite().all()
            assert last.value_grads_NV.norm() > first.value_grads_NV.norm() > 0
            bound = (1 + 9 * LONGER) * first.value_grads_NV.norm(dim=1).sum()
            assert last.value_grads_NV.norm(dim=1).sum() <= bound * (1 + 1e-6)
        assert torch.equal(one[0].keys_NK, many[0].keys_NK)
