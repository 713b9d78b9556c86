"""Where patches meet, by definition in float64; what stacking is."""

from __future__ import annotations

import pytest
import torch
from shipping_support import loaded_of, patch_for

from malmend.errors import PatchError
from malmend.patch import Patch, applied
from malmend.shipping.conflict import meetings, stacked


def test_meetings_by_their_definition():
    loaded = loaded_of("llama")
    patches = {"one": patch_for(loaded), "two": patch_for(loaded, layers=1, bound=99, seed=50)}
    found = meetings(patches)
    assert [one.site for one in found] == list(patches["two"].factors)
    for one in found:
        assert one.patches == ("one", "two")
        mine, theirs = (patches[name].shift(one.site).double() for name in one.patches)
        wanted = torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0)
        assert one.cosine == pytest.approx(wanted.item())
        rank, other = (int(torch.linalg.matrix_rank(m, rtol=1e-4)) for m in (mine, theirs))
        assert one.ranks == (rank, other)
        for side, space in ((one.values, lambda m: m), (one.keys, lambda m: m.T)):
            bases = [torch.linalg.svd(space(m))[0] for m in (mine, theirs)]
            angles = torch.linalg.svdvals(bases[0][:, :rank].T @ bases[1][:, :other])
            assert side.found == pytest.approx(angles.square().mean().item())
            assert side.chance == max(one.ranks) / len(bases[0])


def test_a_patch_meets_itself_wholly_and_three_meet_by_pairs():
    loaded = loaded_of("gpt2")
    patch = patch_for(loaded, layers=1)
    found = meetings({"a": patch, "b": patch, "c": patch})
    assert len(found) == 3 * len(patch.factors)
    assert {one.patches for one in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    for one in found:
        assert one.cosine == pytest.approx(1.0)
        assert one.keys.found == pytest.approx(1.0)


def test_patches_of_other_layers_do_not_meet():
    loaded = loaded_of("llama")
    whole = patch_for(loaded)
    names = list(whole.factors)
    parts = [Patch({n: whole.factors[n] for n in some}) for some in (names[:2], names[2:])]
    assert meetings({"a": parts[0], "b": parts[1]}) == ()


def test_shifts_of_unlike_shapes_are_refused():
    one, two = (Patch({"layer": (torch.ones(2, width),)}) for width in (3, 4))
    with pytest.raises(PatchError, match="of different models"):
        meetings({"one": one, "two": two})


def test_stacking_adds_shifts_and_rounds_once():
    loaded = loaded_of("llama", torch.bfloat16)
    patches = {str(seed): patch_for(loaded, layers=seed, seed=10 * seed) for seed in (1, 2)}
    before = {name: one.clone() for name, one in loaded.model.named_parameters()}
    with applied(loaded, stacked(patches, loaded.fingerprint)) as model:
        for name, weight in model.named_parameters():
            site = name.removesuffix(".weight")
            shifts = [one.shift(site) for one in patches.values() if site in one.factors]
            wanted = before[name].float() + sum(one.double() for one in shifts)
            assert torch.equal(weight, wanted.float().bfloat16() if shifts else before[name])


def test_a_small_shift_between_two_large_ones_is_not_rounded_away():
    shifts = {"up": 1.0, "little": 2.0**-30, "down": -1.0}
    patches = {name: Patch({"layer": (torch.full((2, 3), one),)}) for name, one in shifts.items()}
    assert torch.equal(stacked(patches, "").shift("layer"), torch.full((2, 3), 2.0**-30))
