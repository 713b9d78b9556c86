"""Several processes that do one piece of work: torch.distributed, as torchrun starts it.

    torchrun --nproc-per-node 2 --no-python malmend train|edit ...

Facts are spread over the processes; what is a sum over facts (Gram matrices, losses, gradients) is
summed over processes too.  Everything else is the same in each.  Alone nothing is sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from malmend.errors import MalmendError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # a calibration may take long; who has ended is noticed at once
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets them


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: which it is, from 0; the first one writes and prints.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """This process's part, as even as can be; the parts together are all, none twice."""
        return list(things[self.rank :: self.count])

    def check_enough(self, facts: int) -> None:
        """Raises MalmendError where a process would get no fact."""
        if facts < self.count:
            raise MalmendError(
                f"There {'is 1 fact' if facts == 1 else f'are {facts} facts'} and {self.count} "
                "processes, which need one each; start fewer."
            )

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape, the same bits in each.

        Raises:
            MalmendError: another process has ended.
        """
        if self.count == 1:
            return tensor
        whole = tensor.detach().to("cpu", copy=True).contiguous()  # which gloo sums
        self._together(lambda: distributed.all_reduce(whole))
        return whole.to(tensor.device)

    def total(self, *numbers: float) -> list[float]:
        """The sums over all processes of some numbers."""
        found: list[float] = self.summed(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return found

    def gathered(self, values: Tensor) -> Tensor:
        """All processes' numbers, one process after another."""
        counts = self.total(*(len(values) * (rank == self.rank) for rank in range(self.count)))
        first = int(sum(counts[: self.rank]))
        whole = values.new_zeros(int(sum(counts)))
        whole[first : first + len(values)] = values
        return self.summed(whole)

    def check_alike(self, what: str, *numbers: float) -> None:
        """Raises MalmendError in every process unless these are the same in all."""
        found = self.gathered(torch.tensor(numbers, dtype=torch.float64)).view(self.count, -1)
        if not (found == found[0]).all():
            raise MalmendError(
                f"{what} is not the same in all {self.count} processes; let all of them see one "
                "cache folder (MALMEND_CACHE) and one --out, on machines of one kind, and run the "
                "same command again."
            )

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first process goes through the block alone, then the others: it fills caches."""
        if not self.is_first:
            self._together(distributed.barrier)
        yield
        if self.is_first and self.count > 1:
            self._together(distributed.barrier)

    def _together(self, what: Callable[[], object]) -> None:
        try:
            what()
        except RuntimeError as error:
            raise MalmendError(
                f"Process {self.rank} of {self.count} lost the others, one of which has ended; "
                "run the same command again (a training goes on from its last checkpoint)."
            ) from error


ALONE = Processes()


def started() -> int:
    """How many processes torchrun has started for this run.

    Raises:
        MalmendError: WORLD_SIZE is no number of processes.
    """
    return _whole("WORLD_SIZE", 1, "a number of processes")


def local_rank() -> int:
    """Which of its machine's processes this one is, from 0.

    Raises:
        MalmendError: LOCAL_RANK is no number.
    """
    return _whole("LOCAL_RANK", 0, "this process's number on its machine")


def _whole(name: str, least: int, what: str) -> int:
    said = os.environ.get(name, str(least))
    if not said.isdecimal() or len(said) > 9 or int(said) < least:
        raise MalmendError(
            f"{name} is {said!r:.40}, expected {what}; unset it, or start the "
            "processes by torchrun."
        )
    return int(said)


def refuse_several(what: str) -> None:
    """Raises MalmendError where several processes would each do the same work."""
    if started() > 1:
        raise MalmendError(
            f"{what} runs in one process and WORLD_SIZE is {started()}; start it without torchrun, "
            "or unset WORLD_SIZE. Only editors, training and editing, are spread over processes."
        )


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run by the environment that torchrun sets; without it, one alone.

    Raises:
        MalmendError: the environment names a run that cannot be joined.
    """
    if started() == 1:
        yield ALONE
        return
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise MalmendError(
            f"WORLD_SIZE is set and {', '.join(missing)} is not; start several processes by "
            "torchrun --nproc-per-node N --no-python malmend ..., or unset WORLD_SIZE."
        )
    try:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise MalmendError(f"The processes of this run did not meet ({said}).") from error
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
