"""Which readings of an edit's facts, and what of the rest, a step of settling takes.

A reading is a fact asked in one way.  Where there are steps enough all are read once, and from then
on the more often the less was said when they were last read: most plain prompts are soon said, and
what is said has no gradient.  Where there are too few, the facts' own prompts are, as far as
the steps go, and of the rest some.

Shape letters: F facts, W ways of asking, R readings, D those of a draw, Q those of them that are
this process's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from malmend.facts.encoded import Encoded
from malmend.processes import Processes

READINGS, FEWEST = 112, 80  # of a step, and steps at least
WAYS = 7  # what all readings of a fact weigh together, in the mean over facts
LEAST_OPEN, MOST_OPEN = 0.02, 3.0  # nats that a reading is ranked by, at least and at most
LUCK = (0.5, 1.5)  # what a rank is multiplied by, from and to, at random
NEVER = 1e9  # steps since the last reading of what was not read yet
HELD_EACH, READ = 48, 2  # questions and lines of a step, and how often each is read if they suffice
KNOWN_EACH = 96  # of what is surely said of others, in a step
NUMBERS = (READINGS, FEWEST, WAYS, LEAST_OPEN, MOST_OPEN, *LUCK, HELD_EACH, READ, KNOWN_EACH)


def steps_for(readings: int, rounds: float, most: int) -> int:
    """How many steps read so many readings ``rounds`` times each in the mean.

    At least :data:`FEWEST`, and never more than ``most``.
    """
    return min(most, max(FEWEST, math.ceil(rounds * readings / READINGS)))


def lines_for(steps: int) -> int:
    """How many held questions and lines so many steps read."""
    return steps * HELD_EACH // READ


def in_turns(count: int, size: int, processes: Processes) -> Iterator[list[int]]:
    """Of so many things over all processes the next few, as indices of this process's own.

    Each is drawn once before any is drawn again.
    """
    generator, queue = torch.Generator().manual_seed(0), list[int]()
    while True:
        while len(queue) < min(size, count):
            queue += torch.randperm(count, generator=generator).tolist()
        some, queue = queue[:size], queue[size:]
        yield [one // processes.count for one in some if one % processes.count == processes.rank]


class Readings:
    """Which facts are read next, and in which way, of all processes' F x W.

    What was never read comes first.  Everything else is ranked by the nats that were open when it
    was last read, times the steps since, times :data:`LUCK`.

    Args:
        asked: of each fact its prompt, and the same in other ways; of ``processes`` this one's.
        processes: that facts are spread over.
        steps: how many draws there will be.

    Attributes:
        weight: what a reading counts in (29); a fact counts by how many it has.
    """

    def __init__(self, asked: Sequence[Sequence[Encoded]], processes: Processes, steps: int):
        self._asked, self._processes = asked, processes
        self._ways = int(processes.gathered(torch.tensor([max(map(len, asked), default=0)])).max())
        facts = int(processes.total(len(asked))[0])
        there_FW = torch.zeros(facts, self._ways)
        for index, some in enumerate(asked):
            there_FW[index * processes.count + processes.rank, : len(some)] = 1
        self._places_R = processes.summed(there_FW).flatten().nonzero()[:, 0]
        count = len(self._places_R)
        self._size = min(READINGS, count)
        self._open_R = torch.full((count,), MOST_OPEN)
        self._since_R = torch.full((count,), NEVER)
        self._generator, self._drawn_D = torch.Generator().manual_seed(0), torch.zeros(0).long()
        if (over := count - steps * READINGS) > 0:
            reworded = (self._places_R % self._ways).nonzero()[:, 0]
            order = torch.randperm(len(reworded), generator=self._generator)
            self._since_R[reworded[order[:over]]] = 0  # left to the end, which does not come
        self.weight = WAYS / self._size

    def draw(self) -> list[Encoded]:
        """The next readings that are this process's own."""
        luck_R = torch.empty(len(self._places_R)).uniform_(*LUCK, generator=self._generator)
        self._since_R += 1
        score_R = self._open_R.clamp(LEAST_OPEN, MOST_OPEN) * self._since_R * luck_R
        self._drawn_D = score_R.topk(self._size).indices
        return [self._asked[fact // self._processes.count][way] for fact, way, _ in self._own()]

    def read(self, losses_Q: Tensor) -> None:
        """Notes what of this process's readings of the last draw is open, in nats."""
        open_D = torch.zeros(len(self._drawn_D))
        own_Q = torch.tensor([place for *_, place in self._own()], dtype=torch.long)
        open_D[own_Q] = losses_Q.float()
        self._open_R[self._drawn_D] = self._processes.summed(open_D)
        self._since_R[self._drawn_D] = 0

    def state(self) -> dict[str, Tensor]:
        """What the next draw depends on."""
        luck = self._generator.get_state()
        return {"open": self._open_R, "since": self._since_R, "luck": luck}

    def go_on(self, state: Mapping[str, Tensor]) -> None:
        """Takes up a state that was kept."""
        self._open_R, self._since_R = state["open"], state["since"]
        self._generator.set_state(state["luck"])

    def _own(self) -> Iterator[tuple[int, int, int]]:
        """Of this process's readings in the last draw: fact, way, and place in the draw."""
        for place, reading in enumerate(self._places_R[self._drawn_D].tolist()):
            fact, way = divmod(reading, self._ways)
            if fact % self._processes.count == self._processes.rank:
                yield fact, way, place
