"""The layers that a patch shifts, as far as an export can carry them."""

from __future__ import annotations

from dataclasses import replace

from malmend.errors import PatchError
from malmend.models.blocks import PLAIN, is_linear
from malmend.models.forms import find_stacks
from malmend.models.load import LoadedModel
from malmend.models.sites import Site, shared_with, stack_of
from malmend.patch import Patch, check_base, sites_of


def check_exportable(loaded: LoadedModel, patch: Patch, force: bool = False) -> None:
    """Raises PatchError unless every layer is a plain linear one of a block, with its own weight.

    So it does where the patch is for another base (unless ``force``) or other layers.
    """
    check_base(loaded, patch, force)
    for site in sites_of(loaded.model, patch):
        if (why := not_plain(loaded, site)) is not None:
            raise PatchError(
                f"{site.name} {why}, so that its shift cannot be exported; make the patch again "
                "without that layer."
            )


def placed(loaded: LoadedModel, site: Site) -> Site:
    """The site with the half of an encoder-decoder that it lies in."""
    return replace(site, in_encoder=stack_of(loaded.model, site.name).in_encoder)


def not_plain(loaded: LoadedModel, site: Site) -> str | None:
    """Why a layer's shift cannot stand beside or in it alone; None where it can."""
    weight = site.weight
    if not is_linear(site.module):
        return f"is of class {type(site.module).__name__}, not a plain linear layer"
    if weight.dtype not in PLAIN or weight.is_meta:
        return f"keeps its weight as {weight.dtype} (quantised or offloaded)"
    if shared := shared_with(loaded.model, site):
        return f"shares its weight with {shared}"
    stacks = find_stacks(loaded.model)
    if not any(site.name.startswith(f"{stack.prefix}.") for stack in stacks):
        return "lies in none of the model's blocks"
    return None
