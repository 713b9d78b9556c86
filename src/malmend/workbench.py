"""A model on the bench: cut at the layers to be edited, with an encoder that fits, and calibrated.

What is found of a model (trunk activations, calibrations) is kept in the cache folder by the
fingerprint of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from malmend.editors.calibration import (
    Calibration,
    CalibrationSettings,
    calibrate,
    calibration_key,
    load_calibration,
    save_calibration,
)
from malmend.editors.editor import EditorSettings
from malmend.errors import FactsError, MalmendError
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Fact, FactSet
from malmend.facts.readers import given_facts, read_facts, read_text
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.load import (
    LoadedModel,
    cache_folder,
    load_model,
    load_positions,
    load_tokenizer,
)
from malmend.models.sites import Site
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import check_bare

LONGEST = 512  # tokens of a question, answer and end token included

Progress = Callable[[str, float], None]


def silent(stage: str, share: float) -> None:
    """Reports to nobody."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """A model, cut at its sites, and the encoder that edits and metrics use."""

    loaded: LoadedModel
    trunk: Trunk
    encoder: Encoder


def lay_out(
    loaded: LoadedModel,
    sites: Sequence[Site],
    end_of_answer: EndOfAnswer = "eos",
    chat: bool = False,
    trunk: TrunkSettings = TrunkSettings(),
) -> Workbench:
    """Cuts the model at its sites (lowest first) and makes the encoder.

    Raises:
        PatchError: a patch is on the model.
    """
    check_bare(loaded)
    cut = Trunk(loaded.model, sites, trunk, trunk_folder(loaded))
    return Workbench(loaded, cut, encoder_for(loaded, end_of_answer, chat))


def trunk_folder(loaded: LoadedModel) -> Path:
    """Where trunk activations of these weights are kept."""
    return cache_folder() / "trunk" / loaded.digest[:24]


def encoder_for(
    model: str | LoadedModel, end_of_answer: EndOfAnswer | None = "eos", chat: bool = False
) -> Encoder:
    """The encoder of a model, within the length that tokenizer and configuration state.

    Of a model by name the weights are not read.  Without ``end_of_answer`` answers end with the
    tokenizer's end token, if it has one.
    """
    tokenizer = tokenizer_of(model)
    if end_of_answer is None:
        ends = getattr(tokenizer, "eos_token_id", None) is not None
        end_of_answer = "eos" if ends else "none"
    stated = model.positions if isinstance(model, LoadedModel) else load_positions(model)
    longest = min(LONGEST, int(getattr(tokenizer, "model_max_length", LONGEST)), stated or LONGEST)
    return Encoder(tokenizer, end_of_answer, longest, chat)


def checked_facts(
    facts: str | Path | Sequence[Fact],
    encoder: Encoder,
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
) -> FactSet:
    """Reads facts and checks that every question can be encoded; needs no model.

    Raises:
        FactsError: with every fault of the file, or every question that the tokenizer breaks, or
            every fact without an alternative where ``alternative`` asks for it.
    """
    if isinstance(facts, str | Path):
        known = read_facts(facts, limit, strict)
    else:
        known = given_facts(facts, limit, strict)
    if alternative:
        known = towards_alternatives(known)
    faults = encoder.faults(known)
    if faults:
        raise FactsError(
            f"{known.source}: {len(faults)} questions do not fit this model's tokenizer:",
            [f"{known.source}: {fault}" for fault in faults],
        )
    return known


def opened(model: str | LoadedModel, dtype: str = "float32") -> LoadedModel:
    """A model by name, or one that is loaded already."""
    return model if isinstance(model, LoadedModel) else load_model(model, dtype)


def tokenizer_of(model: str | LoadedModel) -> object:
    """The tokenizer of a model by name, without its weights."""
    return model.tokenizer if isinstance(model, LoadedModel) else load_tokenizer(model)


def calibrated(
    bench: Workbench,
    editor_settings: EditorSettings,
    facts: str | Path | None = None,
    text: str | Path | None = None,
    settings: CalibrationSettings = CalibrationSettings(),
    progress: Progress = silent,
) -> Calibration:
    """The model's calibration, from the cache folder or made now.

    Args:
        bench: the model.
        editor_settings: what the editor is.
        facts: a facts file in place of the project's own calibration facts.
        text: a text file in place of the project's own text.
        settings: sizes and candidates.
        progress: called with stage and share done.
    """
    encoder = bench.encoder
    if facts is None:
        known = [f for f in read_facts(shipped("places.jsonl")) if "calibration" in f.tags]
        # Only what this tokenizer can say; a user's own file is refused instead.
        known = [fact for fact in known if not encoder.faults([fact])]
    else:
        known = list(checked_facts(facts, encoder))
    # One after another of a file are often of one relation; take them evenly over the file.
    known = spread(known, settings.moment_facts)
    if not known:
        raise MalmendError(
            "This tokenizer can say none of the project's calibration facts; give facts of your "
            "own with --calibrate FACTS."
        )
    words = read_text(shipped("text.txt") if text is None else text)
    # The network's size changes nothing that is calibrated.
    plain = replace(editor_settings, network=replace(editor_settings.network, blocks=0))
    key = calibration_key(bench.loaded.digest, bench.trunk, plain, settings, known, words)
    path = cache_folder() / "calibrations" / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_calibration(path)
        except Exception:  # a damaged copy is only made again
            path.unlink(missing_ok=True)
    found = calibrate(bench.trunk, encoder, plain, known, words, settings, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_calibration(found, path)
    except (OSError, MalmendError):  # the cache cannot be written: only slower next time
        pass
    return found


def spread(facts: Sequence[Fact], count: int) -> list[Fact]:
    """``count`` facts, evenly over the list, in its order."""
    if len(facts) <= count:
        return list(facts)
    return [facts[index * len(facts) // count] for index in range(count)]


def shipped(name: str) -> Path:
    """A data file of the package."""
    return Path(str(resources.files("malmend") / "data" / name))
