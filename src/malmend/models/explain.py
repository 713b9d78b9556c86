"""What a loader's exceptions say, for a person: most of the model's files, some not."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from malmend.errors import MalmendError, ModelError, is_out_of_memory
from malmend.models.forms import KINDS

RAN_OUT = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns a loader's many exceptions into one sentence.

    What says nothing about the model's files stays what it is: a full memory or disk, and a mistake
    in malmend's own code.

    Raises:
        ModelError: anything else.
    """
    try:
        yield
    except MalmendError:
        raise
    except Exception as error:  # every loader fails in its own ways
        if (cause := _of_the_machine(error)) is not None:
            raise cause from None
        if _is_ours(error):
            raise
        said = str(error).strip() or type(error).__name__
        first = said.splitlines()[0].strip()
        reason = " ".join(said.split()) if first.endswith(":") else first  # what follows is it
        raise ModelError(
            f"The model {name!r} cannot be loaded ({reason[:300]}); "
            f"give {KINDS} that transformers' Auto classes can open."
        ) from error


def _of_the_machine(error: BaseException) -> BaseException | None:
    """What says that memory, disk or open files ran out, which a loader may have wrapped."""
    at: BaseException | None = error
    while at is not None:
        if is_out_of_memory(at) or (isinstance(at, OSError) and at.errno in RAN_OUT):
            return at
        at = at.__cause__ or at.__context__
    return None


def _is_ours(error: Exception) -> bool:
    """Whether a line of malmend's own raised it, which reads no file itself but by libraries."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    inside = frame.f_globals.get("__name__", "").startswith("malmend.")
    return inside and not isinstance(error, OSError | RecursionError)
