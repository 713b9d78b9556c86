"""The cache folder is said, cleared, and made again."""

from __future__ import annotations

import pytest

import command_support
import malmend
from command_support import make_facts
from command_support import malmend as command
from malmend.files import part_of

tiny = command_support.tiny


@pytest.mark.slow
def test_what_is_kept_is_counted_and_cleared_and_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))  # the others' would be counted too
    facts = make_facts(3)
    given = {"calibrate": tiny.calibrate, "text": tiny.text}
    given |= {"calibration": command_support.CALIBRATION}
    first = malmend.edit(tiny.loaded, facts, **given).patch
    held = {one.kind: one for one in malmend.cache().kinds}
    assert held["trunk"].entries == held["calibrations"].entries == 1
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert sum(one.size for one in held.values()) == on_disk > 0
    assert malmend.cache(clear=True).cleared
    assert not any(one.entries for one in malmend.cache().kinds)
    again = malmend.edit(tiny.loaded, facts, **given).patch
    assert first.factors.keys() == again.factors.keys()
    assert malmend.cache().kinds[0].entries == 1


def test_what_else_lies_in_the_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    other = tmp_path / "mine" / "thesis.txt"
    other.parent.mkdir(parents=True)
    other.write_text("years of work")
    (tmp_path / "trunk").mkdir()
    malmend.cache(clear=True)
    assert not (tmp_path / "trunk").exists()
    assert other.read_text() == "years of work"


def test_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    (tmp_path / "calibrations").mkdir()
    (tmp_path / "calibrations" / "one.safetensors").write_bytes(bytes(2_500_000))
    assert command("cache") == 0
    assert "2.5" in capsys.readouterr().out
    assert command("cache", "--clear", "true") == 0
    assert "removed" in capsys.readouterr().out
    assert not (tmp_path / "calibrations").exists()
    assert command("cache", "--claer", "true") == 2
    assert "claer" in capsys.readouterr().err


def test_stale_copies_are_named_with_what_clears_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    old = tmp_path / "models" / "model.Q4-0123456789ab"
    old.mkdir(parents=True)
    (old / "complete.json").write_text('{"from": "model.Q4.gguf"}')
    part_of(tmp_path / "models" / "new").mkdir()  # which is being made
    assert malmend.cache().stale == (old,)
    assert command("cache") == 0
    said = capsys.readouterr().out
    line = "1 model is stale (of an older version, or the file has changed or is gone) and may be"
    assert line in " ".join(said.split())
    assert f"\n  {old}\n" in said
    assert "malmend cache --clear true removes it" in said
    assert command("cache", "--clear", "true") == 0
    assert "is stale" not in capsys.readouterr().out


def test_a_kind_that_is_a_link_to_another_disk_is_emptied(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    away = tmp_path / "away" / "model"
    away.mkdir(parents=True)
    (away / "one.bin").write_bytes(bytes(100))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "trunk").symlink_to(away.parent)
    assert command("cache", "--clear", "true") == 0
    assert "All of it was removed" in capsys.readouterr().out
    assert (tmp_path / "cache" / "trunk").is_symlink()
    assert not list(away.parent.iterdir())


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    (tmp_path / "spill" / "run").mkdir(parents=True)
    (tmp_path / "spill" / "run" / "keys").write_bytes(bytes(2_500_000))

    def refused(*_given: object, **_named: object) -> None:
        return None  # as with ignore_errors, where another user owns it

    monkeypatch.setattr("shutil.rmtree", refused)
    assert command("cache", "--clear", "true") == 0
    assert "2.5 MB of it could not be removed" in capsys.readouterr().out
    assert not malmend.cache(clear=True).cleared


def test_what_another_run_is_writing_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    models = tmp_path / "models"
    models.mkdir()
    written, left = part_of(models / "model"), models / ".old.abcdef-99999999-00000000.part"
    monkeypatch.setattr("malmend.files._machine", lambda: "abcdef")
    written.mkdir()
    left.mkdir()
    malmend.cache(clear=True)
    assert written.is_dir()
    assert not left.exists()
