"""A configuration that states more parts than any model has, refused before they are built."""

from __future__ import annotations

import json

import pytest

import forms_folders
from malmend.errors import ModelError
from malmend.models.load import load_base, load_config, load_model, load_tokenizer

LOADS = [load_model, load_config, load_tokenizer, lambda name: load_base(name, ["a", "b"])]


@pytest.fixture
def folder(tmp_path):
    forms_folders.save_base("bart", tmp_path)
    return tmp_path


def state(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "stated",
    [
        {"encoder_layers": 10**8},
        {"decoder_layers": 1_001},
        {"num_labels": 10**9},
        {"text_config": {"n_layer": 10**8}},
        {"block_configs": [{"num_local_experts": 10**8}]},
        {"depths": [2, 10**8]},
        {"inner_group_num": 10**5},
        {"num_hidden_groups": 10**5},
        {"attention_types": [[["global", "local"], 10**9]]},
        {"num_key_value_heads": 10**5},
        {"relative_attention_num_buckets": 3 * 10**8},
        {"n_positions": 3 * 10**8},
    ],
)
def test_too_many_parts_are_refused(folder, load, stated):
    state(folder, **stated)
    with pytest.raises(ModelError, match=r"states [a-z_]+ = [0-9,]+, expected at most") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_large_numbers_that_count_no_parts_are_let_in(folder):
    stated = {"max_length": 10**9, "head_note": 10**9, "use_layers": True, "pad_token_id": 3}
    stated |= {"label2id": {"stage": 1_100}, "id2label": {"1100": "stage"}}
    state(folder, **stated)
    assert load_model(str(folder)).model.config.d_model == 32
