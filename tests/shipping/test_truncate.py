"""A cut adapter against keys taken by hand, one line and one fact at a time."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import shipping_support
import torch
from shipping_support import loaded_of, low_rank

import command_support
from malmend.errors import MalmendError
from malmend.facts.readers import read_facts, read_text
from malmend.models.sites import Site, find_sites
from malmend.models.trunk import TrunkSettings
from malmend.patch import make_patch
from malmend.patch_file import load_patch
from malmend.shipping.export import Cutting, export_adapter
from malmend.shipping.measure import bench_for
from malmend.shipping.truncate import FLOOR, key_metric

tiny = command_support.tiny
cache = command_support.cache
patch = shipping_support.patch


@torch.no_grad()
def keys_of(model, name, ids, chosen):
    """A layer's inputs at chosen tokens, a plain pass for each text."""
    rows = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].double()))
    for one in ids:
        model(input_ids=torch.tensor([one]))
    handle.remove()
    return torch.cat([keys[at] for keys, at in zip(rows, chosen, strict=True)])


@pytest.mark.parametrize("with_facts", [True, False])  # the first is what `make test` runs
def test_the_cut_is_the_best_for_the_keys_of_the_text_and_of_the_edit_prompts(
    tiny, patch, tmp_path, with_facts
):
    whole, model = load_patch(patch), copy.deepcopy(tiny.loaded.model)
    bench = bench_for(tiny.loaded, [whole], "eos", TrunkSettings())
    facts, text = read_facts(tiny.facts).facts, read_text(tiny.text)
    lines = [bench.encoder.passage(line).ids for line in text.splitlines()]
    asked = [bench.encoder.encode(fact.question) for fact in facts]
    said, back = export_adapter(
        bench, whole, tmp_path, Cutting(8, text, facts if with_facts else ())
    )
    for name in whole.factors:
        kinds = [keys_of(model, name, lines, [slice(1, None)] * len(lines))]
        if with_facts:
            at = [list(one.sources) for one in asked]
            kinds.append(keys_of(model, name, [one.ids for one in asked], at))
        metric = sum(keys.T @ keys / len(keys) for keys in kinds)
        metric = metric + FLOOR * metric.diagonal().mean() * torch.eye(len(metric))
        root = torch.linalg.cholesky(metric)
        shift = whole.shift(name).double()
        lost = ((shift - back.shift(name).double()) @ root).norm() / (shift @ root).norm()
        sizes = torch.linalg.svdvals(shift @ root)
        assert lost.item() == pytest.approx((sizes[8:].norm() / sizes.norm()).item(), rel=1e-3)
        assert said["sites"][name]["error_on_keys"] == pytest.approx(lost.item(), rel=1e-3)


def test_one_layer_of_too_large_a_rank_is_enough_to_cut(tiny, tmp_path):
    sites, ranks = find_sites(tiny.loaded.model, 2), (9, 3)
    shifts = {
        site.name: low_rank(rank, site.shape_VK, seed=rank)
        for rank, site in zip(ranks, sites, strict=True)
    }
    whole = make_patch(shifts, max(ranks), {"base": tiny.loaded.fingerprint})
    bench = bench_for(tiny.loaded, [whole], "eos", TrunkSettings())
    said, back = export_adapter(bench, whole, tmp_path, Cutting(8, read_text(tiny.text)))
    assert (said["exact"], said["rank"]) == (False, 8)
    assert tuple(one["rank"] for one in said["sites"].values()) == ranks
    kept = [int(torch.linalg.matrix_rank(back.shift(name), rtol=1e-5)) for name in shifts]
    assert kept == [8, 3]


def test_a_layer_that_reads_another_halfs_tokens_has_no_keys_to_cut_by():
    loaded = loaded_of("t5")
    name = "decoder.block.1.layer.1.EncDecAttention.k"
    site = Site(name, loaded.model.get_submodule(name))
    bench = SimpleNamespace(loaded=loaded, trunk=SimpleNamespace(sites=[site]))
    with pytest.raises(MalmendError, match=r"does not see every token once.*leave --rank out"):
        key_metric(bench, "a line")
