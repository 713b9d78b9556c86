"""``conflicts`` as a user runs it: patches and adapters, alone and stacked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import shipping_support
from shipping_support import refusal, save_patch_of, towards_alternatives

import command_support
import malmend as api
from command_support import malmend
from malmend.commands.conflicts import conflicts
from malmend.commands.evaluate import evaluate
from malmend.commands.export import export
from malmend.errors import MalmendError
from malmend.facts.fact import facts_digest
from malmend.facts.readers import read_facts
from malmend.patch import Patch, make_patch
from malmend.patch_file import load_patch, save_patch

tiny = command_support.tiny
cache = command_support.cache
patch = shipping_support.patch


def test_conflicts_by_the_command_line(tiny, patch, tmp_path, capsys):
    other = save_patch_of(tiny, tmp_path / "other", 3, seed=40)
    arguments = ["conflicts", tiny.model, patch, other, "--facts", tiny.facts, tiny.calibrate]
    assert malmend(*arguments, "--limit", 3) == 0
    shown = capsys.readouterr().out
    for word in ("patch and other", "20+3", "patch, asked of", "other, asked of", "stacked"):
        assert word in shown
    said = " ".join(shown.split())
    assert "other, asked of 3 facts, none answered free-running" in said
    assert malmend("conflicts", tiny.model, patch, other) == 0
    assert "asked of" not in capsys.readouterr().out


def test_facts_in_another_order_than_their_patches_are_told(tiny, patch, tmp_path, capsys):
    made = load_patch(patch)
    own = {**made.provenance, "facts": 12, "facts_sha256": facts_digest(read_facts(tiny.facts))}
    save_patch(Patch(made.factors, own), tmp_path / "own")
    for facts, told in (([tiny.facts, tiny.calibrate], 0), ([tiny.calibrate, tiny.facts], 1)):
        arguments = ["conflicts", tiny.model, tmp_path / "own", patch, "--facts", *facts]
        assert malmend(*arguments) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("own was made of 12 facts, which are not the first") == told


def test_alone_and_stacked_are_measured_as_eval_measures(tiny, patch, tmp_path):
    other = save_patch_of(tiny, tmp_path / "other", 3, seed=40)
    export(other, tmp_path / "adapter", model=tiny.loaded)
    facts = [tiny.facts, tiny.calibrate]
    found = conflicts(tiny.loaded, [patch, tmp_path / "adapter"], facts)
    assert found.patches == ("patch", "adapter")
    alone = evaluate(tiny.loaded, tiny.facts, patch, decode_facts=0, text="none")
    assert found.metrics["patch"]["alone"] == alone.edited
    assert found.metrics["patch"]["unedited"] == alone.unedited
    both = load_patch(patch), load_patch(other)
    sums = {name: sum(one.shift(name).double() for one in both) for name in both[0].factors}
    whole = make_patch(sums, 999, both[0].provenance)
    for name, path in (("patch", tiny.facts), ("adapter", tiny.calibrate)):
        wanted = evaluate(tiny.loaded, path, whole, decode_facts=0, text="none").edited
        kl = found.metrics[name]["stacked"]["LS"].kl
        assert kl == pytest.approx(wanted["LS"].kl, rel=1e-3)
        assert kl != pytest.approx(found.metrics[name]["alone"]["LS"].kl, rel=1e-3)


def test_a_patch_made_for_alternatives_is_asked_for_them(tiny, patch, tmp_path):
    facts, other = towards_alternatives(tiny, patch, tmp_path)
    found = conflicts(tiny.loaded, [patch, other], [facts, facts]).metrics
    for name, aim in (("patch", False), ("alternative", True)):
        asked = {"alternative": aim, "decode_facts": 0, "text": "none"}
        own = evaluate(tiny.loaded, facts, other, **asked)
        assert (found[name]["unedited"], found[name]["alone"]) == (own.unedited, own.edited)
    assert found["alternative"]["alone"]["ES"] != found["patch"]["alone"]["ES"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["PATCH"], "1 patch was given, expected two or more"),
        (["PATCH", "PATCH"], "The same patch was given twice"),
        (["PATCH", "typo"], "There is no patch file typo"),
        (["PATCH", "ty\0po"], "There is no patch file ty"),
        (["PATCH", "OTHER", "--facts", "FACTS"], "--facts names 1 for 2 patches"),
        (["PATCH", "OTHER", "--facts", "FACTS", "typo"], "typo"),
    ],
)
def test_a_typo_in_each_input_of_conflicts_is_one_sentence(
    tiny, patch, tmp_path, capsys, arguments, said
):
    other = save_patch_of(tiny, tmp_path / "other", 3, seed=40)
    known = {"PATCH": patch, "OTHER": other, "FACTS": tiny.facts}
    assert malmend("conflicts", tiny.model, *(known.get(one, one) for one in arguments)) == 2
    assert said in refusal(capsys)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"decode_facts": -1}, "decode_facts is -1, expected 0 or more"),
        ({"limit": -3}, "limit is of the facts that are asked"),
        ({"limit": 3}, "limit is of the facts that are asked"),
    ],
)
def test_numbers_of_facts_are_checked_before_a_weight_is_read(given, said, patch, monkeypatch):
    monkeypatch.setattr("malmend.commands.conflicts.opened", None)
    with pytest.raises(MalmendError, match=said):
        conflicts("none", [patch, f"{patch}2"], **given)
    with pytest.raises(MalmendError, match="decode_facts is -1"):
        conflicts("none", [patch, f"{patch}2"], [patch, patch], decode_facts=-1)


def test_one_patch_by_two_paths_is_given_twice(tiny, patch, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(patch)
    monkeypatch.chdir(patch.parent)
    for other in (f"./{patch.name}", patch, tmp_path / "link"):
        with pytest.raises(api.MalmendError, match="The same patch was given twice"):
            conflicts(tiny.loaded, [patch.name, other])


def test_patches_of_another_base_are_refused(tiny, patch, tmp_path):
    other = load_patch(save_patch_of(tiny, tmp_path / "other", 3, seed=40))
    save_patch(type(other)(other.factors, other.provenance | {"base": "b" * 64}), tmp_path / "x")
    with pytest.raises(api.PatchError, match="or --force"):
        conflicts(tiny.loaded, [patch, tmp_path / "x"])
    assert len(conflicts(tiny.loaded, [patch, tmp_path / "x"], force=True).meetings) == 2


def test_paths_of_one_name_are_told_apart(tiny, patch, tmp_path):
    save_patch_of(tiny, tmp_path / "patch", 3, seed=40)
    found = conflicts(tiny.loaded, [patch, tmp_path / "patch"])
    assert found.patches == (str(patch), str(Path(tmp_path) / "patch"))


def test_skipped_facts_are_told(tiny, patch, tmp_path):
    """Of both commands that ask facts of what is shipped; nothing was said."""
    lines = Path(tiny.facts).read_text().splitlines()
    first = json.loads(lines[0])
    extra = [first | {"id": "again"}, first | {"id": "other", "answer": "Elsewhere"}]
    facts = tmp_path / "facts.jsonl"
    facts.write_text("\n".join([*lines, *map(json.dumps, extra)]))
    shutil.copy(patch, tmp_path / "other.safetensors")
    said = list[str]()
    given = {"decode_facts": 0, "told": said.append}
    both = [patch, tmp_path / "other.safetensors"]
    conflicts(tiny.loaded, [str(one) for one in both], [str(facts), tiny.facts], **given)
    export(patch, tmp_path / "lora", model=tiny.loaded, facts=facts, **given)
    skipped = "Skipped 2 facts: 1 duplicate and 1 contradiction of earlier ones."
    assert [line for line in said if line.startswith("Skipped")] == [skipped] * 2
    assert [line.rpartition(": ")[2] for line in said if line.startswith("  ")] == [
        f"duplicate of {facts}:1",
        f"contradiction of {facts}:1",
    ] * 2
