"""What differs between two models, and the difference as a patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from malmend.errors import PatchError
from malmend.files import writable
from malmend.given import checked
from malmend.models.identity import configuration_of, unlike
from malmend.models.load import LoadedModel
from malmend.models.sites import Site
from malmend.models.source import lasting
from malmend.patch import Patch, by_one_thread, check_bare, now, versions
from malmend.patch_file import replaced, save_patch
from malmend.progress import Progress, silent
from malmend.shipping.compare import Comparison, compared
from malmend.shipping.layers import not_plain
from malmend.workbench import opened

SHOWN = 3  # names of weights that a patch leaves out


@dataclass(frozen=True, eq=False)
class DiffResult:
    """Two models compared.

    Attributes:
        model: name of the one.
        other: name of the other.
        comparison: what differs.
        settings: fields of the configurations that change what a model computes, with both values.
        patch: the difference as read back from the file, where one was asked for.
        path: of that file.
    """

    model: str
    other: str
    comparison: Comparison = field(repr=False)
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    patch: Patch | None = None
    path: Path | None = None


@by_one_thread
@checked()
def diff(
    model: str | LoadedModel,
    other: str | LoadedModel,
    out: str | Path | None = None,
    dtype: str = "float32",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> DiffResult:
    """Finds the layers of two models that differ, with rank and size of each difference.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        other: likewise.
        out: path of a patch that makes the other model of this one, to be measured with ``eval``
            and taken off; refused unless all that differs, but by rounding to a coarser precision
            of the other model's, are linear layers' weights.
        dtype: in which both are loaded.
        progress: called with stage and share done.
        told: called about a file that the patch will replace, before the work, and with what the
            patch leaves out.

    Raises:
        MalmendError: a model cannot be read, or the difference is no patch.
    """
    if out is not None:
        writable(out, model, other)
    mine, theirs = opened(model, dtype), opened(other, dtype)
    if out is not None:
        for one in (mine, theirs):
            check_bare(one)
        for line in replaced(out):
            told(line)
    found = compared(mine.model, theirs.model, progress)
    settings = unlike(configuration_of(mine.model), configuration_of(theirs.model))
    if out is None:
        return DiffResult(mine.name, theirs.name, found, settings)
    patch = save_patch(_patch(mine, theirs, found, settings), out)
    if left := [one.name for one in found.rounded]:
        told(
            f"The patch leaves out what differs by rounding alone, {len(left):,} "
            f"weight{'s' * (len(left) != 1)}: {', '.join(left[:SHOWN])}"
            + f" and {len(left) - SHOWN:,} more"
            * (len(left) > SHOWN)
        )
    return DiffResult(mine.name, theirs.name, found, settings, patch, Path(out))


def _patch(
    mine: LoadedModel,
    theirs: LoadedModel,
    found: Comparison,
    settings: Mapping[str, tuple[Any, Any]],
) -> Patch:
    """The edited weights as shifts, whole: W_0 + S is the other's weight but for one rounding."""
    lone = [*found.only_here, *found.only_there, *found.reshaped]
    if lone:
        raise PatchError(
            f"{lone[0]} (one of {len(lone)}) is in only one of the models, or of another shape "
            "there, so that no patch leads from one to the other; --out is for models of one build."
        )
    if settings:
        name, (here, there) = next(iter(settings.items()))
        raise PatchError(
            f"The configurations differ in {', '.join(settings)} "
            f"({name} is {here!r} and {there!r}), so that no patch of weights makes the one model "
            "of the other; --out is for models of one build."
        )
    if not found.edited:
        raise PatchError(
            f"{mine.name} and {theirs.name} do not differ by more than rounding, so there is no "
            "patch to write."
        )
    factors = {}
    for one in found.edited:
        name, _, last = one.name.rpartition(".")
        why = "is no weight of a linear layer"
        if last == "weight" and len(one.shape) == 2:
            site = Site(name, mine.model.get_submodule(name))
            why = not_plain(mine, site) or ""
        if why:
            raise PatchError(
                f"{one.name} differs and {why}, so that the difference is no patch; without --out "
                "it is shown."
            )
        before, after = (m.model.get_parameter(one.name).detach().cpu() for m in (mine, theirs))
        factors[name] = (site.oriented(after.double() - before.double()).float().contiguous(),)
    return Patch(factors, _provenance(mine, theirs))


def _provenance(mine: LoadedModel, theirs: LoadedModel) -> dict[str, object]:
    return {
        **versions(),
        "model": lasting(mine.name),
        "base": mine.fingerprint,
        "method": "diff",
        "other": lasting(theirs.name),
        "other_base": theirs.fingerprint,
        "created": now(),
        "settings": {},
        "configuration": configuration_of(mine.model),
    }
