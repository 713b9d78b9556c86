"""A patch as a LoRA adapter or a merged model, measured as it was read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from malmend.errors import MalmendError, PatchError, nearest
from malmend.facts.fact import FactSet
from malmend.facts.lint import skipped_said
from malmend.facts.readers import read_text
from malmend.files import folder_beside, new_folder
from malmend.given import checked
from malmend.models.load import DTYPES, LoadedModel
from malmend.models.source import lasting
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch, by_one_thread, misfit, now
from malmend.progress import Progress, silent
from malmend.shipping.adapter import based_on, read_patch
from malmend.shipping.card import CARD, card
from malmend.shipping.export import Cutting, export_adapter, export_merged
from malmend.shipping.layers import check_exportable
from malmend.shipping.measure import Asking, Measured, bench_for, check_decoded, measured, plain
from malmend.shipping.merged import base_dtype, cast_copy
from malmend.shipping.record import write_record
from malmend.shipping.truncate import check_rank
from malmend.workbench import Workbench, aimed, checked_facts, encoder_for, opened, shipped

To = Literal["lora", "merged"]
DECODED = 64  # facts that are also answered free-running, the slow part


@dataclass(frozen=True, eq=False)
class ExportResult:
    """A finished export.

    Attributes:
        folder: what can be loaded and pushed.
        record: what ``malmend.json`` in it says.
        metrics: scores of the unedited model, of the patch and of what was exported, read back, by
            kind of question; empty without facts.
    """

    folder: Path
    record: Mapping[str, Any] = field(repr=False)
    metrics: Measured = field(repr=False)


@by_one_thread
@checked("patch")
def export(
    patch: str | Path | Patch,
    folder: str | Path,
    to: To = "lora",
    model: str | LoadedModel | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    facts: str | Path | None = None,
    limit: int | None = None,
    decode_facts: int | None = DECODED,
    text: str | Path | None = None,
    force: bool = False,
    trunk: TrunkSettings = TrunkSettings(),
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Writes what others can load without malmend: a LoRA adapter, or a whole model.

    Args:
        patch: a patch, its file, or a LoRA adapter's folder.
        folder: to be made; must not hold files.
        to: "lora", an adapter in PEFT's format; "merged", a model's folder with tokenizer and
            generation config.
        model: the base, where it does not lie under the name that the patch gives.
        rank: of the adapter, one that vLLM accepts; shifts of a larger one are cut to it where the
            keys feel it least. Null cuts nothing off.
        dtype: of the merged model; null for the base's own.
        facts: facts that are asked of what was exported, as read back; a cut spares their keys.
        limit: take only the first so many facts.
        decode_facts: for how many of the facts the models also answer free-running; null for all.
        text: a text file whose keys a cut spares, in place of the project's own.
        force: accept a patch that was made for another base.
        trunk: grouping of questions and the disk budget for trunk activations.
        progress: called with stage and share done.
        told: called about facts that were skipped, before the work.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    _check(to, rank, dtype, text, decode_facts)
    if facts is None and limit is not None:
        raise MalmendError("--limit is of the facts that are asked; give --facts, or leave it out.")
    folder = new_folder(folder)
    patch = read_patch(patch)
    base = model if model is not None else _named(patch)
    end, aims = patch.end_of_answer, patch.aims
    known = None
    if facts is not None:  # whatever is wrong with them is found before a weight is read
        known = checked_facts(facts, encoder_for(base, end), limit, **aims)
        for line in skipped_said(known.skipped, strict=False):
            told(line)
    dtype = dtype or (base_dtype(base) if to == "merged" else "float32")
    cutting = _cutting(rank, text, known)
    loaded = opened(base)
    patch = based_on(patch, loaded)
    check_exportable(loaded, patch, force)
    bench = bench_for(loaded, [patch], encoder_for(loaded, end).end_of_answer, trunk)
    if known is not None:
        known = aimed(bench, known, aims["away"])
    form: Patch | LoadedModel
    with folder_beside(folder) as beside:
        if to == "lora":
            said, form = export_adapter(bench, patch, beside, cutting, progress)
        else:
            said, form = export_merged(bench, patch, beside, dtype, progress)
            bench = _in(dtype, bench, patch, trunk)
        found: Measured = {}
        asked: dict[str, int] = {}
        if known is not None:
            asking = Asking(known, decode_facts)
            asked = {"asked": len(known), "decoded_facts": asking.decoded}
            found = measured(bench, asking, {"patch": patch, "exported": form}, progress)
        record = {
            "to": to,
            **_about(loaded, patch),
            "dtype": dtype,
            **said,
            "facts": known.source if known is not None else None,
            **asked,
            "metrics": plain(found),
        }
        write_record(beside, record)
        words = card(record, loaded.reading.form)  # which may name a path that is no UTF-8
        (beside / CARD).write_text(words, encoding="utf-8", errors="backslashreplace")
    return ExportResult(folder, record, found)


def _check(
    to: str, rank: int | None, dtype: str | None, text: object, decode_facts: int | None
) -> None:
    """What can be refused before anything is read."""
    if to not in get_args(To):
        raise MalmendError(
            f"--to is {to!r}{nearest(to, get_args(To)) or '.'} Expected lora or merged."
        )
    if to == "merged" and (rank is not None or text is not None):
        raise MalmendError(
            "A merged model holds the whole shift, so --rank and --text are of --to lora; leave "
            "them out."
        )
    if to == "lora" and rank is None and text is not None:
        raise MalmendError("--text says which keys a cut spares; give --rank too, or leave it out.")
    if to == "lora" and dtype is not None:
        raise MalmendError("An adapter is float32; leave --dtype out, or give --to merged.")
    if dtype is not None and dtype not in DTYPES:
        raise MalmendError(
            f"--dtype is {dtype!r}{nearest(dtype, DTYPES) or '.'} Expected one of "
            f"{', '.join(DTYPES)}."
        )
    check_decoded(decode_facts)
    if rank is not None:
        check_rank(rank)


def _named(patch: Patch) -> str:
    """The base's name, as the patch has it."""
    name = patch.provenance.get("model")
    if not isinstance(name, str) or not name:
        raise PatchError("The patch does not say which model it was made for; give --model.")
    return name


def _cutting(rank: int | None, text: str | Path | None, facts: FactSet | None) -> Cutting:
    words = read_text(shipped("text.txt") if text is None else text)
    source = "general text" if text is None else Path(text).name
    if facts is None:
        return Cutting(rank, words, keys=source)
    return Cutting(rank, words, facts.facts, f"{source} and of the facts")


def _in(dtype: str, bench: Workbench, patch: Patch, trunk: TrunkSettings) -> Workbench:
    """The base in the dtype of what was merged, so that like is measured beside like."""
    loaded = bench.loaded
    if loaded.model.dtype == DTYPES[dtype]:
        return bench
    return bench_for(cast_copy(loaded, dtype), [patch], bench.encoder.end_of_answer, trunk)


def _about(loaded: LoadedModel, patch: Patch) -> dict[str, Any]:
    return {
        "malmend": version("malmend"),
        "created": now(),
        "model": lasting(loaded.name),
        "base": loaded.fingerprint,
        **({"forced": True} if misfit(loaded, patch) else {}),
        "patch": dict(patch.provenance),
    }
