"""Every command that trains into a folder keeps other runs out of it."""

from __future__ import annotations

import pytest

import command_support
import forms_folders
from command_support import malmend
from malmend.commands import finetune as finetune_module
from malmend.commands.finetune import finetune
from malmend.errors import MalmendError
from malmend.one_writer import LOCK, only_writer

tiny = command_support.tiny
cache = command_support.cache

SMALL = ["--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 1]


@pytest.mark.parametrize("command", ["train", "ke", "finetune"])
def test_a_folder_that_is_written_into_is_refused(command, tiny, tmp_path, capsys):
    given = {
        "train": ["train", tiny.model, tiny.facts, *SMALL, *tiny.fast],
        "ke": ["train", tiny.model, tiny.facts, "--method", "ke", "--ke.steps", 1],
        "finetune": ["finetune", tiny.model, tiny.facts, "--validation", 0, "--epochs", 1],
    }[command]
    with only_writer(tmp_path):
        assert malmend(*given, "--out", tmp_path) == 2
        assert "Another run is writing into" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_model_that_another_run_finished_meanwhile_stays(tmp_path, monkeypatch):
    base = forms_folders.save_base("llama", tmp_path / "base")
    facts = forms_folders.save_facts("llama", tmp_path / "facts.jsonl")
    out = tmp_path / "out"
    load = finetune_module.load_base

    def slowly(*given):
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("{}")  # the other run ends
        return load(*given)

    monkeypatch.setattr(finetune_module, "load_base", slowly)
    with pytest.raises(MalmendError, match="holds a model already"):
        finetune(base, facts, out, forms_folders.learning("llama"))
    assert (out / "config.json").read_text() == "{}"
