"""Writing files so that no half-written one is ever found under its name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors import SafetensorError

from malmend.errors import MalmendError


def part_of(path: Path) -> Path:
    """A new hidden name beside ``path`` for what is being written.

    It says which process of which machine writes, so that what a killed one has left in the folder
    is known for it, and is removed here.
    """
    machine = _machine()
    with suppress(OSError):  # a folder that cannot be read
        for left in path.parent.glob(f".*.{machine}-*.part"):
            with suppress(OSError):  # what another user has left, or is gone by now
                if _is_left(left):
                    is_folder = left.is_dir() and not left.is_symlink()
                    shutil.rmtree(left) if is_folder else left.unlink()
    # Names have 255 bytes at most; a letter that is cut in two is left out.
    name = os.fsencode(path.name)[:200].decode(errors="ignore")
    return path.with_name(f".{name}.{machine}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _machine() -> str:
    """Within which a process id is unique: host, boot and PID namespace."""
    said = [socket.gethostname()]
    with suppress(OSError):  # where there is no Linux
        said.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        said.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return hashlib.sha256("|".join(said).encode()).hexdigest()[:6]


def is_written(path: Path) -> bool:
    """Whether it is a part that a process which still runs, here or elsewhere, may be writing."""
    return path.name.endswith(".part") and not (_machine() in path.name and _is_left(path))


def _is_left(part: Path) -> bool:
    """Whether the process that wrote a part is gone, or its number has gone to a younger one."""
    found = re.search(r"-(\d{1,9})-[0-9a-f]{8}\.part$", part.name)
    if found is None:
        return False
    try:
        return psutil.Process(int(found[1])).create_time() > part.lstat().st_mtime + 60
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # alive, and none of ours
        return False


def synced(path: Path) -> None:
    """Waits until a file, or every file of a folder, is on the disk."""
    for one in path.rglob("*") if path.is_dir() else [path]:
        if one.is_file():
            with open(one, "rb+") as file:
                os.fsync(file.fileno())


def listing_synced(folder: Path) -> None:
    """Waits until what a folder lists is on the disk."""
    if os.name == "nt":
        return  # Windows cannot open a folder, and needs no such thing
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yields a path in the same folder to write to; renamed to ``path`` if the block succeeds.

    It is on the disk before it is renamed, so that a failing power supply leaves it whole too.

    Raises:
        MalmendError: the folder is missing, not writable, or the disk is full; nothing is left.
        OSError: from the block, of another file.
    """
    path = Path(path)
    if not path.name:
        raise MalmendError(f"{path} names no file, expected the path of a file to write.")
    place = _followed(path)
    beside = part_of(place)
    try:
        beside.touch()
        # As the file was, or as the user makes files; safetensors makes them private.
        mode = (place if place.is_file() else beside).stat().st_mode
        yield beside
        with suppress(OSError):  # a file system without modes
            beside.chmod(mode)
        synced(beside)
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:
        if _is_of_another(error, beside, place):
            raise
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is left
            beside.unlink(missing_ok=True)


def _is_of_another(error: Exception, *written: Path) -> bool:
    """Whether an error names a file that is none of these nor in them: one that was read, say."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):  # of a descriptor a number
        return False
    at = Path(os.fsdecode(name)).absolute()
    return not any(at.is_relative_to(one.absolute()) for one in written)


def _check_letters(path: Path) -> None:
    """Raises MalmendError about a path that a system, or what reads safetensors, cannot take."""
    if "\0" in str(path):
        raise MalmendError(f"{str(path)!r} holds a NUL, expected a path without one.")
    if any("\ud800" <= one <= "\udfff" for one in str(path)):  # for a byte that is none
        raise MalmendError(
            f"{str(path)!r} is no UTF-8, expected a path that is, for safetensors files are read "
            "from no other; give another path."
        )


def _followed(path: Path) -> Path:
    """Where a link leads: that is written, and the link stays.

    Raises:
        MalmendError: it leads to itself, or the path is none.
    """
    _check_letters(path)
    try:
        place = path.resolve() if path.is_symlink() else path
        if place.is_symlink():
            raise RuntimeError("a link that leads to itself")  # which some Pythons say themselves
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error
    return place


def writable(path: str | Path, *inputs: object) -> Path:
    """Checks before long work that a file can be written at ``path``.

    ``inputs`` are what the work reads; those that are paths must not be written over, nor any file
    of a folder among them, and into a model, an adapter, an editor or a ledger among them goes no
    new file: whatever reads it may take that for one of its own.

    Raises:
        MalmendError: the folder does not exist or takes no file, or ``path`` is a folder or input.
    """
    if not str(path):
        raise MalmendError("The path is empty, expected the path of a file to write.")
    if str(path).endswith(("/", os.sep)) and not Path(path).is_dir():
        raise MalmendError(f"{path} ends like a folder, expected the path of a file to write.")
    path = Path(path)
    place = _followed(path)
    for one in (Path(one) for one in inputs if isinstance(one, str | Path)):
        _check_outside(path, place, one)
    if path.is_dir():
        raise MalmendError(f"{path} is a folder, expected the path of a file to write.")
    if path.exists() and not path.is_file():  # a device, which the rename would replace
        raise MalmendError(f"{path} is no regular file, expected the path of a file to write.")
    _check_within_folder(place, "to write {} into")
    _check_takes_files(place.parent, path)
    return path


# What a folder is, by a file that it then holds.
KINDS = {
    "config.json": "a model",
    "adapter_config.json": "an adapter",
    "editor.json": "an editor",
    "ledger.sqlite": "a ledger",
}


def kind_of(folder: Path) -> str | None:
    """What a folder is, in words; None where it is none of :data:`KINDS`."""
    return next((kind for name, kind in KINDS.items() if (folder / name).is_file()), None)


def _check_outside(path: Path, place: Path, read: Path) -> None:
    """Raises MalmendError, about ``path``, where writing at its place would harm what is read."""
    if not os.path.exists(read):  # which may be no path at all
        return
    if place.is_file() and read.samefile(place):
        raise MalmendError(f"{path} is read by this command and would be lost; write elsewhere.")
    folder = place.absolute().parent
    around = [one for one in (folder, *folder.parents) if os.path.isdir(one) and read.samefile(one)]
    if around and (kind := kind_of(folder)):  # a ledger's editor too
        kind = kind_of(around[0]) or kind
        raise MalmendError(
            f"{path} would lie in {read}, {kind} that this command reads; write elsewhere."
        )
    if around == [folder] and place.is_file():
        raise MalmendError(
            f"{path} is a file of {read}, which this command reads; write elsewhere."
        )


def _check_within_folder(path: Path, to_do: str) -> None:
    """Raises MalmendError unless what is around a path is a folder; ``to_do`` has its place."""
    for around in path.parents:
        if around.is_dir():
            break
        if around.exists():
            what = to_do.format(path.relative_to(around))
            raise MalmendError(f"{around} is a file, expected a folder {what}; give another path.")
    if not path.parent.is_dir():
        what = to_do.format(path.name)
        raise MalmendError(f"There is no folder {path.parent} {what}; make it first.")


def _check_takes_files(folder: Path, path: Path) -> None:
    """Raises MalmendError, about ``path``, where no file can be made in the folder."""
    probe = part_of(folder / "probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def writable_folder(path: str | Path) -> Path:
    """Makes the folder if need be (its parent must exist) and checks that it takes files.

    Raises:
        MalmendError: ``path`` is a file, its parent does not exist, or it takes no file.
    """
    path = Path(path)
    _check_letters(path)
    if path.exists() and not path.is_dir():
        raise MalmendError(f"{path} is a file, expected a folder to write into.")
    _check_within_folder(path, "to make {} in")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error, "made") from error
    _check_takes_files(path, path)
    return path


@contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """Yields a new folder in the same place to fill; renamed to ``path`` if the block succeeds.

    Raises:
        MalmendError: ``path`` holds files, or cannot be written; nothing is left.
        OSError: from the block, of another file.
    """
    path = new_folder(path)
    place = _followed(path)
    beside = part_of(place)
    try:
        beside.mkdir()
        yield beside
        _as_the_user_makes(beside)
        synced(beside)
        os.replace(beside, place)
    except (OSError, SafetensorError) as error:
        if _is_of_another(error, beside, place):
            raise
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _as_the_user_makes(folder: Path) -> None:
    """Gives every file of a new folder the mode of the user's files; safetensors' are private."""
    probe = part_of(folder / "probe")
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for one in folder.rglob("*"):
        if one.is_file() and not one.is_symlink():
            with suppress(OSError):  # a file system without modes
                one.chmod(mode)


def new_folder(path: str | Path) -> Path:
    """Checks before long work that a folder can be made at ``path``.

    Raises:
        MalmendError: it is a file or holds files, or the folder around it takes none.
    """
    path = Path(path).absolute()
    _check_letters(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "holds files already" if path.is_dir() else "is a file"
        raise MalmendError(f"{path} {what}, expected a new folder; give another path.")
    place = _followed(path)
    _check_within_folder(place, "to make {} in")
    _check_takes_files(place.parent, path)
    return path


def _unwritable(path: str | Path, error: Exception, what: str = "written") -> MalmendError:
    return MalmendError(f"{path} cannot be {what} ({reason(error)}); give another path.")


def reason(error: Exception) -> str:
    """The short reason in an exception, one line."""
    said = str(getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return said.splitlines()[0][:300]
