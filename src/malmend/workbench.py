"""A model on the bench: cut at the layers to be edited, with an encoder that fits, and calibrated.

What is found of a model (trunk activations, calibrations) is kept in the cache folder by the
fingerprint of its weights.
"""

from __future__ import annotations

import json
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
from malmend.editors.checkpoint import seen_in_training
from malmend.editors.settings import EditorSettings
from malmend.errors import FactsError, MalmendError
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Fact, FactSet, Question, spread
from malmend.facts.readers import given_facts, read_facts, read_questions, read_text
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.files import kept
from malmend.models.load import (
    LoadedModel,
    cache_folder,
    load_config,
    load_model,
    load_tokenizer,
    positions_of,
    stated_reading,
)
from malmend.models.sites import Site
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import Patch, check_bare

LONGEST = 512  # tokens of a question, answer and end token included
MOST_KEPT = 2_000_000_000  # bytes of calibrations in the cache folder

Progress = Callable[[str, float], None]
SHIPPED = "shipped:"  # in front of the name of an editor that the package carries


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
    if isinstance(model, LoadedModel):
        stated, reading = model.positions, model.reading
    else:
        config = load_config(model)
        stated, reading = positions_of(config), stated_reading(config)
    if end_of_answer is None:
        ends = getattr(tokenizer, "eos_token_id", None) is not None
        end_of_answer = "eos" if ends else "none"
    longest = min(LONGEST, int(getattr(tokenizer, "model_max_length", LONGEST)), stated or LONGEST)
    return Encoder(tokenizer, end_of_answer, longest, chat, reading)


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
    facts: str | Path | Sequence[Fact] | None = None,
    text: str | Path | None = None,
    settings: CalibrationSettings = CalibrationSettings(),
    progress: Progress = silent,
    questions: Sequence[Question] = (),
) -> Calibration:
    """The model's calibration, from the cache folder or made now.

    Args:
        bench: the model.
        editor_settings: what the editor is.
        facts: facts, or a file of some, in place of the project's own calibration facts.
        text: a text file in place of the project's own text.
        settings: sizes and candidates.
        progress: called with stage and share done.
        questions: more questions whose answers must not move, beside the project's own.
    """
    known, words, general = _calibration_data(bench, facts, text, settings)
    general = [*general, *questions]
    # The network's size changes nothing that is calibrated.
    plain = replace(editor_settings, network=replace(editor_settings.network, blocks=0))
    key = calibration_key(bench.loaded.digest, bench.trunk, plain, settings, known, words, general)
    path = cache_folder() / "calibrations" / f"{key}.safetensors"
    return kept(
        path,
        load_calibration,
        lambda: calibrate(
            bench.trunk, bench.encoder, plain, known, words, settings, progress, general
        ),
        save_calibration,
        MOST_KEPT,
    )


def _calibration_data(
    bench: Workbench,
    facts: str | Path | Sequence[Fact] | None,
    text: str | Path | None,
    settings: CalibrationSettings,
) -> tuple[list[Fact], str, list[Question]]:
    """Calibration facts, evenly over their file, text, and general questions.

    They are the project's own where none are given; of the questions as many as of the facts.

    Raises:
        MalmendError: the tokenizer can say none of the project's facts.
    """
    encoder, count = bench.encoder, max(settings.moment_facts, settings.prior_facts)
    if facts is None:
        # Only what this tokenizer can say; a user's own file is refused instead.  Twice as many as
        # are needed: a tokenizer that can say few words lacks some, and to ask about all is slow.
        known = [f for f in read_facts(shipped("facts.jsonl")) if "train" in f.tags]
        known = spread(known, 2 * count)
        known = [fact for fact in known if not encoder.faults([fact])]
    else:
        known = list(checked_facts(facts, encoder))
    # One after another of a file are often of one relation.
    known = spread(known, count)
    if not known:
        raise MalmendError(
            "This tokenizer can say none of the project's calibration facts; give facts of your "
            "own with --calibrate FACTS."
        )
    asked = [q for q in read_questions(shipped("questions.jsonl"))[: 2 * count] if q.answer]
    general = [q for q in asked if not encoder.faults([Fact("", q.prompt, q.answer or "")])]
    words = read_text(shipped("text.txt") if text is None else text)
    return known, words, general[:count]


def shipped_editor(base: str) -> Path | None:
    """The folder of the editor that the package carries for a model with this fingerprint."""
    for about in sorted(shipped("editors").glob("*/editor.json")):
        if json.loads(about.read_text(encoding="utf-8"))["base"] == base:
            return about.parent
    return None


def trained_on(patch: Patch, facts: Sequence[Fact]) -> int | None:
    """How many of the facts the patch's editor learned from; None where that is not known.

    The editor is known by its identity: under its name another one may lie by now, and the name of
    a patch's header is never taken for a path inside the package.
    """
    name, identity = (patch.provenance.get(entry) for entry in ("editor", "editor_id"))
    if not isinstance(name, str) or not isinstance(identity, str):
        return None
    carried = shipped("editors").glob("*/editor.json")
    is_shipped = name.startswith(SHIPPED)
    folders = [about.parent for about in carried] if is_shipped else [Path(name)]
    counts = (seen_in_training(folder, identity, facts) for folder in folders)
    return next((count for count in counts if count is not None), None)


def shipped(name: str) -> Path:
    """A data file of the package."""
    return Path(str(resources.files("malmend") / "data" / name))
