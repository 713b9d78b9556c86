"""Which weights of two models differ, and how.

Two models that hold the same numbers in unlike precision differ everywhere, by rounding.  So a
weight is *edited* only where rounding one model's weight to a precision of the other, that is none
of its own, does not give the other's.  The precisions of a model are the dtypes that hold all of
its numbers: what is loaded in float32 may have been kept in bfloat16, and what was cast to float16
is mostly held by bfloat16 too.  One weight says nothing of it: a norm's ones are exact in every
dtype.

The rank of a difference counts singular values above what rounding alone would give it: (S3) of
malmend.numerics.truncation, with the larger of the two weights and the coarsest dtype that holds
one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from malmend.errors import ModelError
from malmend.models.identity import weights_of
from malmend.numerics.truncation import rounding_floor
from malmend.progress import Progress, counting, silent

PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Difference:
    """One weight that the two models have otherwise.

    Attributes:
        name: the parameter's.
        shape: as the model keeps it.
        kind: "edited", or "rounding" where one model holds the other's weight rounded to a
            precision of its own.
        norm: |other - model| / |model|, Frobenius; infinite where the model's is zero.
        rank: of the difference, by (S3); None but for edited matrices.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["edited", "rounding"]
    norm: float
    rank: int | None


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        differences: in the model's order.
        same: how many weights are equal, bit for bit.
        only_here: names that the other model lacks.
        only_there: names that this model lacks.
        reshaped: names that both have, to the two shapes.
    """

    differences: tuple[Difference, ...]
    same: int
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def rounded(self) -> tuple[Difference, ...]:
        """Those that are rounding."""
        return tuple(one for one in self.differences if one.kind == "rounding")

    @property
    def edited(self) -> tuple[Difference, ...]:
        """Those that are more than rounding."""
        return tuple(one for one in self.differences if one.kind == "edited")


def compared(
    model: PreTrainedModel, other: PreTrainedModel, progress: Progress = silent
) -> Comparison:
    """Every parameter and saved buffer of two models, on the CPU, in float64 where they differ."""
    mine, theirs = (
        {name: weight.cpu() for name, weight in weights_of(one).items()} for one in (model, other)
    )
    both = [name for name in mine if name in theirs]
    reshaped = {
        name: (tuple(mine[name].shape), tuple(theirs[name].shape))
        for name in both
        if mine[name].shape != theirs[name].shape
    }
    count = counting(progress, "comparing weights", max(1, len(both)))
    found, own = [], [_precisions(one.values()) for one in (mine, theirs)]
    # To which the one's weights may have been rounded, to be the other's.
    rounds = (own[1] - own[0], own[0] - own[1])
    for name in both:
        if name not in reshaped and not torch.equal(mine[name], theirs[name]):
            found.append(_difference(name, mine[name], theirs[name], rounds))
        count(1)
    return Comparison(
        tuple(found),
        len(both) - len(found) - len(reshaped),
        tuple(name for name in mine if name not in theirs),
        tuple(name for name in theirs if name not in mine),
        reshaped,
    )


def _difference(
    name: str, mine: Tensor, theirs: Tensor, rounds: tuple[set[torch.dtype], set[torch.dtype]]
) -> Difference:
    shape = tuple(mine.shape)
    for one in (mine, theirs):
        if not one.isfinite().all():
            raise ModelError(
                f"{name} holds NaN or infinity in one of the models, so that they cannot be "
                "compared; give whole ones."
            )
    moved = theirs.double() - mine.double()
    size = mine.double().norm().item()
    norm = moved.norm().item() / size if size else float("inf")
    if any(
        torch.equal(one.to(dtype).double(), other.double())
        for one, other, to in ((mine, theirs, rounds[0]), (theirs, mine, rounds[1]))
        for dtype in to
    ):
        return Difference(name, shape, "rounding", norm, None)
    rank = None
    if mine.ndim == 2:
        coarsest = max(
            torch.finfo(dtype).eps for one in (mine, theirs) for dtype in _precisions([one])
        )
        rank = difference_rank(mine, theirs, coarsest)
    return Difference(name, shape, "edited", norm, rank)


def _precisions(weights: Iterable[Tensor]) -> set[torch.dtype]:
    """The dtypes that hold all numbers; whole numbers of a buffer are in none."""
    some = [one for one in weights if one.is_floating_point()]
    return {torch.float64} | {
        dtype
        for dtype in PRECISIONS
        if all(torch.equal(one.to(dtype).to(one.dtype), one) for one in some)
    }


def difference_rank(mine: Tensor, theirs: Tensor, eps: float) -> int:
    """Singular values above (S3), for two matrices of one shape."""
    norm = max(one.double().norm().item() for one in (mine, theirs))
    noise = rounding_floor(norm, (mine.shape[0], mine.shape[1]), eps)
    sizes = torch.linalg.svdvals(theirs.double() - mine.double())
    return int((sizes > noise).sum())
