"""Methods that are trained, from the command that trains them to the patch that they make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import command_support
import malmend
from command_support import malmend as command
from helpers import weights_of
from malmend.commands.learn import learn
from malmend.editors import folder as editor_folder
from malmend.editors.folder import identity_of
from malmend.errors import MalmendError
from malmend.methods.lora import Lora
from malmend.methods.trained import TRAINED, trained_method
from malmend.patch_file import load_patch

tiny = command_support.tiny
cache = command_support.cache
# Bits are compared, and activations that another test left were rounded in other batches.
pytestmark = pytest.mark.usefixtures("own_cache")

QUICK = {
    "enn": {"steps": 3, "layers": 1, "inner_steps": 1, "save_every": 2, "rate": 1e-3},
    "ke": {"steps": 3, "layers": 1, "hidden": 4, "facts_per_step": 2, "save_every": 2},
}
ALL = pytest.mark.parametrize("name", TRAINED)


def options(name: str, **changes: object) -> list[object]:
    given = QUICK[name] | changes
    return [one for key, value in given.items() for one in (f"--{name}.{key}", value)]


def test_every_one_is_tried_here():
    assert set(QUICK) == set(TRAINED)


@ALL
def test_trained_and_used_like_an_editor(name, tiny, tmp_path, capsys):
    folder, patch = tmp_path / "editor", tmp_path / "patch.safetensors"
    train = ["train", tiny.model, tiny.facts, "--out", folder, "--method", name]
    assert command(*train, *options(name)) == 0
    said = capsys.readouterr().err
    assert f"Trained 3 steps of {name}." in said
    assert "step    3/3  loss " in said
    assert command(*train, *options(name)) == 0
    assert "Trained already: 3 steps were taken" in capsys.readouterr().err
    assert command("edit", tiny.model, tiny.facts, "--editor", folder, "--out", patch) == 0
    assert f"Method: {name}." in capsys.readouterr().err
    made = load_patch(patch)
    assert made.provenance["method"] == name
    assert made.provenance["settings"]["layers"] == 1
    assert any(made.shift(site).any() for site in made.factors)
    assert command("eval", tiny.model, tiny.facts, "--patch", patch, "--text", "none") == 0


@ALL
def test_a_stopped_training_goes_on_bit_for_bit(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path / "whole", name, settings)
    seen = []

    def stop(record) -> None:
        seen.append(record.step)
        if record.step == 3 and len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tiny.loaded, tiny.facts, tmp_path / "parts", name, settings, stepped=stop)
    rest = learn(tiny.loaded, tiny.facts, tmp_path / "parts", name, settings)
    assert [record.step for record in rest.records] == [3]  # from the checkpoint after two
    patches = [
        malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / part).patch
        for part in ("whole", "parts")
    ]
    for site in patches[0].factors:
        assert torch.equal(patches[0].shift(site), patches[1].shift(site))


@ALL
def test_what_misleads_in_its_facts_is_told(name, tiny, tmp_path, capsys):
    """Only the training of an editor said so."""
    rows = [json.loads(line) for line in Path(tiny.facts).read_text().splitlines()]
    rows[0]["unrelated"] = [{"prompt": rows[1]["prompt"], "answer": "Lima"}]
    rows[2]["answer"] = "Ka\u200blo"
    path, out = tmp_path / "facts.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", tiny.model, path, "--out", out, "--method", name]
    assert command(*train, *options(name)) == 0
    shown = capsys.readouterr()
    assert "U+200B, zero width space" in shown.err
    assert "1 question beside facts is edited or answered otherwise too; the first:" in shown.out


@ALL
def test_its_folder_is_read_once(name, tiny, tmp_path, monkeypatch):
    learn(tiny.loaded, tiny.facts, tmp_path, name, TRAINED[name].settings(**QUICK[name]))
    read, load = [], editor_folder.load_file
    monkeypatch.setattr(editor_folder, "load_file", lambda path: read.append(path) or load(path))
    malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path)
    assert len(read) == 1


def test_which_folders_hold_one(tmp_path):
    assert trained_method("auto") is None
    assert trained_method(tmp_path) is None
    for content in ("{", "[]", '{"method": 3}', '{"method": "malmen"}'):
        (tmp_path / "editor.json").write_text(content)
        assert trained_method(tmp_path) is None
    (tmp_path / "editor.json").write_text(json.dumps({"method": "enn"}))
    assert trained_method(tmp_path).name == "enn"


def test_options_that_do_not_suit(tiny, tmp_path, capsys):
    train = ["train", tiny.model, tiny.facts, "--out", tmp_path / "e"]
    assert command(*train, "--method", "enn", "--halvings", 1) == 2
    assert "--halvings is of editors, and the method is enn" in capsys.readouterr().err
    assert command(*train, "--ke.hidden", 3) == 2
    assert "--ke.* are settings of the method ke, and the method is malmen" in (
        capsys.readouterr().err
    )
    assert command(*train, "--method", "ke", "--ke.hidden", 0) == 2
    assert "ke.hidden is 0" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    with pytest.raises(MalmendError, match="'ft' is not trained, expected one of enn, ke"):
        learn(tiny.loaded, tiny.facts, tmp_path / "e", "ft")


@ALL
def test_a_folder_of_another_kind(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    (tmp_path / "editor.json").write_text("{}")
    with pytest.raises(MalmendError, match="holds an editor without what resuming needs"):
        learn(tiny.loaded, tiny.facts, tmp_path, name, settings)


@ALL
def test_a_run_that_lost_its_last_file_is_whole_again(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path / "e", name, settings)
    wanted = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "e").patch
    (tmp_path / "e" / "editor.json").unlink()  # killed between the two
    done = learn(tiny.loaded, tiny.facts, tmp_path / "e", name, settings)
    assert done.records == ()
    found = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "e").patch
    assert all(torch.equal(found.shift(site), wanted.shift(site)) for site in wanted.factors)


@ALL
def test_a_run_killed_between_its_files_leaves_the_editor_of_before(
    name, tiny, tmp_path, monkeypatch
):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path, name, settings)
    wanted = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path).patch
    write = Path.write_text

    def killed(path: Path, *given: object, **more: object) -> int:
        if path.name.startswith(".editor.json"):
            raise KeyboardInterrupt
        return write(path, *given, **more)

    monkeypatch.setattr(Path, "write_text", killed)
    longer = replace(settings, steps=settings.steps + 1)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny.loaded, tiny.facts, tmp_path, name, longer)
    monkeypatch.undo()
    found = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path).patch
    assert found.provenance["editor_id"] == wanted.provenance["editor_id"]
    assert all(torch.equal(found.shift(site), wanted.shift(site)) for site in wanted.factors)
    learn(tiny.loaded, tiny.facts, tmp_path, name, longer)
    assert malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path).patch.provenance[
        "editor_id"
    ] == identity_of(weights_of(tmp_path))


@ALL
def test_weights_of_another_writing_are_refused(name, tiny, tmp_path):
    """Also under the name of earlier versions, which was always the same."""
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path / "e", name, settings)
    wanted = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "e").patch
    about, older = tmp_path / "e" / "editor.json", tmp_path / "e" / "editor.safetensors"
    weights_of(tmp_path / "e").rename(older)
    about.write_text(json.dumps(json.loads(about.read_text()) | {"weights": older.name}))
    found = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "e").patch
    assert all(torch.equal(found.shift(site), wanted.shift(site)) for site in wanted.factors)
    learn(tiny.loaded, tiny.facts, tmp_path / "f", name, replace(settings, seed=1))
    older.write_bytes(weights_of(tmp_path / "f").read_bytes())
    with pytest.raises(MalmendError, match="its weights are not those that it names"):
        malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "e")


@ALL
def test_a_run_goes_on_in_the_numbers_that_it_was_on(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path, name, settings)
    longer, told = replace(settings, steps=settings.steps + 1), list[str]()
    with pytest.raises(MalmendError, match=r"on other numbers \(dtype\); give the same"):
        learn(str(tiny.model), tiny.facts, tmp_path, name, longer, dtype="bfloat16")
    path = tmp_path / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    about |= {"threads": 99, "device": "cuda:0"}
    save_file(load_file(path), path, {"training": json.dumps(about)})
    learn(tiny.loaded, tiny.facts, tmp_path, name, longer, told=told.append)
    assert ["used 99 threads" in told[0], "on cuda:0" in told[1], len(told)] == [True, True, 2]


@ALL
def test_where_facts_stand_in_their_file_keeps_no_run_from_going_on(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path / "e", name, settings)
    moved = tmp_path / "facts.jsonl"
    moved.write_text("\n" + Path(tiny.facts).read_text())
    longer = replace(settings, steps=settings.steps + 1)
    done = learn(tiny.loaded, moved, tmp_path / "e", name, longer)
    assert [record.step for record in done.records] == [longer.steps]
    path = tmp_path / "e" / "training.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["training"])
    del about["facts_sha256"]
    save_file(load_file(path), path, {"training": json.dumps(about)})
    with pytest.raises(MalmendError, match=r"on other facts; .* or another --out"):
        learn(tiny.loaded, moved, tmp_path / "e", name, longer)


@ALL
def test_other_facts_fewer_steps_and_another_method_are_refused(name, tiny, tmp_path):
    settings = TRAINED[name].settings(**QUICK[name])
    learn(tiny.loaded, tiny.facts, tmp_path / "e", name, settings)
    with pytest.raises(MalmendError, match="in training on other facts"):
        learn(tiny.loaded, tiny.calibrate, tmp_path / "e", name, settings)
    fewer = TRAINED[name].settings(**(QUICK[name] | {"steps": 2}))
    with pytest.raises(MalmendError, match="was trained for 3 steps, 2 are asked for"):
        learn(tiny.loaded, tiny.facts, tmp_path / "e", name, fewer)
    (other,) = set(TRAINED) - {name}
    with pytest.raises(MalmendError, match=f"holds a trained {name}, not {other}"):
        learn(tiny.loaded, tiny.facts, tmp_path / "e", other, TRAINED[other].settings(steps=1))


@ALL
def test_inspect_knows_them(name, tiny, tmp_path, capsys):
    learn(tiny.loaded, tiny.facts, tmp_path, name, TRAINED[name].settings(**QUICK[name]))
    assert command("inspect", tmp_path) == 0
    assert f"method: {name}" in capsys.readouterr().out
    weights_of(tmp_path).write_bytes(b"half")
    assert command("inspect", tmp_path) == 2
    assert "damaged" in capsys.readouterr().err


def test_the_words_auto_and_none_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("auto", "none"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "editor.json").write_text('{"method": "ke"}')
        assert trained_method(word) is None
        assert trained_method(tmp_path / word).name == "ke"


def test_seeds_of_many_digits():
    for kind in (TRAINED["ke"].settings, Lora):
        with pytest.raises(MalmendError, match="seed is 1"):
            kind(seed=10**20)
