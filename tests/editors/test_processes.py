"""Two processes on CPU (gloo) do what one does, to rounding; one that dies ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes_worker import CASES, trained
from safetensors.torch import load_file
from test_training import EDITOR, SETTINGS, trainer_of

from devices_support import device, devices
from malmend.errors import MalmendError
from malmend.processes import ALONE, Processes, joined
from processes_support import run_two

WORKER = Path(__file__).parent / "processes_worker.py"


ONE_AND_MORE = [c if c == "malmen" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", ONE_AND_MORE)
def test_training_in_two_processes_is_training_in_one(case, tmp_path):
    done = run_two(WORKER, tmp_path, case)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    mine, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    trainer, losses = trained(case)
    wanted = {**trainer.editor.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}
    start = trainer_of(SETTINGS, CASES[case], dtype=torch.float64).editor.state_dict()
    moved = 0
    assert mine.keys() == other.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(mine[name], other[name]), name  # the same bits in both
        torch.testing.assert_close(mine[name], tensor, rtol=1e-7, atol=1e-9)
        moved += name in start and not torch.equal(tensor, start[name])
    assert moved > 5  # it did learn


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_its_checkpoint_goes_on(tmp_path):
    done = run_two(WORKER, tmp_path, "malmen", 2)
    assert done[1].returncode == 9
    assert done[0].returncode != 0
    assert "lost the others" in done[0].stderr
    assert "goes on from its last checkpoint" in done[0].stderr
    assert not list(tmp_path.glob("[01].safetensors"))
    resumed, _ = trained("malmen", folder=tmp_path)
    whole, _ = trained("malmen")
    assert resumed.step == whole.step == 3
    for name, tensor in whole.editor.state_dict().items():
        torch.testing.assert_close(resumed.editor.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)


def test_a_process_that_lost_the_others_says_what_to_do(monkeypatch):
    def gone(*_args):
        raise RuntimeError("Connection closed by peer")

    for name in ("all_reduce", "barrier"):
        monkeypatch.setattr(f"torch.distributed.{name}", gone)
    with pytest.raises(MalmendError, match=r"Process 0 of 2 lost the others.*last checkpoint"):
        Processes(0, 2).total(1.0)
    with (
        pytest.raises(MalmendError, match="Process 1 of 2 lost the others"),
        Processes(1, 2).first_then_others(),
    ):
        pass


ALIKE = """
from malmend.errors import MalmendError
from malmend.processes import joined
with joined() as processes:
    processes.check_alike("It", 3, 2**47 + 1)
    for number in (2**47 + processes.rank, 5 * processes.rank):
        try:
            processes.check_alike("The editor", 3, number)
        except MalmendError as error:
            print(error)
"""


def test_what_is_not_alike_is_refused_in_every_process():
    for one in run_two("-c", ALIKE):
        assert one.returncode == 0, one.stderr
        assert one.stdout.count("The editor is not the same in all 2 processes; let all") == 2


def test_an_editors_checksum_is_of_every_number():
    editor = trainer_of(SETTINGS, EDITOR).editor
    assert editor.checksum() == trainer_of(SETTINGS, EDITOR).editor.checksum() < 2**48
    before, seen = editor.checksum(), set[int]()
    for tensor in editor.state_dict().values():
        known = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = known * 1.0000002 + 1e-30
        seen.add(editor.checksum())
        tensor.view(-1)[-1] = known
    assert before not in seen
    assert len(seen) == len(editor.state_dict())
    assert editor.checksum() == before


def test_a_sum_over_processes_is_made_on_the_cpu_and_goes_back(monkeypatch):
    def doubled(whole):
        assert whole.device.type == "cpu"
        whole.mul_(2)

    monkeypatch.setattr("malmend.processes.distributed.all_reduce", doubled)
    with devices():
        mine = torch.ones(2, device=device(1))
        found = Processes(0, 2).summed(mine)
        assert found.device == device(1)
        assert (found.tolist(), mine.tolist()) == ([2.0, 2.0], [1.0, 1.0])


def test_shares_are_everything_once():
    things = list(range(11))
    parts = [Processes(rank, 3).share(things) for rank in range(3)]
    assert sorted(thing for part in parts for thing in part) == things
    assert {len(part) for part in parts} == {3, 4}


def test_a_step_needs_a_fact_for_each_process():
    with pytest.raises(MalmendError, match="8 facts and there are 9 processes"):
        trainer_of(SETTINGS, EDITOR, processes=Processes(0, 9))


def test_alone_without_an_environment(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes == ALONE


@pytest.mark.parametrize("count", ["two", "", "0", "-1", "1.5"])
def test_a_count_that_is_none_is_refused(count, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(MalmendError, match="expected a number of processes"), joined():
        pass


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(MalmendError, match="RANK"), joined():
        pass
