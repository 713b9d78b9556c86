"""A patch's file: written, read back, and refused where it is damaged.

It is one safetensors file.  Its header's metadata carries the provenance as JSON under
``malmend``; its tensors are, per site, either ``NAME.shift`` (V x K) or ``NAME.left`` (V x R) and
``NAME.right`` (R x K), as :mod:`malmend.patch` has them.
"""

from __future__ import annotations

import json
import math
from codecs import getincrementaldecoder
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from malmend.errors import PatchError, counted
from malmend.facts.tokens import EndOfAnswer
from malmend.files import reason, written_beside
from malmend.given import checked
from malmend.patch import Patch

FORMAT = 1


@checked()
def save_patch(patch: Patch, path: str | Path) -> Patch:
    """Writes the file beside, reads it back and renames it; returns what was read.

    So no half-written patch is ever found, and one that cannot be used replaces none.  Tensors are
    written as float32, whatever they are.

    Raises:
        PatchError: what is read is not what was to be written.
        MalmendError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, factors in patch.factors.items():
        parts = ("shift",) if len(factors) == 1 else ("left", "right")
        for part, one in zip(parts, factors, strict=True):
            # A copy, since two layers' may be one tensor.
            tensors[f"{name}.{part}"] = one.detach().float().contiguous().clone()
    header = {"malmend": json.dumps({"format": FORMAT, **patch.provenance}, allow_nan=False)}
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata=header)
        back = _read(beside, Path(path))
        read = [one for name in patch.factors for one in back.factors.get(name, ())]
        written = list(tensors.values())
        if len(read) != len(written) or not all(map(torch.equal, read, written)):
            raise PatchError(
                f"{path} did not read back as it was written, so it was discarded; the "
                "disk is at fault, write elsewhere."
            )
    return back


@checked()
def load_patch(path: str | Path) -> Patch:
    """Reads a patch.

    Raises:
        PatchError: no such file, not a patch, damaged, or written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise PatchError(f"There is no patch file {path}; give the path that `malmend edit` wrote.")
    return _read(path, path)


def replaced(path: str | Path) -> list[str]:
    """A line about the file whose place a new patch takes; none where there is no file."""
    if not Path(path).is_file():
        return []
    what = ["no patch"]
    with suppress(OSError, SafetensorError, ValueError, RecursionError, KeyError, TypeError):
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["malmend"])
        facts = [counted(said["facts"], "fact")] if "facts" in said else []
        what = [said["method"], *facts, f"made {said['created'][:10]}"]
    return [f"{Path(path).name} will be replaced (it is {', '.join(what)})."]


def _read(place: Path, path: Path) -> Patch:
    """The patch that lies at a place, by the path that a person knows."""
    try:
        with safe_open(place, framework="pt") as file:
            header = plain_json((file.metadata() or {}).get("malmend", "null"))
            # Copies, because a tensor of the file changes when somebody overwrites the file.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise PatchError(
            f"{path} {_otherwise(place) or f'is no patch or is damaged ({reason(error)})'}; "
            "give a file that `malmend edit` wrote."
        ) from error
    if not isinstance(header, dict):
        raise PatchError(f"{path} is a safetensors file but no patch: its header does not say so.")
    if header.get("format") != FORMAT:
        raise PatchError(
            f"{path} has patch format {header.get('format')!r}, this version reads {FORMAT}; "
            "use the malmend version that wrote it."
        )
    del header["format"]
    check_header(path, header)
    return Patch(_grouped(path, tensors), header)


def plain_json(text: str) -> Any:
    """What a text in JSON says; ValueError for NaN and infinity, which could not be written again.

    Python reads those words, and a number that is too large as infinity.
    """

    def refused(said: str) -> NoReturn:
        raise ValueError(f"{said[:40]} is no number of JSON")

    def number(said: str) -> float:
        return found if math.isfinite(found := float(said)) else refused(said)

    return json.loads(text, parse_constant=refused, parse_float=number)


def _otherwise(path: Path) -> str:
    """What a file that cannot be read as a patch is, where that is plain to see."""
    with suppress(OSError, UnicodeDecodeError), open(path, "rb") as file:
        start = file.read(64)
        if not start:
            return "is empty and no patch"
        # The length of a patch's header, with which it begins, has zeros.
        if getincrementaldecoder("utf-8")().decode(start) and min(start) >= ord("\t"):
            return "is a text, as files of facts are, and no patch"
    return ""


def check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Raises PatchError unless the parts of a header that are read make sense."""
    for name in ("settings", "configuration", "cut"):
        if not isinstance(part := header.get(name, {}), dict):
            raise PatchError(
                f"{path} is damaged: its header's {name} is {json.dumps(part)[:40]}, expected an "
                "object."
            )
    end = header.get("settings", {}).get("end_of_answer", "none")
    if end not in get_args(EndOfAnswer):
        valid = ", ".join(map(repr, get_args(EndOfAnswer)))
        raise PatchError(
            f"{path} is damaged: its end of answer is {end!r}, expected one of {valid}."
        )


def _grouped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Tensors by site, checked: known parts, matching shapes, finite numbers and shifts."""
    factors: dict[str, tuple[Tensor, ...]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        fits = tensor.ndim == 2 and tensor.dtype == torch.float32
        if part not in ("shift", "left", "right") or not name or not fits:
            raise PatchError(f"{path} holds {key!r}, expected 2-D float32 shifts; it is damaged.")
        if not torch.isfinite(tensor).all():
            raise PatchError(f"{path} holds NaN or infinity in {key!r}; it is damaged.")
        if part != "shift" and f"{name}.shift" in tensors:
            raise PatchError(f"{path} holds both {name}.shift and {key}; it is damaged.")
        if part == "shift":
            factors[name] = (tensor,)
        elif part == "left":
            right = tensors.get(f"{name}.right")
            if right is None or right.ndim != 2 or right.shape[0] != tensor.shape[1]:
                raise PatchError(f"{path} lacks a fitting {name}.right; it is damaged.")
            factors[name] = (tensor, right)
        elif f"{name}.left" not in tensors:
            raise PatchError(f"{path} lacks {name}.left; it is damaged.")
    if not factors:
        raise PatchError(f"{path} holds no shift; it is damaged.")
    for name, kept in factors.items():
        if len(kept) == 2:
            check_product(path, name, *kept)
    return factors


def check_product(path: Path, name: str, left_VR: Tensor, right_RK: Tensor) -> None:
    """Raises PatchError where float32 may not hold the shift of two halves.

    By a bound on its entries, since the whole may be too large to be looked at: |L| |R|.
    """
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in (left_VR, right_RK)]
    if not norms[0] * norms[1] <= torch.finfo(torch.float32).max:  # NaN is not either
        raise PatchError(
            f"{path}: the shift of {name} is beyond what float32 holds; it is damaged."
        )
