"""A model on the bench: cut at the layers to be edited, with an encoder that fits.

What is found of a model (trunk activations, calibrations) is kept in the cache folder by the digest
of its configuration and weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from malmend.editors.checkpoint import seen_in_training
from malmend.editors.folder import said_in
from malmend.errors import FactsError, MalmendError, ModelError, counted
from malmend.evaluation.classes import away as away_from_said
from malmend.facts.alternatives import towards_alternatives
from malmend.facts.fact import Fact, FactSet, facts_digest
from malmend.facts.readers import facts_of, read_text
from malmend.facts.tokens import Encoder, EndOfAnswer
from malmend.models.budget import MemoryPlan, within
from malmend.models.device import CPU, SPREAD, places_of
from malmend.models.forms import positions_of
from malmend.models.load import (
    LoadedModel,
    load_config,
    load_model,
    load_tokenizer,
    stated_reading,
)
from malmend.models.sites import Site
from malmend.models.source import cached
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.patch import check_bare

LONGEST = 512  # tokens of a question, answer and end token included

DTYPE = "float32"  # models are loaded in where nothing is said

SHIPPED = "shipped:"  # in front of the name of an editor that the package carries


@dataclass(frozen=True, eq=False)
class Workbench:
    """A model, cut at its sites, and the encoder that edits and metrics use."""

    loaded: LoadedModel
    trunk: Trunk
    encoder: Encoder

    def within(self, plan: MemoryPlan) -> Workbench:
        """The same by a memory's plan."""
        return replace(self, trunk=within(self.trunk, plan, cached("spill")))


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
    return cached("trunk") / loaded.digest[:24]


def encoder_for(
    model: str | LoadedModel, end_of_answer: EndOfAnswer | None = "eos", chat: bool = False
) -> Encoder:
    """The encoder of a model, within the length that tokenizer and configuration state.

    Of a model by name the weights are not read, unless its tokenizer lacks the end token.  Without
    ``end_of_answer`` answers end with that token, if there is one.

    Raises:
        MalmendError: the model gives no answers, or its tokenizer is of no use.
    """
    tokenizer = tokenizer_of(model)
    if isinstance(model, LoadedModel):
        stated, reading = model.positions, model.reading
        table = model.model.get_input_embeddings()
        tokens = len(table.weight) if isinstance(table, nn.Embedding) else None
    else:
        config = load_config(model)
        stated, reading = positions_of(config), stated_reading(config)
        tokens = getattr(config.get_text_config(), "vocab_size", None)
        tokens = tokens if isinstance(tokens, int) and tokens > 0 else None
    ends = getattr(tokenizer, "eos_token_id", None) is not None
    if end_of_answer is None:
        end_of_answer = "eos" if ends else "none"
    asks_end = end_of_answer == "eos" and reading.form != "classes"
    if asks_end and not ends and isinstance(model, str):
        load_model(model)  # says more of an encoder without a head, whose tokenizer ends nothing
    longest = min(LONGEST, int(getattr(tokenizer, "model_max_length", LONGEST)), stated or LONGEST)
    return Encoder(tokenizer, end_of_answer, longest, chat, replace(reading, tokens=tokens))


def checked_facts(
    facts: str | Path | Sequence[Fact],
    encoder: Encoder,
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
) -> FactSet:
    """Reads facts and checks that every question can be encoded; needs no model.

    Raises:
        FactsError: with every fault of the file, or every question that the tokenizer breaks, or
            every fact without an alternative where ``alternative`` asks for it.
        MalmendError: ``away``, which :func:`aimed` sees to, where it makes no sense.
    """
    if away and encoder.reading.form != "classes":
        raise MalmendError(
            "--away is for classifiers, whose answers are classes; leave it out, or give "
            "--alternative to edit towards false answers."
        )
    if away and alternative:
        raise MalmendError("--away and --alternative aim at different answers; give one of them.")
    known = facts_of(facts, limit, strict)
    if alternative:
        known = towards_alternatives(known)
    check_encodes(known, encoder)
    return known


def check_calibration(
    encoder: Encoder, facts: str | Path | Sequence[Fact] | None, text: str | Path | None
) -> None:
    """Reads what is given to calibrate by, so that what cannot be used is found before the work.

    Raises:
        FactsError: as :func:`checked_facts`, or there is no such text.
    """
    if facts is not None:
        checked_facts(facts, encoder)
    if text is not None:
        read_text(text)


def check_encodes(facts: FactSet, encoder: Encoder) -> None:
    """Raises FactsError with every question that this model cannot be asked, by line and field."""
    if faults := encoder.faults(facts):
        one = len(faults) == 1
        raise FactsError(
            f"{facts.source}: {len(faults):,} question{'' if one else 's'} "
            f"{'does' if one else 'do'} not fit this model:",
            faults,
        )


def aimed(bench: Workbench, facts: FactSet, away: bool) -> FactSet:
    """The facts as they are, or each aiming at what the unedited model does not say.

    Raises:
        FactsError: as :func:`malmend.facts.alternatives.away_from`.
    """
    return away_from_said(bench.trunk, bench.encoder, facts) if away else facts


def opened(model: str | LoadedModel, dtype: str = DTYPE, device: str = CPU) -> LoadedModel:
    """A model by name, or one that is loaded already.

    Raises:
        ModelError: of a loaded one another dtype or device is asked for, or it is being trained.
    """
    if not isinstance(model, LoadedModel):
        return load_model(model, dtype, device)
    if any(module.training for module in model.model.modules()):
        raise ModelError(
            f"{model.name} is in training mode, in which dropout changes what it says each time, "
            "expected evaluation mode; call eval() on the model first."
        )
    places = places_of(model.model)
    on_it = all(f"{one}:".startswith(f"{device}:") for one in places.split(", "))
    is_there = device == CPU or on_it or (device == SPREAD and places != CPU)
    if dtype not in (DTYPE, model.dtype) or not is_there:  # the defaults say nothing
        raise ModelError(
            f"dtype {dtype!r} and device {device!r} were asked for of {model.name}, which is "
            f"loaded already, in {model.dtype} on {places}; load it so, or leave them out."
        )
    return model


def tokenizer_of(model: str | LoadedModel) -> object:
    """The tokenizer of a model by name, without its weights."""
    return model.tokenizer if isinstance(model, LoadedModel) else load_tokenizer(model)


def shipped_editor(base: str) -> Path | None:
    """The folder of the editor that the package carries for a model with this fingerprint."""
    return next((one for one in shipped_editors() if said_in(one).get("base") == base), None)


def shipped_editors() -> list[Path]:
    """The folders of all editors that the package carries."""
    return [about.parent for about in sorted(shipped("editors").glob("*/editor.json"))]


def trained_on(said: Mapping[str, Any], facts: Sequence[Fact]) -> int | None:
    """How many of the facts a patch's editor learned from; None where that is not known.

    The editor is known by its identity: under its name another one may lie by now, and the name of
    a patch's header is never taken for a path inside the package.
    """
    name, identity = said.get("editor"), said.get("editor_id")
    if not isinstance(name, str) or not isinstance(identity, str):
        return None
    folders = shipped_editors() if name.startswith(SHIPPED) else [Path(name)]
    counts = (seen_in_training(folder, identity, facts) for folder in folders)
    return next((count for count in counts if count is not None), None)


def others_asked(said: Mapping[str, Any], facts: Sequence[Fact], name: str) -> list[str]:
    """A line where the facts asked do not begin with those that a patch was made of.

    Its header holds one digest of them all, so that of fewer facts than it has nothing is known.
    """
    count, digest = said.get("facts"), said.get("facts_sha256")
    if not isinstance(count, int) or not isinstance(digest, str) or not 0 < count <= len(facts):
        return []
    if facts_digest(facts[:count]) == digest:
        return []
    return [
        f"{name} was made of {counted(count, 'fact')}, which are not the first "
        "that are asked now, or had other answers."
    ]


def shipped(name: str) -> Path:
    """A data file of the package."""
    return Path(str(resources.files("malmend") / "data" / name))
