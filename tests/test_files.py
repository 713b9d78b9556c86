"""Files that are kept: made again where they cannot be read, and bounded."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from malmend import kept as kept_module
from malmend.errors import MalmendError
from malmend.files import (
    folder_beside,
    new_folder,
    part_of,
    writable,
    writable_folder,
    written_beside,
)
from malmend.kept import kept, prune
from malmend.one_writer import LOCK, only_writer

MUCH = 10**6


def save(value: str, path: Path) -> None:
    with written_beside(path) as beside:
        beside.write_text(value)


def kept_in(path: Path, made: str = "made", most_bytes: int = MUCH) -> str:
    return kept(path, Path.read_text, lambda: made, save, most_bytes)


def test_it_is_made_once(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    assert kept_in(path) == "made"
    assert kept_in(path, "again") == "made"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_it_may_be_read_by_whom_the_user_lets_read(tmp_path, umask):
    """safetensors makes its files private."""
    before = os.umask(umask)
    try:
        with written_beside(tmp_path / "file") as beside:
            beside.unlink()
            os.close(os.open(beside, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_was_private_stays_private(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o600)
    save("new", tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_file_system_without_modes_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "chmod", denied)
    save("new", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"


def test_links_that_lead_nowhere_are_refused_before_the_work(tmp_path):
    (tmp_path / "far").symlink_to(tmp_path / "no" / "such")
    with pytest.raises(MalmendError, match="There is no folder"):
        writable(tmp_path / "far")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for refused in (writable, lambda path: save("new", path)):
        with pytest.raises(MalmendError, match="cannot be written"):
            refused(tmp_path / "a")


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    place, link = tmp_path / "there", tmp_path / "here"
    place.mkdir()
    (place / "file").write_text("old")
    link.symlink_to(place / "file")
    save("new", link)
    assert link.is_symlink()
    assert (place / "file").read_text() == "new"
    assert [one.name for one in place.iterdir()] == ["file"]


def test_a_damaged_one_is_made_again_and_written_over(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xff")
    assert kept_in(path) == "made"
    assert path.read_text() == "made"


def denied(*_given: object, **_more: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("what", ["is_file", "unlink", "stat", "mkdir", "read_text", "glob"])
@pytest.mark.parametrize("content", [None, b"good", b"\xff"])
def test_a_folder_that_refuses_anything_is_no_error(tmp_path, monkeypatch, what, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(Path, what, denied)
    assert kept(path, Path.read_text, lambda: "made", save, MUCH) in ("made", "good")


@pytest.mark.parametrize("what", ["utime", "replace"])
def test_a_folder_that_takes_nothing_is_no_error(tmp_path, monkeypatch, what):
    (tmp_path / "good").write_text("good")
    (tmp_path / "damaged").write_bytes(b"\xff")
    monkeypatch.setattr(os, what, denied)
    assert kept_in(tmp_path / "good") == "good"
    assert kept_in(tmp_path / "damaged") == "made"
    assert kept_in(tmp_path / "new") == "made"


def test_a_folder_in_its_place_is_no_error(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "inside").touch()
    assert kept_in(tmp_path / "file") == "made"
    (tmp_path / "plain").touch()
    assert kept_in(tmp_path / "plain" / "file") == "made"


def test_an_interruption_is_passed_on(tmp_path):
    def stopped(_path: Path) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "file", stopped, lambda: "made", save, MUCH)


def aged(folder: Path, *sizes: int) -> list[Path]:
    """Files of these sizes, the oldest first."""
    paths = [folder / f"file{index}" for index in range(len(sizes))]
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        path.write_bytes(bytes(size))
        os.utime(path, (index, index))
    return paths


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("most_bytes", "left"),
    [(60, {0, 1, 2}), (59, {1, 2}), (50, {1, 2}), (49, {2}), (0, {2})],
)
def test_the_oldest_go_and_the_newest_stays(tmp_path, most_bytes, left):
    aged(tmp_path, 10, 20, 30)
    prune(tmp_path, most_bytes)
    assert names(tmp_path) == {f"file{index}" for index in left}


def test_what_is_being_written_and_folders_are_left_alone(tmp_path):
    aged(tmp_path, 10, 20)
    (tmp_path / ".file.0123.part").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    prune(tmp_path, 0)
    assert names(tmp_path) == {"file1", ".file.0123.part", "folder"}


def test_what_the_same_run_has_used_stays(tmp_path):
    """A large calibration went when what lies around its layers was written, at each edit anew."""
    aged(tmp_path, 10, 10)
    read, made, other = (tmp_path / name for name in ("file0", "made", "other"))
    assert kept_in(read, most_bytes=5) == "\0" * 10
    assert names(tmp_path) == {"file0", "file1"}
    kept_in(made, "made", 5)
    kept_in(other, "other", 5)
    assert names(tmp_path) == {"file0", "made", "other"}
    kept_module._USED.clear()  # as another process begins
    kept_in(other, most_bytes=5)
    kept_in(tmp_path / "new", "new", 5)
    assert names(tmp_path) == {"other", "new"}


def test_writing_one_removes_what_was_used_longest_ago(tmp_path):
    first, second, third = aged(tmp_path, 4, 4, 4)
    first.write_text("used")
    os.utime(first, (0, 0))
    assert kept_in(first) == "used"
    assert kept_in(tmp_path / "new", "new!", most_bytes=8) == "new!"
    assert names(tmp_path) == {"file0", "new"}
    assert not second.exists()
    assert not third.exists()


def test_a_folder_is_filled_beside_and_renamed(tmp_path):
    with folder_beside(tmp_path / "out") as beside:
        (beside / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "whole"
    (tmp_path / "empty").mkdir()
    with folder_beside(tmp_path / "empty") as beside:
        (beside / "file").write_text("whole")
    assert (tmp_path / "empty" / "file").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_of_a_folder_may_be_read_by_whom_the_user_lets_read(tmp_path, umask):
    """safetensors makes private files, which an export's reader could not open."""
    before = os.umask(umask)
    try:
        with folder_beside(tmp_path / "folder") as beside:
            (beside / "below").mkdir()
            save_file({"w": torch.ones(1)}, beside / "below" / "model.safetensors")
    finally:
        os.umask(before)
    written = tmp_path / "folder" / "below" / "model.safetensors"
    assert written.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["below"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "full")])
def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path, error):
    def fill():
        with folder_beside(tmp_path / "out") as beside:
            (beside / "file").write_text("half")
            raise error

    with pytest.raises((KeyboardInterrupt, ValueError)):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beside", [written_beside, folder_beside])
def test_a_file_that_was_read_meanwhile_is_not_taken_for_the_one_to_write(tmp_path, beside):
    """ "out cannot be written (No such file or directory); give another path", of an input."""

    def fill():
        with beside(tmp_path / "out"):
            (tmp_path / "input").read_text()

    with pytest.raises(FileNotFoundError, match="input"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_is_never_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(MalmendError, match="holds files already"), folder_beside(tmp_path / "out"):
        raise AssertionError("the block must not be run")
    with pytest.raises(MalmendError, match="is a file"):
        new_folder(tmp_path / "out" / "file")
    with pytest.raises(MalmendError, match="There is no folder"):
        new_folder(tmp_path / "no" / "out")
    assert new_folder(tmp_path / "new") == tmp_path / "new"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


DIES = """
import os, signal, sys
from pathlib import Path
from malmend.files import folder_beside, written_beside

place = Path(sys.argv[1])
with written_beside(place / "file") as file, folder_beside(place / "folder") as folder:
    file.write_text("half")
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path):
    assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.glob(".*.part"))) == 2
    mine = part_of(tmp_path / "other")  # of a process that lives
    mine.write_text("half")
    elsewhere = tmp_path / ".file.abcdef-1-01234567.part"  # of another machine
    elsewhere.write_text("half")
    save("whole", tmp_path / "third")
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, tmp_path / "third"])


def test_a_part_that_cannot_be_removed_stops_nothing(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = part_of(tmp_path / "file").name
    left = [
        tmp_path / mine.replace(f"-{os.getpid()}-", f"-{dead.pid}-").replace("file", n)
        for n in "abc"
    ]
    left[0].write_text("half")
    left[1].symlink_to(tmp_path / "nowhere")
    left[2].write_text("half")
    unlink = Path.unlink

    def refusing(path, *given, **more):
        if path == left[0]:
            raise PermissionError
        unlink(path, *given, **more)

    monkeypatch.setattr(Path, "unlink", refusing)
    part_of(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [left[0]]


def test_a_part_of_another_machine_or_container_stays(tmp_path, monkeypatch):
    part = part_of(tmp_path / "file")
    part.write_text("half")
    gone = part.with_name(part.name.replace(f"-{os.getpid()}-", "-999999999-"))
    part.rename(gone)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        part_of(tmp_path / "file")
    assert gone.exists()
    part_of(tmp_path / "file")
    assert not gone.exists()


def test_a_part_whose_process_number_went_to_a_younger_one_is_removed(tmp_path):
    part = part_of(tmp_path / "file")  # this process's number
    part.write_text("half")
    os.utime(part, (1, 1))  # long before it began
    part_of(tmp_path / "file")
    assert not part.exists()


@pytest.mark.parametrize(("seconds", "stays"), [(50, True), (70, False)])
def test_a_part_a_little_older_than_its_process_is_still_its_own(tmp_path, seconds, stays):
    """Where a file's clock is behind by less than a minute."""
    part = part_of(tmp_path / "file")
    part.write_text("half")
    began = psutil.Process().create_time()
    os.utime(part, (began - seconds, began - seconds))
    part_of(tmp_path / "file")
    assert part.exists() is stays


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "[a]*?"])
def test_any_name_that_a_file_can_have_can_be_written(tmp_path, name):
    save("whole", tmp_path / name)
    assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    save("whole", tmp_path / "file")
    assert len(synced) == 1
    with folder_beside(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        (folder / "b").write_text("b")
    assert len(synced) == 3


def test_a_lock_that_cannot_be_taken_is_said(tmp_path):
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(MalmendError, match=r"\.malmend\.lock cannot be locked"),
        only_writer(tmp_path),
    ):
        pass


def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    def without(*_given, **_more):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("malmend.one_writer.FileLock.acquire", without)
    entered = False
    with only_writer(tmp_path):
        entered = True
    assert entered


HOLDS = """
import sys
from pathlib import Path
from malmend.one_writer import only_writer

with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time_writes_into_a_folder(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said = f"Another run is writing into {tmp_path}; let it end, or give another --out."
        with pytest.raises(MalmendError) as caught, only_writer(tmp_path):
            pass
        assert str(caught.value) == said
        other.kill()
    with only_writer(tmp_path):  # the lock ends with its process
        pass
    assert not list(tmp_path.iterdir())


def test_a_device_or_pipe_is_no_file_to_write(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MalmendError, match="pipe is no regular file"):
        writable(pipe)
    assert pipe.is_fifo()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_may_hold_anything(tmp_path):
    (tmp_path / "runs" / "probe").mkdir(parents=True)
    assert writable_folder(tmp_path / "runs") == tmp_path / "runs"
    assert [one.name for one in (tmp_path / "runs").iterdir()] == ["probe"]


def test_a_folder_that_a_link_leads_to_is_filled_and_the_link_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with folder_beside(link) as beside:
        (beside / "one").write_text("hours of work")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "one").read_text() == "hours of work"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_no_file_of_a_folder_that_is_read_is_written_over(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    weights = model / "model.safetensors"
    weights.write_text("weights")
    with pytest.raises(MalmendError, match=r"model.safetensors is a file of .*model, which this"):
        writable(weights, "facts.jsonl", str(model))
    assert writable(model / "new.safetensors", str(model)).parent == model
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(MalmendError, match="is a file of"):
        writable(tmp_path / "link" / weights.name, model)


KINDS = [
    ("config.json", "a model"),
    ("adapter_config.json", "an adapter"),
    ("editor.json", "an editor"),
    ("ledger.sqlite", "a ledger"),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_no_new_file_goes_into_what_is_read(tmp_path, name, kind):
    """A patch called adapter_config.json would make an adapter of a model."""
    read = tmp_path / "read"
    (read / "editor").mkdir(parents=True)
    (read / name).write_text("")
    with pytest.raises(MalmendError, match=f"would lie in .*read, {kind} that this command reads"):
        writable(read / "new", "facts.jsonl", str(read))
    assert writable(read / "new", "facts.jsonl") == read / "new"  # which nobody reads now
    assert writable(read / "editor" / "new", read).parent.name == "editor"  # a folder like any
    (read / "editor" / "editor.json").write_text("")  # as a ledger's is
    for inside in ("new", "editor.json"):
        with pytest.raises(MalmendError, match=f"would lie in .*read, {kind} that this command"):
            writable(read / "editor" / inside, read)
    (tmp_path / "link").symlink_to(read / "far")
    with pytest.raises(MalmendError, match="would lie in"):
        writable(tmp_path / "link", read)
    with pytest.raises(MalmendError, match=f"would lie in {tmp_path}, {kind} that this command"):
        writable(read / "new", tmp_path)  # of which it is a part


def test_what_is_read_may_be_no_path_at_all(tmp_path):
    """It is refused where it is read, with what it should have been."""
    (tmp_path / "config.json").write_text("")
    assert writable(tmp_path / "new", "x" * 5000, "a\0b", "no/such").name == "new"


NOT_UTF8 = (os.fsdecode(b"m\xfcll"), "is no UTF-8, expected a path that is")
NUL = ("a\0b", "holds a NUL, expected a path without one")


@pytest.mark.parametrize(("name", "told"), [NOT_UTF8, NUL])
@pytest.mark.parametrize("folder", ["", "{}/"])
def test_names_that_no_file_of_ours_can_have(tmp_path, name, told, folder):
    path = tmp_path / (folder + "{}").format(name, name)
    for write in (writable, writable_folder, new_folder, lambda path: save("text", path)):
        with pytest.raises(MalmendError, match=told) as caught:
            write(path)
        assert caught.value.args[0].count(".") == 1 + str(path).count(".")
    with pytest.raises(MalmendError, match=told), folder_beside(path):
        pass
    assert not os.listdir(tmp_path)


def test_a_name_that_is_cut_within_a_letter_stays_one(tmp_path):
    name = "a" + "ü" * 125
    assert part_of(tmp_path / name).name.startswith(f".a{'ü' * 99}.")
    part_of(tmp_path / os.fsdecode(b"\xff" * 250)).name.encode()  # of a cache's folder, say
    save("text", tmp_path / name)
    assert os.listdir(tmp_path) == [name]
