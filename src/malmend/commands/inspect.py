"""What is in a model, an editor, a patch or a facts file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malmend.editors.checkpoint import load_editor
from malmend.editors.folder import said_in
from malmend.errors import MalmendError
from malmend.evaluation.page import FIGURES, PAGE
from malmend.facts.entry import short
from malmend.facts.fact import training_digests
from malmend.facts.lint import leaks, unseen
from malmend.facts.readers import nearest_file, read_facts
from malmend.files import reason
from malmend.given import checked
from malmend.ledgers.tables import FILE as LEDGER
from malmend.methods.trained import TRAINED, method_in, trained_method
from malmend.models.cut import Cut
from malmend.models.load import LoadedModel, load_model
from malmend.models.sites import Linear, Side, Site, around, find_sites
from malmend.models.source import BUILT_IN
from malmend.shipping.adapter import is_adapter, read_patch

FORMS = {
    "causal": "decoder",
    "classes": "encoder with a classification head",
    "seq2seq": "encoder-decoder",
}
FILES = (".json", ".safe", ".txt")  # how the suffix of a file starts that is no model's name
NO_LOCALITY = training_digests([], [])["locality_sha256"]  # what train says of no questions


@dataclass(frozen=True)
class Inspection:
    """``kind`` is model, editor, patch, adapter or facts; ``entries`` say the rest, in order."""

    kind: str
    name: str
    entries: Mapping[str, Any]

    def __repr__(self) -> str:
        entries = ", ".join(f"{name}: {short(value)}" for name, value in self.entries.items())
        return f"Inspection({self.kind!r}, {self.name!r}, {entries})"


@checked()
def inspect(
    thing: str | Path,
    layers: int | None = None,
    sites: str | None = None,
    linear: Linear = "second",
    side: Side = "both",
    dtype: str = "float32",
) -> Inspection:
    """Looks at a model, editor, patch or facts file and says what it is.

    Args:
        thing: a model's name, folder or GGUF file; an editor's folder; a patch, or a LoRA adapter's
            folder; a facts file.
        layers: which sites of a model to show: the last so many blocks', null for six.
        sites: which sites of a model to show, by name or pattern.
        linear: which of a block's feed-forward layers, "second", "first" or "both".
        side: which half of an encoder-decoder, "encoder", "decoder" or "both".
        dtype: in which a model is loaded.
    """
    path, of_model = Path(thing), (layers, sites, linear, side) != (None, None, "second", "both")

    def model() -> Inspection:
        loaded = load_model(str(thing), dtype)
        found = find_sites(loaded.model, layers, sites, linear, side)
        settle = loaded.reading.form == "causal" and sites is None
        return _model(loaded, found, around(loaded.model, found) if settle else ())

    if str(thing) in BUILT_IN or path.suffix.lower() == ".gguf":
        return model()
    try:
        found = _reader(path)
    except OSError as error:  # of a name that no file can have, or a file that may not be read
        raise MalmendError(
            f"{short(str(thing))} cannot be read ({reason(error)}); give a model, an editor, a "
            "patch or a facts file."
        ) from error
    if found is not None:
        kind, read = found
        if of_model:
            raise MalmendError(
                f"{thing} is {kind}, and --layers, --sites, --linear and --side say which sites of "
                "a model to show; leave them out, or give a model."
            )
        return read(path)
    _check_is_read(path)
    if path.suffix.startswith(FILES) and not path.is_dir():
        hint = nearest_file(path) or "."
        raise MalmendError(f"There is no file {thing}{hint} Give a file, or a model's name.")
    return model()


def _check_is_read(path: Path) -> None:
    """Raises MalmendError about what malmend writes and another way reads."""
    if (path / LEDGER).is_file():
        raise MalmendError(
            f"{path} is a ledger, expected a model, an editor, a patch or a facts file; see "
            f"malmend ledger list {path}."
        )
    if (path / PAGE).is_file() and (path / FIGURES).is_file():
        raise MalmendError(
            f"{path} is the folder of a report, expected a model, an editor, a patch or a facts "
            f"file; open its {PAGE} in a browser."
        )


def _reader(path: Path) -> tuple[str, Callable[[Path], Inspection]] | None:
    """What lies there, and who reads it; None for a model, and where nothing is."""
    if path.is_dir():
        if is_adapter(path):
            return "an adapter", _adapter
        if method_in(path) in TRAINED:
            return "a trained method", _trained
        return ("an editor", _editor) if (path / "editor.json").is_file() else None
    if path.is_file():
        return ("a patch", _patch) if _is_safetensors(path) else ("a facts file", _facts)
    return None


def _model(loaded: LoadedModel, found: Sequence[Site], around: Sequence[Site]) -> Inspection:
    Cut(loaded.model, found)  # what an edit would refuse is refused here
    beside = [site for site in around if site not in found]
    reading = loaded.reading
    entries = {
        "class": type(loaded.model).__name__,
        "form": FORMS[reading.form],
        **({"classes": ", ".join(reading.classes)} if reading.classes else {}),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "dtype": loaded.dtype,
        "fingerprint": loaded.fingerprint,
        "sites": _shapes(found),
        **({"sites that settle too (--refine.around)": _shapes(beside)} if beside else {}),
    }
    return Inspection("model", loaded.name, entries)


def _shapes(sites: Sequence[Site]) -> dict[str, str]:
    return {site.name: "{} x {}".format(*site.shape_VK) for site in sites}


def _editor(path: Path) -> Inspection:
    saved = load_editor(path)
    about = {name: value for name, value in saved.about.items() if name != "curve"}
    if about.get("locality_sha256") == NO_LOCALITY:
        del about["locality_sha256"]
    about["learned"] = sum(p.numel() for p in saved.editor.parameters())
    if curve := saved.about.get("curve"):
        about["last step"] = curve[-1]
    return Inspection("editor", str(path), about)


def _trained(path: Path) -> Inspection:
    """A method that is no editor; its own reading checks the folder."""
    method = trained_method(path)
    assert method is not None
    ends = method.end_of_answer  # reads the whole folder
    return Inspection("editor", str(path), {**said_in(path), "end_of_answer": ends})


def _patch(path: Path) -> Inspection:
    patch = read_patch(path)
    shifts = {}
    for name, factors in patch.factors.items():
        rows, columns = patch.shape_VK(name)
        kept = f"rank {factors[0].shape[1]}" if len(factors) == 2 else "full"
        shifts[name] = f"{rows} x {columns}, {kept}, norm {_norm(factors):.3g}"
    return Inspection("patch", str(path), {**patch.provenance, "shifts": shifts})


def _norm(factors: tuple[Tensor, ...]) -> float:
    """Of the shift, by the smaller of R x R and V x K: neither is larger than the file."""
    if len(factors) == 1:
        return float(torch.linalg.vector_norm(factors[0], dtype=torch.float64))
    left_VR, right_RK = (one.double() for one in factors)
    (values, rank), keys = left_VR.shape, right_RK.shape[1]
    if rank * rank > values * keys:
        return float((left_VR @ right_RK).norm())
    return float(((left_VR.T @ left_VR) * (right_RK @ right_RK.T)).sum().clamp(min=0).sqrt())


def _adapter(path: Path) -> Inspection:
    return replace(_patch(path), kind="adapter")


def _facts(path: Path) -> Inspection:
    _check_no_report(path)
    known = read_facts(path)
    entries = {
        "facts": len(known),
        "with paraphrases": sum(bool(fact.paraphrases) for fact in known),
        "with unrelated questions": sum(bool(fact.unrelated) for fact in known),
        "with neighbours": sum(bool(fact.neighbours) for fact in known),
        "with a reversed prompt": sum(fact.reversed is not None for fact in known),
        "with an alternative": sum(fact.alternative is not None for fact in known),
        "relations": len({fact.relation for fact in known if fact.relation}),
        "skipped": [
            f"{one.fact.where}: {one.kind} of {one.earlier.where}" for one in known.skipped
        ],
        "leaks": leaks(known),
        "characters that nobody sees": unseen(known),
        "first": {"prompt": known[0].prompt, "answer": known[0].answer},
    }
    return Inspection("facts", str(path), entries)


def _check_no_report(path: Path) -> None:
    """Raises MalmendError about the JSON that an evaluation writes, which lists facts too."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # whoever reads it next says what is wrong
    if isinstance(read, dict) and {"facts", "unedited", "about", "protocols", "rows"} <= set(read):
        raise MalmendError(
            f"{path} is a report of malmend eval, expected a model, an editor, a patch or a facts "
            "file; it is JSON for other programs, and --report FOLDER writes it as a page."
        )


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with its header's length and an opening brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and 0 in start)
