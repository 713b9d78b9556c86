"""What turns the pseudo rows of one site into its shift, and goes back: by a method's name.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from malmend.editors.malmen import Malmen
from malmend.editors.mend import Mend
from malmend.editors.pseudo import Pseudo, Received
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import Summed


class Aggregation(Protocol):
    """What a method does with the pseudo rows of one site.

    ``diffs_NV`` holds what each token asks of its value, d_j of equation (9).
    """

    diffs_NV: Tensor

    def add(self, rows: slice, pseudo: Pseudo) -> None:
        """Takes the editor's output for a chunk of tokens."""

    def shift(self) -> Tensor:
        """S in float64, V x K, once every chunk was added."""

    def receive(self, shift_grad_VK: Tensor) -> Received:
        """Takes G = dL/dS; returns the derivatives of the prior and of the rows' weights."""

    def proxy(self, rows: slice, pseudo: Pseudo) -> Tensor:
        """A scalar whose gradient is the meta-gradient of a chunk."""


AGGREGATIONS: dict[
    str, Callable[[Tensor, Tensor, Prior, Tensor | None, Summed | None], Aggregation]
] = {
    "malmen": Malmen,
    "mend": Mend,
    "mend-single": Mend,
}
