"""What a ledger is for: whatever its history, its shift is the direct edit of what it holds."""

from __future__ import annotations

import dataclasses
import json
import shutil

import ledger_support
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ledger_support import added, apart, assert_same, direct, own

import command_support
import malmend
from malmend.commands.ledger import patch_of
from malmend.editors.editor import log_size
from malmend.errors import EditorError
from malmend.ledgers.access import reading
from malmend.methods.editor_choice import choose
from malmend.models.capture import capture
from malmend.models.load import prepared
from malmend.workbench import lay_out

tiny = command_support.tiny
cache = command_support.cache
ledger = ledger_support.empty
empty = ledger_support.empty

FACTS = ledger_support.HELD
WIDE = 40  # facts that have more tokens than the keys' 128 dimensions


def renamed(fact, answer):
    return dataclasses.replace(fact, answer=answer)


def holding(ledger) -> list[malmend.Fact]:
    return [entry.fact for entry in malmend.ledger.list_facts(ledger)]


def summed(ledger) -> bool:
    """Whether the current generation has sums, and the file is there."""
    [*_, last] = malmend.ledger.history(ledger)
    found = {path.name for path in ledger.glob("sums-*")}
    assert found == ({last.generation.sums} if last.generation.sums else set())
    return bool(found)


@pytest.mark.parametrize(
    ("first", "then"),
    [(20, WIDE), pytest.param(4, 9, marks=pytest.mark.slow), (WIDE, WIDE + 5)],
)
def test_two_batches_are_one(tiny, ledger, first, then):
    added(tiny, ledger, FACTS[:first])
    added(tiny, ledger, FACTS[first:then])
    assert summed(ledger) == (then >= WIDE)
    assert_same(malmend.ledger.patch(ledger), direct(tiny, FACTS[:then]))
    assert apart(malmend.ledger.patch(ledger), direct(tiny, FACTS[: then - 1])) > 1e-3


@pytest.mark.parametrize(
    "gone",
    [
        pytest.param(slice(0, 1), marks=pytest.mark.slow),
        slice(3, 7),
        pytest.param(slice(0, 25), marks=pytest.mark.slow),
        slice(0, 59),
    ],
    ids=["1", "4", "25", "59"],
)
def test_revoking_is_never_having_added(tiny, ledger, gone):
    added(tiny, ledger, FACTS)
    rest = [fact for fact in FACTS if fact not in FACTS[gone]]
    malmend.ledger.revoke(ledger, [fact.id for fact in FACTS[gone]])
    assert summed(ledger) == (len(rest) >= WIDE - 10)
    found = malmend.ledger.patch(ledger)
    wanted = direct(tiny, rest)
    assert_same(found, wanted)
    assert found.provenance["facts_sha256"] == wanted.provenance["facts_sha256"]
    assert found.provenance["tokens"] == wanted.provenance["tokens"]
    assert found.provenance["configuration"] == wanted.provenance["configuration"]


def test_the_tokens_of_a_patch_are_those_of_the_layer_with_most(tiny, ledger):
    """Their number bounds the rank: by that of another layer a shift would be cut."""
    added(tiny, ledger, FACTS[:3])
    with reading(ledger) as held:
        moved = held.move(held.active)
        counts = (2, 7, *[3] * (len(held.editor.names) - 2))
        entries = [dataclasses.replace(one, tokens=counts) for one in moved.entries]
        made = patch_of(held, dataclasses.replace(moved, entries=entries))
    assert made.provenance["tokens"] == 3 * 7


def test_the_norm_is_the_shifts_as_a_share_of_the_edited_weights(tiny, ledger):
    norm = added(tiny, ledger, FACTS[:3]).generation.norm
    patch = malmend.ledger.patch(ledger)
    weights = [tiny.loaded.model.get_parameter(f"{name}.weight") for name in patch.factors]
    shift, whole = (
        sum(one.double().square().sum().item() for one in some) ** 0.5
        for some in ([patch.shift(name) for name in patch.factors], weights)
    )
    assert norm == pytest.approx(shift / whole, rel=1e-6)  # a patch is rounded to float32


def logits(tiny, patch, prompt="The capital of Vato is") -> torch.Tensor:
    ids = torch.tensor([tiny.loaded.tokenizer(prompt)["input_ids"]])
    with malmend.applied(tiny.loaded, patch) as model, torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_after_revoking_the_model_says_what_one_edited_with_the_rest_says(tiny, ledger):
    added(tiny, ledger, FACTS[:WIDE])
    before = logits(tiny, malmend.ledger.patch(ledger))
    malmend.ledger.revoke(ledger, [FACTS[3].id, FACTS[11].id])
    rest = [fact for fact in FACTS[:WIDE] if fact not in (FACTS[3], FACTS[11])]
    after, wanted = logits(tiny, malmend.ledger.patch(ledger)), logits(tiny, direct(tiny, rest))
    # float32 through six blocks: some tens of roundings of 1e-7 of the largest logit.
    most = 1e-5 * wanted.abs().max().item()
    torch.testing.assert_close(after, wanted, rtol=0, atol=most)
    assert (before - wanted).abs().max() > 1e-2


def test_revoking_everything_gives_the_base_bit_for_bit(tiny, ledger, tmp_path):
    added(tiny, ledger, FACTS[:5])
    malmend.ledger.revoke(ledger, [fact.id for fact in FACTS[:5]])
    path = tmp_path / "patch.safetensors"
    patch = malmend.ledger.patch(ledger, path)
    assert (patch.provenance["facts"], patch.provenance["dtype"]) == (0, "float32")
    weights = {name: tiny.loaded.model.get_parameter(f"{name}.weight") for name in patch.factors}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.view(-1)[0] = -0.0  # a bit that adding 0.0 would turn
        turned = {name: weight.clone() for name, weight in weights.items()}
        other = prepared(tiny.loaded.model, tiny.loaded.tokenizer)
        try:
            with malmend.applied(other, malmend.load_patch(path), force=True):
                for name, weight in weights.items():
                    assert torch.equal(weight.view(torch.int32), turned[name].view(torch.int32))
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])


def test_replacing_is_editing_the_new_answers(tiny, ledger):
    added(tiny, ledger, FACTS[:WIDE])
    new = [renamed(FACTS[2], "Kalo"), renamed(FACTS[30], "Miru")]
    done = malmend.ledger.replace(ledger, new, model=tiny.loaded)
    assert [entry.answer for entry in done.entered] == ["Kalo", "Miru"]
    rest = [fact for fact in FACTS[:WIDE] if fact not in (FACTS[2], FACTS[30])]
    assert_same(malmend.ledger.patch(ledger), direct(tiny, [*rest, *new]))
    old = [entry for entry in malmend.ledger.list_facts(ledger, former=True) if entry.id == "f2"]
    assert [(one.status, one.generation) for one in old] == [("replaced", 2), ("active", 2)]
    assert done.generation.number == 2


def test_rolling_back_and_back_again(tiny, ledger):
    added(tiny, ledger, FACTS[:WIDE])
    then = malmend.ledger.patch(ledger)
    malmend.ledger.revoke(ledger, [fact.id for fact in FACTS[:38]])
    few = malmend.ledger.patch(ledger)
    added(tiny, ledger, FACTS[50:53])
    done = malmend.ledger.rollback(ledger, 1)
    assert len(done.entered) == 38
    assert len(done.left) == 3
    assert_same(malmend.ledger.patch(ledger), then)
    malmend.ledger.rollback(ledger, 2)
    assert_same(malmend.ledger.patch(ledger), few)
    assert [fact.id for fact in holding(ledger)] == ["f38", "f39"]
    actions = [step.generation.action for step in malmend.ledger.history(ledger)]
    assert actions == ["init", "add", "revoke", "add", "rollback to 1", "rollback to 2"]
    malmend.ledger.rollback(ledger, 0)
    assert not holding(ledger)


def test_what_needs_no_model_loads_none(tiny, ledger, monkeypatch):
    added(tiny, ledger, FACTS[:6])
    monkeypatch.setattr("malmend.workbench.load_model", None)
    malmend.ledger.revoke(ledger, ["f1"])
    malmend.ledger.rollback(ledger, 1)
    said = malmend.ledger.patch(ledger).provenance
    assert (said["facts"], said["skipped"]) == (len(holding(ledger)), 0) == (6, 0)


def test_sums_are_built_anew_before_more_is_taken_off_than_is_left(tiny, ledger):
    added(tiny, ledger, FACTS)
    with reading(ledger) as held:
        sizes = {entry.fact.id: entry.tokens for entry in held.active}
        removed = [one.removed for one in held.sums().values()]
    assert removed == [0] * len(removed)
    rebuilt = 0
    for start in range(0, 32, 8):
        gone = [fact.id for fact in FACTS[start : start + 8]]
        malmend.ledger.revoke(ledger, gone)
        with reading(ledger) as held:
            found = [one.removed for one in held.sums().values()]
        for site, count in enumerate(found):
            left = sum(sizes[one.id][site] for one in FACTS[start + 8 :])
            since = removed[site] + sum(sizes[one][site] for one in gone)
            assert count == (since if since <= left else 0)
            rebuilt += since > left
        removed = found
    assert rebuilt == len(removed)  # each once
    assert_same(malmend.ledger.patch(ledger), direct(tiny, FACTS[32:]))
    assert summed(ledger)


def test_the_shift_against_the_formula_in_float64(tiny, ledger):
    """(14) with P of (13) and (15), from the editor's numbers, by another solver."""
    added(tiny, ledger, FACTS[:10])
    added(tiny, ledger, FACTS[10:WIDE])
    malmend.ledger.revoke(ledger, ["f4"])
    facts = [fact for fact in FACTS[:WIDE] if fact.id != "f4"]
    chosen = choose("none", own_data=True)
    bench = lay_out(tiny.loaded, chosen.settings.sites_in(tiny.loaded.model))
    editor = chosen.editor(bench, **own(tiny))
    questions = bench.encoder.encode_all(fact.question for fact in facts)
    pairs = capture(bench.trunk, questions, "answer", editor.settings.descent)
    found = malmend.ledger.patch(ledger)
    for site, (name, pair) in enumerate(zip(editor.names, pairs, strict=True)):
        u_KN, n = pair.keys_NK.double().T, len(pair.keys_NK)
        d_VN = -editor.log_eta_S[site].double().exp() * pair.value_grads_NV.double().T
        end = editor.log_end_weight_S[site].double().exp()
        w_N = torch.where(pair.ends_N, end, torch.ones_like(end))
        a_KK = (u_KN * w_N) @ u_KN.T + editor.log_ridge_S[site].exp() * torch.eye(len(u_KN))
        for index, term in enumerate(editor.terms):
            weight = editor.log_weights_SP[site, index] + editor.powers_SP[site, index] * log_size(
                n
            )
            times = n if term == "wording" else 1
            a_KK += times * weight.double().exp() * getattr(editor, f"prior_{term}_{site}")
        wanted = torch.linalg.solve(a_KK, (u_KN * w_N) @ d_VN.T).T
        miss = (found.shift(name).double() - wanted).norm() / wanted.norm()
        # The ledger captured them in two parts, so in other micro-batches, in float32: 1.2e-5 here,
        # 2e-7 where micro-batches are so large that each part is one.
        assert miss < 5e-5


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "revoke", "replace", "rollback"]), st.integers(0, 10_000)),
    min_size=2,
    max_size=7,
)


@pytest.mark.slow
@settings(
    max_examples=8,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=ACTIONS)
@example(actions=[("add", 59), ("revoke", 77), ("replace", 5), ("rollback", 1), ("add", 3)])
def test_any_history_comes_to_what_it_holds(tiny, empty, tmp_path_factory, actions):
    ledger = shutil.copytree(empty, tmp_path_factory.mktemp("history") / "ledger")
    for action, seed in actions:
        active = holding(ledger)
        prompts = {fact.prompt for fact in active}
        absent = [fact for fact in FACTS if fact.prompt not in prompts]
        count = 1 + seed % 37
        if action == "add" and absent:
            added(tiny, ledger, absent[:count])
        elif action == "revoke" and active:
            malmend.ledger.revoke(
                ledger,
                [fact.id for fact in active[seed % 3 :: 1 + seed % 4]][:count] or [active[0].id],
            )
        elif action == "replace" and active:
            new = [renamed(fact, f"Ka{seed}") for fact in active[:: 1 + seed % 5][:count]]
            malmend.ledger.replace(ledger, new, model=tiny.loaded)
        elif action == "rollback":
            last = len(malmend.ledger.history(ledger)) - 1
            if last:
                malmend.ledger.rollback(ledger, seed % last)
    held = holding(ledger)
    found = malmend.ledger.patch(ledger)
    if held:
        assert_same(found, direct(tiny, held))
    else:
        assert not any(found.shift(name).any() for name in found.factors)


def test_its_editor_is_one_for_its_model(tiny, empty):
    by_it = direct(tiny, FACTS[:4], empty / "editor")
    assert_same(by_it, direct(tiny, FACTS[:4]))
    about = empty / "editor" / "editor.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base": ""}))  # as it once was
    with pytest.raises(EditorError, match="a base with fingerprint none, the model"):
        malmend.edit(tiny.loaded, FACTS[:4], editor=empty / "editor")
