"""The model that most proofs are of."""

from __future__ import annotations

import os

import pytest
import torch

import malmend


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(os.cpu_count() or 1)  # the suite runs its tiny models on one
    return malmend.load_model("smollm2-135m")
