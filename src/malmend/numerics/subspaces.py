"""How far two shifts of one layer go the same way.

Shape letters: V value width, K key width, P and Q ranks.

    cosine    <S, T> / (|S| |T|)
    overlap   |A^T B|^2 / min(P, Q),  A (P columns) and B (Q columns) orthonormal bases

The overlap is the mean squared cosine of the angles between two spaces: 1 where one holds the
other, 0 where they are orthogonal.  Two spaces drawn at random in d dimensions have max(P, Q) / d.
"""

from __future__ import annotations

from torch import Tensor


def cosine(one_VK: Tensor, other_VK: Tensor) -> float:
    """Of two matrices as vectors, -1 to 1; 0 where one of them is zero."""
    one, other = one_VK.double(), other_VK.double()
    size = (one.norm() * other.norm()).item()
    return (one * other).sum().item() / size if size else 0.0


def overlap(one_dP: Tensor, other_dQ: Tensor) -> float:
    """Of the spaces that two orthonormal bases span, 0 to 1; 0 where one is empty."""
    smaller = min(one_dP.shape[1], other_dQ.shape[1])
    return (one_dP.T @ other_dQ).square().sum().item() / smaller if smaller else 0.0


def overlap_by_chance(one_dP: Tensor, other_dQ: Tensor) -> float:
    """What :func:`overlap` is on average for spaces of these sizes without any relation."""
    sizes = one_dP.shape[1], other_dQ.shape[1]
    return max(sizes) / one_dP.shape[0] if min(sizes) else 0.0
