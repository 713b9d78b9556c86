"""`malmend train` in two processes: one editor, said once; what is not spread out is refused."""

from __future__ import annotations

import pytest
import torch

import command_support
from command_support import malmend
from malmend.editors.checkpoint import load_editor
from processes_support import run_two

tiny = command_support.tiny
cache = command_support.cache

# The command line, which says of every checkpoint on standard error that it writes one.
RUN = (
    "-c",
    """
import sys
from malmend.cli import main
from malmend.commands import train

def noted(*given, save=train._save):
    print("WRITES", file=sys.stderr)
    save(*given)

train._save = noted
raise SystemExit(main(sys.argv[1:]))
""",
)
SMALL = ("--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 3)


@pytest.mark.slow
def test_two_processes_write_the_editor_that_one_writes_and_one_of_them_speaks(tiny, tmp_path):
    asked = ("train", tiny.model, tiny.facts, *SMALL, *tiny.fast)
    assert malmend(*asked, "--out", tmp_path / "alone") == 0
    done = run_two(*RUN, *asked, "--out", tmp_path / "both")
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Trained 3 steps" in done[0].stdout
    assert done[1].stdout == ""
    assert [one.stderr.count("WRITES") for one in done] == [1, 0]  # after the last step
    alone, both = (load_editor(tmp_path / name).editor for name in ("alone", "both"))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("command", ["edit", "train", "cache"])
def test_what_is_not_spread_over_processes_is_refused(command, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {
        "edit": ("edit", tiny.model, tiny.facts, "--out", tmp_path / "patch"),
        "train": ("train", tiny.model, tiny.facts, "--out", tmp_path / "ke", "--method", "ke"),
        "cache": ("cache",),
    }[command]
    assert malmend(*given) == 2
    assert "in one process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
