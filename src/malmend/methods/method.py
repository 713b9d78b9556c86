"""What a method is to the rest: where it edits, how it reads facts, and the shifts it finds.

Outermost every method is the same: (model, facts) -> one shift per site.  One that has this shape
is edited with, evaluated, and compared like those of this package, wherever it is written::

    malmend.edit(model, facts, method=MyMethod())

Shape letters: V value width, K key width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from malmend.facts.fact import Fact
from malmend.facts.tokens import EndOfAnswer
from malmend.models.sites import Site
from malmend.progress import Progress
from malmend.workbench import Workbench


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found.

    Attributes:
        shifts: by site name, V x K, float64.
        rank: no shift's rank is above this; a patch is kept as factors where they are smaller.
        said: entries of the patch's header that only the method knows; where "settings" is not
            among them, they are the method's fields.
        once: seconds that went into what a model needs once, whatever is edited.
        leftover: a file to go on from if the patch cannot be written; removed when it is.
    """

    shifts: Mapping[str, Tensor]
    rank: int
    said: Mapping[str, Any] = field(default_factory=dict)
    once: float = 0.0
    leftover: Path | None = None


class Method(Protocol):
    """What edits; a dataclass whose fields are its settings, so that a patch can say them."""

    @property
    def name(self) -> str:
        """As tables and patches call it."""

    @property
    def end_of_answer(self) -> EndOfAnswer:
        """What is trained after an answer: "eos", "newline" or "none"."""

    def sites_in(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """The layers that are edited.

        Raises:
            ModelError: the model has none, or not those asked for.
        """

    def find(self, bench: Workbench, facts: Sequence[Fact], progress: Progress) -> Found:
        """The shifts for all facts at once; learns from no paraphrase or neighbour.

        The weights are as they were when it returns, also after an exception.
        """


def settings_of(method: Method) -> dict[str, Any]:
    """What a patch's header says of a method's settings: its fields, where it is a dataclass."""
    if not is_dataclass(method) or isinstance(method, type):
        return {"end_of_answer": method.end_of_answer}
    return {**asdict(method), "end_of_answer": method.end_of_answer}
