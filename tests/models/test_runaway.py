"""A fact that cannot be made likely does not run away.

A norm after the layer bounds what a move can do, and a head of small weights makes nothing sure:
the loss stays, the gradient vanishes, and a step of equation (6) alone grew without end, to 1e7
times the first and beyond within twelve, and on to NaN.
"""

from __future__ import annotations

import pytest
import torch

import forms_support as forms
from malmend.models.capture import capture
from malmend.models.descent import Descent
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk

STEPS, TIMES = 12, 10


@pytest.mark.parametrize("family", ["bert", "distilbert", "bart"])
def test_no_step_is_longer_than_ten_times_the_first(family):
    model = forms.model_of(family)
    encodes = family in forms.ENCODERS
    head = model.classifier if encodes else model.get_output_embeddings()
    head.weight.data *= 0.1
    trunk = Trunk(model, find_sites(model, 1))
    asked = forms.questions(family)
    one, many = (capture(trunk, asked, "answer", Descent(steps)) for steps in (1, STEPS))
    for first, last in zip(one, many, strict=True):
        size_N = first.value_grads_NV.norm(dim=1)
        moved_N = last.value_grads_NV.norm(dim=1)
        assert torch.isfinite(moved_N).all()
        assert (moved_N <= (1 + (STEPS - 1) * TIMES) * size_N.max()).all()
        assert moved_N.max() > 5 * size_N.max()  # the bound is what held it
