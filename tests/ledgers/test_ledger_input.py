"""What a ledger refuses: facts that do not fit it, files that are not its own, wrong words.

Each in one sentence, and nothing is changed by it.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ledger_support
import pytest
from ledger_support import added, begun
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import command_support
import malmend
from command_support import as_lines, cut_otherwise, files_in, make_facts, save_model
from malmend.commands import ledger_facts
from malmend.editors.checkpoint import load_editor, save_editor
from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.settings import training_free
from malmend.errors import EditorError, FactsError, LedgerError, MalmendError
from malmend.ledgers import sums, tables
from malmend.ledgers.access import reading
from malmend.ledgers.watch import StopRule
from malmend.models.sites import find_sites
from malmend.numerics.moments import RunningMoments

tiny = command_support.tiny
cache = command_support.cache
empty = ledger_support.empty
ledger = ledger_support.filled

FACTS = ledger_support.HELD[:40]


def refused(what, *arguments, **named) -> str:
    """The message, which is one sentence."""
    with pytest.raises(MalmendError) as caught:
        what(*arguments, **named)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.endswith(".")
    return message


# Facts that do not fit


def test_a_fact_that_is_there_is_left_out_and_said_before_any_work(tiny, ledger, monkeypatch):
    monkeypatch.setattr("malmend.workbench.load_model", None)
    lines: list[str] = []
    again = [FACTS[0], dataclasses.replace(FACTS[1], id="other", prompt=f" {FACTS[1].prompt}  ")]
    done = malmend.ledger.add(ledger, again, model=tiny.model, told=lines.append)
    assert done.duplicates == again
    assert not done.entered
    assert done.generation.number == 1
    assert "2 facts (f0, other) already" in lines[0]
    with pytest.raises(FactsError, match="holds it already as 'f0'"):
        malmend.ledger.add(ledger, again, strict=True, model=tiny.model)


def test_characters_that_nobody_sees_are_said_before_any_work(tiny, ledger):
    lines: list[str] = []
    hidden = dataclasses.replace(FACTS[0], id="hidden", prompt=f"{FACTS[0].prompt}\u200b")
    malmend.ledger.add(ledger, [hidden], model=tiny.model, told=lines.append)
    assert lines[0].startswith("1 field holds a character that nobody sees")
    assert lines[1] == "  fact 'hidden': field 'prompt': U+200B, zero width space"


def test_a_contradiction_is_refused_with_what_the_ledger_says(tiny, ledger, monkeypatch):
    monkeypatch.setattr("malmend.workbench.load_model", None)
    wrong = [dataclasses.replace(FACTS[3], id="x", answer="Nene"), FACTS[39]]
    with pytest.raises(FactsError) as caught:
        malmend.ledger.add(ledger, wrong, model=tiny.model)
    [fault] = caught.value.faults
    assert f"'Nene' here and {FACTS[3].answer!r} in the ledger ('f3', generation 1)" in fault
    assert "malmend ledger replace" in fault


def test_an_id_that_is_taken_is_refused(tiny, ledger):
    with pytest.raises(FactsError, match="its id is that of an active fact"):
        malmend.ledger.add(ledger, [dataclasses.replace(FACTS[39], id="f3")], model=tiny.model)
    taken = dataclasses.replace(FACTS[4], id="f3", answer="Nene")
    with pytest.raises(FactsError, match="its id is that of an active fact"):
        malmend.ledger.replace(ledger, [taken], model=tiny.model)


def test_one_id_for_two_facts_is_refused(tiny, ledger):
    two = [FACTS[38], dataclasses.replace(FACTS[39], id="f38")]
    with pytest.raises(FactsError, match="2 facts have the id"):
        malmend.ledger.add(ledger, two, model=tiny.model)
    two = [dataclasses.replace(fact, id="same", answer="Nene") for fact in FACTS[:2]]
    with pytest.raises(FactsError, match="2 facts have the id"):
        malmend.ledger.replace(ledger, two, model=tiny.model)


def test_a_fact_that_comes_back_may_have_its_id_again(tiny, ledger):
    malmend.ledger.revoke(ledger, ["f3"])
    added(tiny, ledger, [FACTS[3]])
    same = [one for one in malmend.ledger.list_facts(ledger, former=True) if one.id == "f3"]
    assert [one.status for one in same] == ["revoked", "active"]


def test_replacing_what_is_not_there_names_the_nearest(tiny, ledger):
    odd = dataclasses.replace(FACTS[3], prompt=FACTS[3].prompt + "s", answer="Nene")
    with pytest.raises(FactsError) as caught:
        malmend.ledger.replace(ledger, [odd], model=tiny.model)
    assert f"did you mean {FACTS[3].prompt!r}" in caught.value.faults[0]
    done = malmend.ledger.replace(ledger, FACTS[3:5], model=tiny.model)
    assert len(done.duplicates) == 2
    assert done.generation.number == 1


def test_unknown_and_revoked_ids(ledger):
    said = refused(malmend.ledger.revoke, ledger, ["f2", "f377", "f377", "zz"])
    assert said == (
        "The ledger holds no active fact 'f377'; did you mean 'f37'? "
        "The ledger holds no active fact 'zz'. Nothing was changed; `malmend ledger list` shows "
        "the facts."
    )
    malmend.ledger.revoke(ledger, ["f2", "f2"])
    assert "revoked in generation 2" in refused(malmend.ledger.revoke, ledger, ["f2"])
    assert "No fact was named" in refused(malmend.ledger.revoke, ledger, [])


def test_a_fact_that_left_by_a_rollback_was_not_revoked(ledger):
    malmend.ledger.rollback(ledger, 0)
    said = {(one.status, one.generation) for one in malmend.ledger.list_facts(ledger, former=True)}
    assert said == {("rolled back", 2)}
    assert "it was rolled back in generation 2." in refused(malmend.ledger.revoke, ledger, ["f2"])
    malmend.ledger.rollback(ledger, 1)
    assert len(malmend.ledger.list_facts(ledger)) == 38


@pytest.mark.parametrize(("number", "what"), [(-1, "0 to 1"), (1, "current one"), (9, "0 to 1")])
def test_generations_that_there_are_not(ledger, number, what):
    assert what in refused(malmend.ledger.rollback, ledger, number)


def test_authors(ledger):
    for author in ("", " ", "a\nb"):
        assert "author" in refused(malmend.ledger.revoke, ledger, ["f1"], author=author)
    malmend.ledger.revoke(ledger, ["f1"], author=" Ann B ")
    assert malmend.ledger.history(ledger)[-1].generation.author == "Ann B"


# Beginning


def test_a_ledger_begins_in_an_empty_folder(tiny, ledger, tmp_path):
    begin = malmend.ledger.init
    assert "holds a ledger already" in refused(begin, ledger, tiny.loaded)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(begin, tmp_path / "file", tiny.loaded)
    assert "no folder" in refused(begin, tmp_path / "no" / "where", tiny.loaded)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("x")
    assert "it holds thing" in refused(begin, tmp_path / "full", tiny.loaded)


def test_an_init_that_was_killed_is_done_again(tiny, tmp_path):
    folder = tmp_path / "ledger"
    (folder / "editor").mkdir(parents=True)
    (folder / "editor" / "editor.json").write_text("{")
    (folder / "ledger.sqlite").write_text("")
    assert "did not finish" in refused(malmend.ledger.history, folder)
    begun(tiny, folder)
    assert len(malmend.ledger.history(folder)) == 1


def test_an_init_that_was_killed_while_it_wrote_its_tables(tiny, tmp_path):
    """SQLite has begun to write then, and left the journal that takes it back."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    other = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)
    other.execute("PRAGMA cache_size = 1")
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE about (name TEXT, value TEXT)")
    other.executemany("INSERT INTO about VALUES (?, ?)", [("x" * 3000, "y")] * 50)  # spills
    killed = shutil.copytree(folder, tmp_path / "killed")
    other.close()
    assert (killed / "ledger.sqlite").stat().st_size
    assert (killed / "ledger.sqlite-journal").stat().st_size
    begun(tiny, killed)
    assert len(malmend.ledger.history(killed)) == 1


@pytest.mark.parametrize("method", ["mend", "memit", "ft", "lora", "ultraedit", "enn", "ke", "mm"])
def test_methods_that_do_not_add_up(tiny, tmp_path, method):
    message = refused(malmend.ledger.init, tmp_path / "ledger", tiny.loaded, method=method)
    assert f"by the method {method}: " in message
    assert not (tmp_path / "ledger").exists()


def test_an_editor_that_sums_is_refused(tiny, tmp_path):
    shapes = {one.name: one.shape_VK for one in find_sites(tiny.loaded.model)}
    still = {
        name: SiteStatistics(RunningMoments(key), RunningMoments(value))
        for name, (value, key) in shapes.items()
    }
    save_editor(
        Editor(training_free("mend"), shapes, still),
        {"base": tiny.loaded.fingerprint},
        tmp_path / "editor",
    )
    begin = malmend.ledger.init
    message = refused(begin, tmp_path / "ledger", tiny.loaded, editor=tmp_path / "editor")
    assert "it sums shifts" in message
    settings = training_free("mend")
    with pytest.raises(EditorError, match="it sums shifts"):
        begin(tmp_path / "ledger", tiny.loaded, settings=settings)


@pytest.mark.parametrize("rule", [{"retention": 1.1}, {"retention": -0.1}, {"questions": -1}])
def test_rules_that_make_no_sense(rule):
    assert next(iter(rule)) in refused(StopRule, **rule)


# Another model


@pytest.mark.parametrize("rule", [{"retention": 0.5}, {"retension": 0.5}, 0.5, None])
def test_a_rule_that_is_none_makes_no_ledger(tiny, tmp_path, rule):
    said = refused(malmend.ledger.init, tmp_path / "new", tiny.loaded, rule=rule)
    assert "rule is " in said
    assert "StopRule" in said
    assert not (tmp_path / "new").exists()


def test_a_share_that_is_none_is_no_rule():
    for share in ("0.5", None, True, float("nan")):
        with pytest.raises(MalmendError, match=r"retention is .*, expected "):
            StopRule(retention=share)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a disk that takes no file is Linux's")
@pytest.mark.parametrize("place", ["/proc/ledger", "/proc/self/task"])
def test_a_disk_that_takes_no_file_is_said_before_the_work(tiny, cache, monkeypatch, place):
    monkeypatch.setattr("malmend.workbench.load_model", None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])  # an empty one
    assert "cannot be written" in refused(malmend.ledger.init, place, tiny.model)


def test_a_ledger_that_takes_no_file_is_told_before_the_work(tiny, ledger, monkeypatch):
    """Facts were solved first, and then another path was asked for."""

    def full(self, *_mode, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    monkeypatch.setattr(ledger_facts, "_bench", None)
    with pytest.raises(LedgerError, match=r"takes no file, so nothing was changed; make room"):
        added(tiny, ledger, make_facts(1, seed=9))


def test_another_model_is_refused(tiny, ledger, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    message = refused(malmend.ledger.add, ledger, FACTS[38:], model=other)
    assert "give that one with --model" in message
    assert "fingerprint" in refused(malmend.ledger.verify, ledger, model=other)
    half = malmend.load_model(tiny.model, "bfloat16")
    assert "in bfloat16" in refused(malmend.ledger.add, ledger, FACTS[38:], model=half)


# Files that are not whole


def actions(ledger):
    """Everything that opens a ledger."""
    return [
        lambda: malmend.ledger.list_facts(ledger),
        lambda: malmend.ledger.patch(ledger),
        lambda: malmend.ledger.revoke(ledger, ["f1"]),
    ]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_truncated_tables(ledger, share):
    path = ledger / "ledger.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    for action in actions(ledger):
        assert "damaged" in refused(action)


def test_every_page_of_the_tables_is_checked(ledger):
    path = ledger / "ledger.sqlite"
    whole = path.read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    assert len(whole) > 4 * size
    for start in range(size, len(whole), size):
        path.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
        assert "damaged" in refused(malmend.ledger.list_facts, ledger)


def test_no_ledger_and_other_files(ledger, tmp_path):
    assert "no ledger.sqlite" in refused(malmend.ledger.list_facts, tmp_path / "none")
    (ledger / "ledger.sqlite").write_bytes(b"SQLite format 3\0" + b"\1" * 4000)
    assert "damaged" in refused(malmend.ledger.list_facts, ledger)
    (ledger / "ledger.sqlite").write_text("no tables at all, but some text that is long enough")
    assert "damaged" in refused(malmend.ledger.list_facts, ledger)


HOSTILE = {
    "another program": "PRAGMA application_id = 7",
    "a newer format": "PRAGMA user_version = 9",
    "no facts": "DROP TABLE facts",
    "another table of facts": "DROP TABLE facts; CREATE TABLE facts (number, id)",
    "no text": "UPDATE facts SET prompt = x'ff00'",
    "no UTF-8": "UPDATE facts SET prompt = CAST(x'fffe' AS TEXT)",
    "another status": "UPDATE facts SET status = 'asleep'",
    "a fact made active": "UPDATE facts SET status = 'revoked' WHERE number = 3",
    "a fact gone": "DELETE FROM facts WHERE number = 3",
    "tokens": "UPDATE facts SET tokens = '[1, 2]'",
    "tokens as text": "UPDATE facts SET tokens = 'x'",
    "tokens as objects": "UPDATE facts SET tokens = '[{}, [], 1, 1, 1, 1]'",
    "a negative place": "UPDATE facts SET place = -1",
    "a path outside": "UPDATE facts SET rows = '../../rows-0123456789ab.safetensors'",
    "an absolute path": "UPDATE facts SET rows = '/tmp/rows-0123456789ab.safetensors'",
    "sums outside": "UPDATE generations SET sums = '../sums-0123456789ab.safetensors'",
    "sums as a number": "UPDATE generations SET sums = 3",
    "a norm as text": "UPDATE generations SET norm = 'x'",
    "a generation gone": "DELETE FROM generations WHERE number = 0",
    "no generations": "DELETE FROM generations",
    "no rule": "DELETE FROM about WHERE name = 'rule'",
    "another rule": "UPDATE about SET value = '{\"a\": 1}' WHERE name = 'rule'",
    "a rule as a list": "UPDATE about SET value = '[]' WHERE name = 'rule'",
    "no JSON": "UPDATE about SET value = '{' WHERE name = 'model'",
    "no model": "UPDATE about SET value = '3' WHERE name = 'model'",
    "a weight of 0": "UPDATE about SET value = '0' WHERE name = 'weight_norm'",
    "a weight as text": "UPDATE about SET value = '\"x\"' WHERE name = 'weight_norm'",
    "an infinite norm": "UPDATE generations SET norm = 9e999 WHERE number = 1",
    "a norm below 0": "UPDATE generations SET norm = -1 WHERE number = 1",
    "a share of -5": "UPDATE generations SET retention = -5 WHERE number = 1",
    "one id twice": "UPDATE facts SET id = 'f0' WHERE id = 'f1'",
    "something more": "INSERT INTO about VALUES ('more', '1')",
    "changes": "DELETE FROM changes WHERE fact = 1",
}


@pytest.mark.parametrize("statements", HOSTILE.values(), ids=HOSTILE)
def test_tables_that_malmend_did_not_write(ledger, statements):
    db = sqlite3.connect(ledger / "ledger.sqlite")
    db.executescript(statements)
    db.close()
    for action in actions(ledger):
        assert "ledger" in refused(action)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_generation_that_kept_nothing_or_all_is_read(ledger, share):
    with sqlite3.connect(ledger / "ledger.sqlite") as db:
        db.execute("UPDATE generations SET retention = ? WHERE number = 1", (share,))
    assert malmend.ledger.history(ledger)[1].generation.retention == share


def spoil(path, name, change):
    """Writes the file with a tensor changed, and without digests, as an earlier version."""
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    header = {key: one for key, one in _header(path).items() if key == "malmend"}
    save_file({key: one.contiguous() for key, one in tensors.items()}, path, header)


def _header(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


def with_nan(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


SPOILT = {
    "gram of another shape": ("sums", "gram", lambda one: one[:5]),
    "gram in float32": ("sums", "gram", lambda one: one.float()),
    "NaN in the gram": ("sums", "gram", with_nan),
    "infinity in cross": ("sums", "cross", lambda one: one / 0),
    "keys of another shape": ("rows", "keys", lambda one: one[:, :5]),
    "fewer keys": ("rows", "keys", lambda one: one[:5]),
    "NaN in the keys": ("rows", "keys", with_nan),
    "NaN in the differences": ("rows", "diffs", with_nan),
    "integers": ("rows", "diffs", lambda one: one.int()),
    "weights of two dimensions": ("rows", "weights", lambda one: one[:, None]),
    "starts that go back": ("rows", "starts", lambda one: -one),
    "no starts": ("rows", "starts", lambda one: one[:1]),
    "starts of others": ("rows", "starts", lambda one: one[[0, 2, *range(2, len(one))]]),
}


@pytest.mark.parametrize(("kind", "part", "change"), SPOILT.values(), ids=SPOILT)
def test_tensors_that_malmend_did_not_write(tiny, ledger, kind, part, change):
    [path] = ledger.glob(f"{kind}-*")
    name = find_sites(tiny.loaded.model)[0].name
    spoil(path, f"{name}.{part}", change)
    assert "damaged" in refused(malmend.ledger.revoke, ledger, ["f0"])
    assert len(malmend.ledger.list_facts(ledger)) == 38


@pytest.mark.parametrize("kind", ["sums", "rows"])
@pytest.mark.parametrize("part", [0.5, 0.99])
def test_a_bit_that_flipped_in_the_numbers(ledger, kind, part):
    """Which stay finite: the shift was then another, and nothing was said."""
    [path] = ledger.glob(f"{kind}-*")
    whole = bytearray(path.read_bytes())
    whole[int(part * len(whole))] ^= 1
    path.write_bytes(whole)
    assert "not what was written); put back" in refused(malmend.ledger.revoke, ledger, ["f0"])


def test_a_ledger_without_digests_is_read(ledger):
    for path in ledger.glob("*.safetensors"):
        names = load_file(path).keys()
        assert _header(path).keys() - {"malmend"} == names
        spoil(path, next(iter(names)), lambda one: one)
        assert not (_header(path) or {}).keys() - {"malmend"}
    assert malmend.ledger.revoke(ledger, ["f0"]).generation.facts == 37


@pytest.mark.parametrize("kind", ["sums", "rows", "editor/editor"])
def test_files_that_are_gone_cut_or_text(ledger, kind):
    [path] = ledger.glob(f"{kind}-*")
    whole = path.read_bytes()
    for content in (None, whole[: len(whole) // 2], b"", b"text" * 100):
        path.unlink() if content is None else path.write_bytes(content)
        assert str(ledger) in refused(malmend.ledger.revoke, ledger, ["f0"])


def test_another_editor_in_the_folder(ledger):
    saved = load_editor(ledger / "editor")
    saved.editor.log_eta_S.data += 1
    save_editor(saved.editor, saved.about, ledger / "editor")
    assert "not the editor" in refused(malmend.ledger.patch, ledger)


# On the command line


def test_typos_on_the_command_line(ledger, tiny, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(as_lines(FACTS[38:]))

    def said(*arguments) -> str:
        assert command_support.malmend("ledger", *arguments) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "did you mean 'revoke'" in said("revok", ledger, "f1")
    assert "did you mean '--author'" in said("revoke", ledger, "f1", "--auhtor", "x")
    assert "GENERATION must be given" in said("rollback", ledger)
    assert "expected a whole number" in said("rollback", ledger, "first")
    assert "no such file" in said("add", ledger, tmp_path / "fact.jsonl")
    assert "no ledger in" in said("list", tmp_path / "ledgr")
    assert "no folder" in said("patch", ledger, "--out", tmp_path / "no" / "patch")
    assert "by the method memit" in said("init", tmp_path / "new", tiny.model, "--method", "memit")
    assert "rule.retention" in said("init", tmp_path / "new", tiny.model, "--rule.retention", 7)


def test_the_whole_way_on_the_command_line(ledger, tiny, tmp_path, capsys):
    facts, out = tmp_path / "facts.jsonl", tmp_path / "patch.safetensors"
    facts.write_text(as_lines(FACTS[36:]))

    def run(*arguments) -> str:
        assert command_support.malmend("ledger", *arguments) == 0
        return capsys.readouterr().out

    assert "2 facts came (f38, f39); 40 facts now" in run("add", ledger, facts, "--author", "Ann")
    assert "Nothing changed" in run("add", ledger, facts)
    assert "2 facts went (f1, f2)" in run("revoke", ledger, "f1", "f2")
    assert "rollback to 2" not in run("history", ledger)
    assert "2 facts came (f1, f2)" in run("rollback", ledger, 2)
    assert "rollback to 2" in run("history", ledger)
    again = shutil.copytree(ledger, tmp_path / "again")
    assert "The same facts as before: generation 5, 40 facts." in run("rollback", again, 2)
    listed = run("list", ledger, "--out", tmp_path / "held.jsonl")
    assert "f38  " in listed
    assert "active since generation 2; Ann" in listed
    assert len(malmend.read_facts(tmp_path / "held.jsonl")) == 40
    assert "Patch of generation 4, 40 facts" in run("patch", ledger, "--out", out)
    assert malmend.load_patch(out).provenance["generation"] == 4
    assert command_support.malmend("ledger", "verify", ledger) == 3  # a random model holds little
    assert "should give" in capsys.readouterr().out
    assert not {name for name in files_in(ledger) if name.endswith(".part")}


# What lies in the folder already


@pytest.mark.parametrize("write", ["list", "patch"])
def test_a_ledgers_own_file_is_never_written_over(ledger, write):
    before = (ledger / "ledger.sqlite").read_bytes()
    assert command_support.malmend("ledger", write, ledger, "--out", ledger / "ledger.sqlite") == 2
    assert (ledger / "ledger.sqlite").read_bytes() == before


@pytest.mark.parametrize("name", ["new", "rows-x.safetensors", "editor/p.safetensors"])
def test_nothing_is_written_into_a_ledger(ledger, name):
    before = files_in(ledger)
    for write in ("list", "patch"):
        assert command_support.malmend("ledger", write, ledger, "--out", ledger / name) == 2
    assert files_in(ledger) == before


def test_a_folder_that_holds_an_editor_is_not_taken_for_a_ledger_that_was_killed(tiny, tmp_path):
    folder = tmp_path / "work"
    (folder / "editor").mkdir(parents=True)
    (folder / "editor" / "editor.json").write_text("a trained one")
    said = refused(malmend.ledger.init, folder, tiny.loaded)
    assert "is not empty (it holds editor)" in said
    assert (folder / "editor" / "editor.json").read_text() == "a trained one"


def test_one_id_is_one_fact(tiny, empty):
    facts = [
        dataclasses.replace(fact, id=one)
        for fact, one in zip(FACTS, ("1", "2", "12"), strict=False)
    ]
    malmend.ledger.add(empty, facts, model=tiny.model)
    assert [one.id for one in malmend.ledger.revoke(empty, "12").left] == ["12"]
    assert [one.id for one in malmend.ledger.list_facts(empty)] == ["1", "2"]


def test_former_facts_are_not_written_as_facts_to_add(ledger, tmp_path, capsys):
    out = tmp_path / "facts.jsonl"
    assert command_support.malmend("ledger", "list", ledger, "--former", "--out", out) == 2
    assert "leave --former out" in capsys.readouterr().err
    assert not out.exists()


def test_more_general_questions_than_no_prior_reads_are_refused():
    with pytest.raises(MalmendError, match="expected 0 to 200"):
        StopRule(questions=201)


# Another model of the same fingerprint


def saved_as(folder, model, tokenizer, **changes):
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_of_another_configuration_is_refused(tiny, empty, tmp_path):
    model = copy.deepcopy(tiny.loaded.model)
    other = saved_as(tmp_path / "m", model, tiny.loaded.tokenizer, rms_norm_eps=0.5)
    said = refused(malmend.ledger.add, empty, FACTS[:2], model=other)
    assert "has another rms_norm_eps in its configuration" in said


def test_another_tokenizer_is_refused(tiny, empty, tmp_path):
    """Facts were added by it, and none of the ledger's held any more."""
    folder = Path(saved_as(tmp_path / "m", tiny.loaded.model, tiny.loaded.tokenizer))
    malmend.ledger.add(empty, FACTS[:2], model=str(folder))
    cut_otherwise(folder)
    said = refused(malmend.ledger.add, empty, FACTS[2:4], model=str(folder))
    assert "has another tokenizer, so that facts read by it would not add up" in said
    with sqlite3.connect(empty / "ledger.sqlite") as db:  # as an older version left it
        db.execute("DELETE FROM about WHERE name = 'tokenizer'")
    assert malmend.ledger.add(empty, FACTS[2:4], model=str(folder)).generation.number == 2


def test_weights_that_were_rounded_are_refused(tiny, empty, tmp_path):
    model = copy.deepcopy(tiny.loaded.model)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    other = saved_as(tmp_path / "m", model, tiny.loaded.tokenizer)
    said = refused(malmend.ledger.add, empty, FACTS[:2], model=other)
    assert "has weights that differ below bfloat16" in said
    assert malmend.ledger.add(empty, FACTS[:2], model=tiny.model).generation.number == 1


# A reader beside the writer


def test_a_writer_whose_work_is_done_waits_for_a_reader(tiny, empty, monkeypatch):
    """However short the time that it waits for other writers."""
    begun_to_read, committing = threading.Event(), threading.Event()
    connected = tables._connected

    def heard(*given):
        db = connected(*given)
        db.set_trace_callback(lambda said: committing.set() if said == "COMMIT" else None)
        return db

    def read():
        with reading(empty):
            begun_to_read.set()
            assert committing.wait(600)  # for the work, of whatever length
            time.sleep(0.2)  # then the writer has tried: it would have given up at once

    monkeypatch.setattr(tables, "_connected", heard)
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        assert begun_to_read.wait(60)
        try:
            change = malmend.ledger.add(empty, FACTS[:2], model=tiny.model, wait=0.0)
        finally:
            committing.set()
        reader.result()
    assert change.generation.number == 1


def test_work_that_cannot_be_committed_is_swept_by_the_next(tiny, empty, monkeypatch):
    """An interrupted commit may have succeeded, so nothing is removed at once."""
    monkeypatch.setattr(tables, "READERS", 0.1)
    with reading(empty), ThreadPoolExecutor() as pool:
        failed = pool.submit(malmend.ledger.add, empty, FACTS[:2], model=tiny.model, wait=0.1)
        assert "is being written by another process" in str(failed.exception())
    assert not malmend.ledger.list_facts(empty)
    malmend.ledger.add(empty, FACTS[2:4], model=tiny.model)
    assert len([name for name in files_in(empty) if name.startswith("rows-")]) == 1


def test_a_folder_whose_name_is_no_utf8(tiny, empty, tmp_path):
    """Which Latin-1 is not; SQLite reads such a path, safetensors does not."""
    with pytest.raises(LedgerError, match="There is no ledger in"):
        malmend.ledger.list_facts(tmp_path / os.fsdecode(b"\xff"))
    folder = shutil.copytree(empty, tmp_path / os.fsdecode(b"k\xf6nig"))
    assert "is not valid UTF-8" in refused(malmend.ledger.list_facts, folder)
    out = tmp_path / os.fsdecode(b"\xfcber")
    assert "is no UTF-8, expected" in refused(malmend.ledger.patch, empty, out)
    assert "is no UTF-8, expected" in refused(malmend.ledger.init, out, tiny.loaded)


def test_facts_from_a_file_whose_name_is_no_utf8(tiny, empty, tmp_path):
    """SQLite holds only text; the name is kept as far as it is some."""
    facts = tmp_path / os.fsdecode(b"k\xf6nig.jsonl")
    facts.write_text(as_lines(FACTS[:1]))
    malmend.ledger.add(empty, facts, model=tiny.loaded)
    (held,) = malmend.ledger.list_facts(empty)
    assert held.source == str(tmp_path / "k?nig.jsonl")


@pytest.mark.parametrize("wound", ["no editor.json", "half of one", "no weights", "no folder"])
def test_an_editor_that_was_spoilt_is_put_back_and_not_trained(ledger, wound):
    """It is a copy, and any other would be refused."""
    place = ledger / "editor"
    said, weights = place / "editor.json", next(place.glob("*.safetensors"))
    if wound == "half of one":
        said.write_text(said.read_text()[:40])
    elif wound == "no folder":
        shutil.rmtree(place)
    else:
        (said if wound == "no editor.json" else weights).unlink()
    message = refused(malmend.ledger.list_facts, ledger)
    assert message.endswith("; put back a copy of the ledger's folder.")
    assert "train" not in message


@pytest.mark.parametrize("kind", ["rows", "sums"])
def test_a_disk_that_is_full_in_the_end_is_told_in_the_ledgers_words(
    tiny, ledger, monkeypatch, kind
):
    """Its path is the ledger's own, so that another one cannot be given."""
    before = files_in(ledger)

    def full(tensors, path, header):
        if kind in path.name:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save_file(tensors, path, header)

    monkeypatch.setattr(sums, "save_file", full)
    with pytest.raises(LedgerError) as caught:
        added(tiny, ledger, FACTS[38:])
    assert str(caught.value).endswith(
        "cannot be written (I/O error: No space left on device (os error 28)), so nothing was "
        "changed; make room, or check who may write there, and run it again."
    )
    assert files_in(ledger) == before
    monkeypatch.undo()
    assert malmend.ledger.list_facts(ledger)
