"""Which layers an export can carry, and the reason where it cannot."""

from __future__ import annotations

import pytest
import torch
from shipping_support import FAMILIES, loaded_of, patch_for
from torch import nn

from malmend.errors import PatchError
from malmend.patch import Patch, sites_of
from malmend.shipping.layers import check_exportable, placed


def patch_of(loaded, name, shape):
    return Patch({name: (torch.zeros(shape),)}, {"base": loaded.fingerprint})


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_know_their_half(family):
    loaded = loaded_of(family)
    patch = patch_for(loaded)
    check_exportable(loaded, patch)
    sites = [placed(loaded, site) for site in sites_of(loaded.model, patch)]
    assert [site.name for site in sites] == list(patch.factors)
    pair = family.startswith("t5")
    for site in sites:
        assert site.in_encoder == (pair and site.name.startswith("encoder."))


def test_a_tied_layer_is_refused():
    loaded = loaded_of("llama")
    layers = loaded.model.model.layers
    layers[3].mlp.down_proj.weight = layers[2].mlp.down_proj.weight
    patch = patch_of(loaded, "model.layers.3.mlp.down_proj", (16, 24))
    with pytest.raises(PatchError, match=r"shares its weight with model\.layers\.2\.mlp"):
        check_exportable(loaded, patch)


def test_the_tied_output_layer_is_refused_and_so_is_one_outside_the_blocks():
    tied, loose = loaded_of("gpt2"), loaded_of("llama", tie_word_embeddings=False)
    with pytest.raises(PatchError, match=r"lm_head, which shares its weight with transformer\.wte"):
        check_exportable(tied, patch_of(tied, "lm_head", (60, 16)))
    with pytest.raises(PatchError, match="lies in none of the model's blocks"):
        check_exportable(loose, patch_of(loose, "lm_head", (60, 16)))


def test_a_layer_that_is_no_linear_one_is_refused():
    class Scaled(nn.Linear):
        def forward(self, key):
            return 2 * super().forward(key)

    loaded = loaded_of("llama")
    with pytest.raises(PatchError, match="of class Embedding, not a plain linear layer"):
        check_exportable(loaded, patch_of(loaded, "model.embed_tokens", (60, 16)))
    loaded.model.model.layers[3].mlp.down_proj = Scaled(24, 16, bias=False)
    with pytest.raises(PatchError, match="of class Scaled, not a plain linear layer"):
        check_exportable(loaded, patch_of(loaded, "model.layers.3.mlp.down_proj", (16, 24)))


def test_another_base_and_other_layers_are_refused():
    loaded, other = loaded_of("llama"), loaded_of("llama", seed=1)
    patch = patch_for(other)
    with pytest.raises(PatchError, match="or --force"):
        check_exportable(loaded, patch)
    check_exportable(loaded, patch, force=True)
    with pytest.raises(PatchError, match=r"did you mean 'model\.layers\.3\.mlp\.down_proj'"):
        check_exportable(loaded, patch_of(loaded, "model.layers.3.mlp.down_prj", (16, 24)))
    with pytest.raises(PatchError, match="made for another model"):
        check_exportable(loaded, patch_of(loaded, "model.layers.3.mlp.down_proj", (24, 16)))
