"""One run at a time writes into a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from malmend.errors import MalmendError
from malmend.files import reason

LOCK = ".malmend.lock"  # of a folder that one run at a time writes into


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps every other run out of a folder that one is writing into; ends with the process.

    Args:
        folder: must exist.

    Raises:
        MalmendError: another run holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise MalmendError(
            f"Another run is writing into {folder}; let it end, or give another --out."
        ) from None
    except (NotImplementedError, OSError) as error:
        number = getattr(error, "errno", errno.ENOSYS)  # of the first kind there is none
        if number not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise MalmendError(
                f"{folder / LOCK} cannot be locked ({reason(error)}): another user's run may be "
                f"writing there; remove it if none is, or give another --out."
            ) from error
        # else a file system that knows no locks
    try:
        yield
    finally:
        with suppress(OSError):
            # While it is held: whoever waits sees it gone, and makes one.
            Path(lock.lock_file).unlink()
        lock.release()
