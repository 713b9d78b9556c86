"""What a site's least squares need of its tokens: the tokens themselves, or their sums.

With keys u_j, value differences d_j and weights w_j of equation (14), the solution reads no more of
N tokens than two sums over them and N itself:

    gram = sum of w_j u_j u_j^T,  cross = sum of w_j d_j u_j^T,  S = cross (gram + P(N))^-1    (27)

so tokens that come are added, and tokens that go are taken off.  Everything is float64.

Shape letters: N tokens, K key width, V value width, M facts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from malmend.editors.malmen import Malmen
from malmend.errors import LedgerError, MalmendError
from malmend.files import listing_synced, reason, written_beside
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import solved

Shapes = Mapping[str, tuple[int, int]]  # site name to (V, K)


@dataclass(frozen=True, eq=False)
class Rows:
    """One site's tokens: keys and value differences as they were captured, weights in float64."""

    keys_NK: Tensor
    diffs_NV: Tensor
    weights_N: Tensor

    def __len__(self) -> int:
        return len(self.keys_NK)

    def shift(self, prior: Prior) -> Tensor:
        """S of equation (14) in float64, V x K; there is at least one row."""
        return Malmen(self.keys_NK, self.diffs_NV, prior, self.weights_N).shift()


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows one below another."""
    return Rows(
        torch.cat([part.keys_NK for part in parts]),
        torch.cat([part.diffs_NV for part in parts]),
        torch.cat([part.weights_N for part in parts]),
    )


@dataclass(eq=False)
class Sums:
    """The two sums of equation (27).

    ``removed`` counts the tokens that were taken off since the sums were built.  What cancels
    leaves its rounding behind, so sums are built anew before more was taken off than is left.
    """

    gram_KK: Tensor
    cross_VK: Tensor
    removed: int = 0

    @classmethod
    def of(cls, parts: Iterable[Rows], shape_VK: tuple[int, int]) -> Sums:
        """The sums over all rows of the parts, of which one is held at a time."""
        value_width, key_width = shape_VK
        sums = cls(
            torch.zeros(key_width, key_width, dtype=torch.float64),
            torch.zeros(value_width, key_width, dtype=torch.float64),
        )
        for part in parts:
            sums.add(part)
        return sums

    def add(self, rows: Rows) -> None:
        """Takes in more tokens."""
        self._move(rows, 1.0)

    def remove(self, rows: Rows) -> None:
        """Takes off tokens that were added."""
        self._move(rows, -1.0)
        self.removed += len(rows)

    def _move(self, rows: Rows, sign: float) -> None:
        keys_NK = rows.keys_NK.double()
        weighted_NK = keys_NK * (sign * rows.weights_N).unsqueeze(1)
        self.gram_KK.addmm_(weighted_NK.T, keys_NK)
        self.cross_VK.addmm_(rows.diffs_NV.double().T, weighted_NK)

    def shift(self, prior: Prior) -> Tensor:
        """S of equation (27), V x K."""
        return solved(self.gram_KK, self.cross_VK, prior)


def save_sums(sums: Mapping[str, Sums], path: Path) -> None:
    """Writes the sums by site name; they are on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    for name, one in sums.items():
        tensors |= {f"{name}.gram": one.gram_KK, f"{name}.cross": one.cross_VK}
    removed = {name: one.removed for name, one in sums.items()}
    save_durably(tensors, path, {"malmend": json.dumps({"removed": removed})})


def load_sums(path: Path, shapes: Shapes) -> dict[str, Sums]:
    """Reads the sums of exactly these sites.

    Raises:
        LedgerError: no such file, damaged, of other shapes, or with NaN or infinity in it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["malmend"])
            removed = {name: header["removed"][name] for name in shapes}
            if not all(type(one) is int and 0 <= one < 2**53 for one in removed.values()):
                raise ValueError("how much was removed is no count")
            # Copies: sums are added to, and a tensor of the file changes with the file.
            tensors = {key: read_tensor(file, key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(path, reason(error)) from error
    found = {}
    for name, (value, key) in shapes.items():
        parts = []
        for part, shape in (("gram", (key, key)), ("cross", (value, key))):
            tensor = tensors.get(f"{name}.{part}")
            checked(path, f"{name}.{part}", tensor, shape, (torch.float64,))
            parts.append(tensor)
        found[name] = Sums(parts[0], parts[1], removed[name])  # type: ignore[arg-type]
    return found


def save_durably(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Writes a safetensors file; it and its name are on the disk when this returns.

    Its header says each tensor's digest too, by the tensor's name.

    Raises:
        LedgerError: it cannot be written.
    """
    whole = {name: one.contiguous() for name, one in tensors.items()}
    digests = {name: _digest(one) for name, one in whole.items()}
    try:
        with written_beside(path) as beside:
            save_file(whole, beside, {**header, **digests})
        listing_synced(path.parent)
    except (OSError, MalmendError) as error:  # which asks for another path
        why = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise LedgerError(
            f"{path} cannot be written ({reason(why)}), so nothing was changed; make room, or "
            "check who may write there, and run it again."
        ) from error


def read_tensor(file: Any, name: str) -> Tensor:
    """A tensor of an open safetensors file.

    Raises:
        SafetensorError: there is none of this name, or it is not what :func:`save_durably` wrote.
    """
    tensor: Tensor = file.get_tensor(name)
    said = (file.metadata() or {}).get(name)
    if said is not None and said != _digest(tensor):  # older ledgers do not say it
        raise SafetensorError(f"{name} is not what was written")
    return tensor


def _digest(tensor: Tensor) -> str:
    """SHA-256 over the numbers, in hexadecimal."""
    data: memoryview = tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def checked(
    path: Path,
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises LedgerError unless the tensor is there, of this shape and kind, and finite."""
    if tensor is None:
        raise damaged(path, f"it lacks {name}")
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        kind = f"{tuple(tensor.shape)} of {tensor.dtype}".replace("torch.", "")
        wanted = f"{shape} of {' or '.join(map(str, dtypes))}".replace("torch.", "")
        raise damaged(path, f"{name} is {kind}, expected {wanted}")
    if not torch.isfinite(tensor).all():
        raise damaged(path, f"{name} holds NaN or infinity")


def damaged(path: Path, why: str) -> LedgerError:
    """What is said of a file of a ledger that cannot be used."""
    return LedgerError(f"{path} is damaged ({why}); put back a copy of the ledger's folder.")
