"""Where two patches meet: the layers that both shift, and how far they go the same way there.

    cosine    of the shifts as vectors: +1 the same, -1 the opposite, 0 nothing in common
    keys      overlap of their row spaces: do they answer to the same inputs
    values    overlap of their column spaces: do they write into the same directions

Overlaps (malmend.numerics.subspaces) go with what chance gives for spaces of the same sizes.

Shape letters: V value width, K key width, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch

from malmend.errors import PatchError
from malmend.numerics.subspaces import cosine, overlap, overlap_by_chance
from malmend.numerics.truncation import spectrum
from malmend.patch import Patch


@dataclass(frozen=True)
class Overlap:
    """How much two spaces share, 0 to 1, and what spaces of these sizes share by chance."""

    found: float
    chance: float


@dataclass(frozen=True)
class Meeting:
    """One layer that two patches shift.

    Attributes:
        site: the layer.
        patches: names of the two.
        ranks: of their shifts.
        cosine: of the shifts.
        keys: overlap of the row spaces.
        values: overlap of the column spaces.
    """

    site: str
    patches: tuple[str, str]
    ranks: tuple[int, int]
    cosine: float
    keys: Overlap
    values: Overlap


def meetings(patches: Mapping[str, Patch]) -> tuple[Meeting, ...]:
    """Every layer that two of the patches shift, pair by pair.

    Raises:
        PatchError: two shifts of one layer have unlike shapes.
    """
    found = []
    for (one, mine), (other, theirs) in combinations(patches.items(), 2):
        for site in mine.factors:
            if site in theirs.factors:
                found.append(_meeting(site, (one, other), mine, theirs))
    return tuple(found)


def _meeting(site: str, names: tuple[str, str], mine: Patch, theirs: Patch) -> Meeting:
    one_VK, other_VK = mine.shift(site), theirs.shift(site)
    if one_VK.shape != other_VK.shape:
        raise PatchError(
            f"{names[0]} shifts {site} by {tuple(one_VK.shape)} and {names[1]} by "
            f"{tuple(other_VK.shape)}; they are of different models."
        )
    one, other = spectrum(mine.factors[site]), spectrum(theirs.factors[site])
    keys = (one.right_RK.T, other.right_RK.T)
    values = (one.left_VR, other.left_VR)
    return Meeting(
        site,
        names,
        (one.rank, other.rank),
        cosine(one_VK, other_VK),
        Overlap(overlap(*keys), overlap_by_chance(*keys)),
        Overlap(overlap(*values), overlap_by_chance(*values)),
    )


def stacked(patches: Mapping[str, Patch], base: str) -> Patch:
    """All patches at once: the sum of their shifts, rounded once.

    Args:
        patches: by name, for layers of the same shapes.
        base: fingerprint of the model that they go on.
    """
    names = dict.fromkeys(site for patch in patches.values() for site in patch.factors)
    sums = {}
    for site in names:
        shifts = [one.shift(site).double() for one in patches.values() if site in one.factors]
        sums[site] = torch.stack(shifts).sum(0).float()
    return Patch({site: (total_VK,) for site, total_VK in sums.items()}, {"base": base})
