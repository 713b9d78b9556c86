"""A descent kept halfway: where it is after some of its steps and the last, to go on from there.

What is kept lies in the cache folder under a name made of all that the descent depends on, so an
edit that was interrupted is found again by giving the same command, and no other edit finds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from malmend.errors import MalmendError, Resumable
from malmend.files import written_beside
from malmend.kept import prune
from malmend.processes import ALONE, Processes

FORMAT = 2  # of what is kept
STEPS = "steps"
EVERY = 16  # steps from one time that it is kept to the next
MOST_KEPT = 4_000_000_000  # bytes of all descents in the folder


@dataclass(frozen=True)
class Halfway:
    """One descent's file; a folder that cannot be written makes it start anew, and is no error.

    Attributes:
        path: of the file, of ``processes`` this one's.
        processes: that keep their parts at the same steps.
    """

    path: Path
    processes: Processes = ALONE

    @classmethod
    def of(cls, folder: Path, parts: Iterable[object], processes: Processes = ALONE) -> Halfway:
        """Of what a descent depends on: tensors by their bytes, all else by what it prints."""
        digest = hashlib.sha256(str(FORMAT).encode())
        for part in parts:
            if isinstance(part, Tensor):
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(part).encode())
        # One name for all processes, each of which has read its own share.
        everyone = processes.gathered(torch.tensor(list(digest.digest())))
        name = hashlib.sha256(repr(everyone.tolist()).encode()).hexdigest()[:32]
        part = f"{name}-{processes.rank + 1}-of-{processes.count}.safetensors"
        return cls(folder / part, processes)

    def found(self, names: Iterable[str] = ()) -> tuple[int, dict[str, Tensor]]:
        """How many steps were taken, and what was kept then, of these names at least.

        0 where any process lacks it.
        """
        tensors, steps = dict[str, Tensor](), 0
        with suppress(Exception):  # whatever is wrong with it, the descent starts anew
            found = load_file(self.path)
            taken = int(found.pop(STEPS))
            if found.keys() >= set(names):
                tensors, steps = found, taken
        everyone = self.processes.gathered(torch.tensor([steps]))
        return (steps, tensors) if (everyone == steps).all() and steps else (0, {})

    def keep(
        self, steps: int, state: Callable[[], Mapping[str, Tensor]], is_last: bool = False
    ) -> None:
        """Keeps the state after so many steps, if it is time to or it is the last."""
        if steps % EVERY and not is_last:
            return
        tensors = {name: one.cpu().contiguous() for name, one in state().items()}
        with suppress(OSError, MalmendError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(self.path) as beside:
                save_file({**tensors, STEPS: torch.tensor(steps)}, beside)
            own = self.path.name.split("-")[0]  # of all processes
            prune(self.path.parent, MOST_KEPT, lambda path: path.name.startswith(own))


@contextmanager
def resumable(path: Path | None) -> Iterator[None]:
    """An interrupt inside says that the work can go on, where that is kept.

    Raises:
        Resumable: in place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        if path is not None and path.exists():
            raise Resumable from stopped
        raise
