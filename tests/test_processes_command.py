"""`malmend train` in two processes: one editor, said once; what is not spread out is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import command_support
from command_support import malmend
from edit_worker import edited
from malmend.editors.checkpoint import load_editor
from malmend.editors.train_settings import TrainSettings
from malmend.patch_file import load_patch
from processes_support import run_two

tiny = command_support.tiny
cache = command_support.cache
whole = command_support.whole

# The command line, which says on standard error that it calibrates, or writes a checkpoint.
RUN = (
    "-c",
    """
import sys
from malmend import material
from malmend.cli import main
from malmend.commands import train

def noticed(*given, calibrate=material.calibrate):
    print("CALIBRATES", file=sys.stderr)
    return calibrate(*given)

def noted(*given, save=train._save):
    print("WRITES", file=sys.stderr)
    save(*given)

material.calibrate = noticed
train._save = noted
raise SystemExit(main(sys.argv[1:]))
""",
)
SMALL = ("--layers", 2, "--network.rank", 4, "--facts-per-step", 4, "--steps", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("whole")
def test_two_processes_write_the_editor_that_one_writes_and_one_of_them_speaks(
    tiny, tmp_path, monkeypatch
):
    asked = ("train", tiny.model, tiny.facts, *SMALL, *tiny.fast)
    assert malmend(*asked, "--out", tmp_path / "alone") == 0
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "empty"))
    done = run_two(*RUN, *asked, "--out", tmp_path / "both")
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Trained 3 steps" in done[0].stdout
    assert done[1].stdout == ""
    assert [one.stderr.count("CALIBRATES") for one in done] == [1, 0]
    assert [one.stderr.count("WRITES") for one in done] == [1, 0]  # after the last step
    alone, both = (load_editor(tmp_path / name).editor for name in ("alone", "both"))
    # Two shares are summed otherwise than a whole.  Adam divides by a gradient's size, so that its
    # rounding of 1e-7 of the largest part is 1e-2 of a rate where a part is 1e-5 of that; 3 steps.
    # By one thread each, one part of 640 is 3.2e-3 of a rate apart; a share left out is a whole.
    most = 3 * 1e-2 * TrainSettings().network_rate
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(both.state_dict()[name], tensor, rtol=1e-6, atol=most)


WORKER = Path(__file__).parent / "edit_worker.py"


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("method", ["malmen", pytest.param("mend", marks=pytest.mark.slow)])
def test_two_processes_find_the_patch_that_one_finds(method, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = edited(method, tmp_path / "one").patch
    done = run_two(WORKER, tmp_path / "two", method)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert [one.stderr.count("CALIBRATES") for one in done] == [1, 0]
    assert [one.stderr.count("WRITES") for one in done] == [1, 0]
    both = load_patch(tmp_path / "two" / "patch")
    passes = both.provenance["passes"]
    assert alone.provenance["passes"] == passes
    assert passes == 1 if method == "mend" else passes > 1
    if method == "malmen":  # as many rows ask back as edit, of 560 tokens that moved
        assert both.provenance["restore"] == 1.0
        assert both.provenance["tokens"] == 160
        assert both.provenance["rounds"] == 1.0
    for name in alone.factors:
        wanted = alone.shift(name)
        assert (both.shift(name) - wanted).norm() < 1e-6 * wanted.norm()  # files are float32
    for said in ("mean_residual", "residual_after"):
        assert both.provenance[said] == pytest.approx(alone.provenance[said], rel=1e-9)  # float64
    for said in ("tokens", "metrics", "facts_sha256"):
        assert both.provenance[said] == alone.provenance[said]


def test_of_two_processes_of_an_edit_one_speaks(tiny, tmp_path):
    asked = ("edit", tiny.model, tiny.facts, "--limit", 7, *tiny.fast, "--out", tmp_path / "patch")
    done = run_two("-m", "malmend", *asked)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Edited 7 facts" in done[0].stdout
    assert done[1].stdout == ""
    assert load_patch(tmp_path / "patch").provenance["facts"] == 7


@pytest.mark.slow
def test_a_process_without_a_fact_is_refused(tiny, tmp_path):
    asked = ("edit", tiny.model, tiny.facts, "--limit", 1, *tiny.fast)
    done = run_two("-m", "malmend", *asked, "--out", tmp_path / "patch")
    assert [one.returncode for one in done] == [2, 2]
    assert "is 1 fact and 2 processes, which need one each" in done[0].stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["edit", "train", "cache"])
def test_what_is_not_spread_over_processes_is_refused(command, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {
        "edit": ("edit", tiny.model, tiny.facts, "--out", tmp_path / "patch", "--method", "ft"),
        "train": ("train", tiny.model, tiny.facts, "--out", tmp_path / "ke", "--method", "ke"),
        "cache": ("cache",),
    }[command]
    assert malmend(*given) == 2
    assert "in one process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
