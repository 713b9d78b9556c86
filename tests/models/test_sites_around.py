"""Which layers settle beside an editor's own."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import tiny
from malmend.facts.encoded import Encoded
from malmend.models.sites import around, find_sites
from malmend.models.trunk import Trunk

# By family: what ends the attention, and what feeds the second layer, in a block.
PARTS = {
    "llama": ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gptj": ("attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc1", "fc2"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),  # gate and first layer are one
}


@pytest.mark.parametrize("family", PARTS)
def test_attentions_outputs_and_feed_forward_layers_of_the_blocks_and_the_one_below(family):
    model = tiny.model_of(family)
    second = find_sites(model, 2)
    found = [site.name for site in around(model, second)]
    prefix = tiny.SECOND[family].partition("{}")[0]
    blocks = range(tiny.BLOCKS - 3, tiny.BLOCKS)
    wanted = {f"{prefix}{block}.{part}" for block in blocks for part in PARTS[family]}
    assert set(found) == wanted
    assert len(found) == len(wanted)
    assert [name for name in found if name in {s.name for s in second}] == [s.name for s in second]


def test_the_lowest_block_has_none_below():
    model = tiny.model_of("llama")
    every = around(model, find_sites(model, tiny.BLOCKS))
    assert len(every) == 3 * tiny.BLOCKS


def test_sites_of_another_kind_stay_among_them():
    model = tiny.model_of("llama")
    chosen = find_sites(model, pattern="*.1.mlp.gate_proj")
    found = [site.name.split(".", 2)[2] for site in around(model, chosen)]
    assert found == [
        "0.self_attn.o_proj",
        "0.mlp.up_proj",
        "0.mlp.down_proj",
        "1.self_attn.o_proj",
        "1.mlp.gate_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    ]


def test_of_a_mixture_of_experts_the_attention_settles():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config).eval()
    chosen = find_sites(model, pattern="*.1.self_attn.o_proj")
    found = [site.name.split(".", 2)[2] for site in around(model, chosen)]
    assert found == ["0.self_attn.o_proj", "1.self_attn.o_proj"]


def test_a_trunk_at_some_of_its_sites_is_cut_where_it_was():
    model = tiny.model_of("llama")
    own = find_sites(model, 1)
    whole = Trunk(model, around(model, own))
    some = whole.at({site.name for site in own})
    assert [site.name for site in some.sites] == [site.name for site in own]
    assert len(whole.sites) == 6
    assert some.cut is whole.cut
    question = Encoded((3, 5, 7, 9), 2, 4)
    same = whole.logits(whole.batch([question]))
    torch.testing.assert_close(some.logits(some.batch([question])), same, rtol=0, atol=0)
