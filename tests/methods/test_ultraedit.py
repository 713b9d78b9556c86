"""UltraEdit's equations written out: moments by hand, the ridge by an augmented ``lstsq``."""

from __future__ import annotations

import pytest
import torch
from methods_support import FACTS, bench_of, encoded, with_shifts

from malmend.errors import EditorError
from malmend.methods.ultraedit import UltraEdit
from malmend.models.capture import capture
from malmend.models.trunk import Trunk
from malmend.progress import silent

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])


def spread(rows_NF):
    return (rows_NF - rows_NF.mean(0)).square().mean(0).sqrt()


def asked(keys_NK, grads_NV, all_keys_NK, all_grads_NV, eta):
    """d_j of every token; mean and spread over all tokens so far."""
    unit_NK = (keys_NK - all_keys_NK.mean(0)) / spread(all_keys_NK)
    unit_NV = (grads_NV - all_grads_NV.mean(0)) / spread(all_grads_NV)
    return -eta * unit_NK.square().sum(1, keepdim=True) * unit_NV


def ridge(keys_NK, diffs_NV, weight):
    """S of min |S U - D|^2 + weight |S|^2, by lstsq on rows with the root of the weight below."""
    width = keys_NK.shape[1]
    rows = torch.cat([keys_NK, weight**0.5 * torch.eye(width, dtype=keys_NK.dtype)])
    sides = torch.cat([diffs_NV, torch.zeros(width, diffs_NV.shape[1], dtype=keys_NK.dtype)])
    return torch.linalg.lstsq(rows, sides).solution.T


@FAMILIES
@pytest.mark.parametrize("weight", [1.0, 0.05])
def test_one_batch(family, weight):
    method = UltraEdit(eta=0.03, ridge=weight, layers=2)
    bench = bench_of(family, method)
    found = method.find(bench, FACTS, silent)
    pairs = capture(bench.trunk, encoded(bench), "answer", None)
    for site, pair in zip(bench.trunk.sites, pairs, strict=True):
        keys, grads = pair.keys_NK, pair.value_grads_NV
        wanted = ridge(keys, asked(keys, grads, keys, grads, 0.03), weight)
        assert wanted.norm() > 1e-2
        torch.testing.assert_close(found.shifts[site.name], wanted, rtol=1e-7, atol=1e-10)
    assert found.rank == len(pairs[0].keys_NK)


def test_a_later_batch_is_captured_on_the_edited_model_and_the_moments_go_on():
    method = UltraEdit(eta=0.03, batch=3, layers=2)
    bench = bench_of("llama", method)
    found = method.find(bench, FACTS, silent)
    first, second = encoded(bench)[:3], encoded(bench)[3:]
    pairs = capture(bench.trunk, first, "answer", None)
    shifts = {}
    for site, pair in zip(bench.trunk.sites, pairs, strict=True):
        keys, grads = pair.keys_NK, pair.value_grads_NV
        shifts[site.name] = ridge(keys, asked(keys, grads, keys, grads, 0.03), 1.0)
    edited = with_shifts(bench, shifts)
    later = capture(Trunk(edited, method.sites_in(edited)), second, "answer", None)
    for site, pair, again in zip(bench.trunk.sites, pairs, later, strict=True):
        keys = torch.cat([pair.keys_NK, again.keys_NK])
        grads = torch.cat([pair.value_grads_NV, again.value_grads_NV])
        diffs = asked(again.keys_NK, again.value_grads_NV, keys, grads, 0.03)
        wanted = shifts[site.name] + ridge(again.keys_NK, diffs, 1.0)
        torch.testing.assert_close(found.shifts[site.name], wanted, rtol=1e-7, atol=1e-10)
    once = UltraEdit(eta=0.03, layers=2).find(bench, FACTS, silent)
    name = bench.trunk.sites[0].name
    assert (once.shifts[name] - found.shifts[name]).norm() > 1e-2 * once.shifts[name].norm()


def test_a_single_token_gives_finite_numbers():
    method = UltraEdit(end_of_answer="none", layers=2)
    bench = bench_of("llama", method)
    (one,) = [fact for fact in FACTS if fact is FACTS[0]]
    found = method.find(bench, [one], silent)
    assert all(shift.isfinite().all() for shift in found.shifts.values())


@pytest.mark.parametrize(("field", "value"), [("eta", 0.0), ("ridge", -1.0), ("batch", 0)])
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(EditorError, match=rf"ultraedit\.{field} is .*, expected"):
        UltraEdit(**{field: value})
