"""How well a model, edited or not, answers questions about facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from malmend.editors.calibration import CalibrationSettings
from malmend.errors import FactsError, MalmendError
from malmend.evaluation.examiner import Examiner
from malmend.evaluation.page import page_folder, write_page
from malmend.evaluation.perplexity import PlainText, perplexity, unread, whole_or_first
from malmend.evaluation.protocols import groups_of, scores
from malmend.evaluation.replies import Replies, rows_of
from malmend.evaluation.report import Report
from malmend.facts.fact import Fact, FactSet
from malmend.facts.lint import leaks, skipped_said, unseen
from malmend.facts.readers import read_text
from malmend.facts.tokens import Encoder
from malmend.given import checked
from malmend.models.device import places_of
from malmend.models.load import LoadedModel
from malmend.models.sites import Site, usual_sites
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch, applied, by_one_thread, check_base, sites_of
from malmend.progress import Progress, counting, silent
from malmend.shipping.adapter import based_on, read_patch
from malmend.shipping.measure import check_decoded
from malmend.workbench import (
    Workbench,
    aimed,
    checked_facts,
    encoder_for,
    lay_out,
    opened,
    others_asked,
    shipped,
    trained_on,
)


@by_one_thread
@checked("facts", "patch")
def evaluate(
    model: str | LoadedModel,
    facts: str | Path | Sequence[Fact],
    patch: str | Path | Patch | None = None,
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
    chat: bool = False,
    decode_facts: int | None = None,
    text: str | Path | None = None,
    report: str | Path | None = None,
    force: bool = False,
    trunk: TrunkSettings = TrunkSettings(),
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = silent,
    told: Callable[[str], None] = lambda line: None,
) -> Report:
    """Asks everything about the facts, of the unedited model and, with a patch, of the edited one.

    Args:
        model: a name, a folder, a GGUF file, or a loaded model.
        facts: a facts file, or facts.
        patch: a patch, its file, or a LoRA adapter's folder.
        limit: take only the first so many facts.
        strict: refuse duplicates and contradictions in place of skipping the later ones.
        alternative: ask for each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: ask for what the unedited model does not say of each fact.
        chat: ask everything through the model's chat template; without it only the free-running
            answers are asked for through it too, where the model has one.
        decode_facts: for how many of the facts the model also answers free-running (the slow
            part); null for all.
        text: a text file for perplexity before and after, of which the first 20,000 tokens are
            read, in place of the lines of the project's own text that the prior has not read;
            "none" measures none.
        report: a folder for the report as an HTML page, with its figures as JSON beside.
        force: accept a patch that was made for another base.
        trunk: grouping of questions and the disk budget for trunk activations.
        dtype: in which the model is loaded.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        progress: called with stage and share done.
        told: called before the work about facts that were skipped, and where those that are asked
            do not begin with the patch's own.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    check_decoded(decode_facts)
    inputs = (facts, patch, text, model)
    patch = None if patch is None else read_patch(patch)
    # As the patch was made, so that its facts are read as they were edited.
    encoder = encoder_for(model, patch.end_of_answer if patch else None, chat)
    known = checked_facts(facts, encoder, limit, strict, alternative, away)
    chatted = None if chat else chat_encoder(encoder, known, decode_facts)
    plain = _plain_text(text, encoder, patch)
    if report is not None:
        page_folder(report, *inputs)
    for line in skipped_said(known.skipped):
        told(line)
    loaded = opened(model, dtype, device)
    patch = None if patch is None else based_on(patch, loaded)
    bench = lay_out(loaded, _sites(loaded, patch, force), encoder.end_of_answer, chat, trunk)
    known = aimed(bench, known, away)
    for line in others_asked(patch.provenance, known.facts, "The patch") if patch else ():
        told(line)
    examiner = Examiner(loaded, bench.trunk, bench.encoder, chat=chatted)
    questions = examiner.count(known, decode_facts) * (2 if patch else 1)
    examiner.progress = counting(progress, "asking", questions)
    before = examiner.examine(known, decode_facts, remember=True)
    surprise = _perplexity("unedited", bench, plain, progress)
    after = None
    if patch is not None:
        with applied(loaded, patch, force):
            after = examiner.examine(known, decode_facts)
            surprise |= _perplexity("edited", bench, plain, progress)
    progress("asking", 1.0)
    asked = {
        "alternative": alternative,
        "away": away,
        "chat": chat,
        "decoded_facts": len(known) if decode_facts is None else min(decode_facts, len(known)),
        "text": plain.source if plain else "none" if text == "none" else None,
    }
    found = _report(known, before, after, surprise, _about(loaded, known, patch) | asked)
    if report is not None:
        write_page(found, report)
    return found


def _report(
    facts: FactSet,
    before: Replies,
    after: Replies | None,
    surprise: Mapping[str, float],
    about: Mapping[str, Any],
) -> Report:
    rows = rows_of(facts, before, after)
    return Report(
        facts=len(facts),
        about=about,
        unedited=scores(before),
        edited=scores(after, before) if after else {},
        perplexity=surprise,
        rows=rows,
        groups=groups_of(rows),
        leaks=leaks(facts),
        unseen=unseen(facts),
    )


def _plain_text(
    given: str | Path | None, encoder: Encoder, patch: Patch | None
) -> PlainText | None:
    """The text that perplexity is measured on; None where none is left or wanted.

    Raises:
        MalmendError: a text is given for a model that does not go on with texts.
    """
    if given == "none":
        return None
    if encoder.reading.form != "causal":
        if given is None:
            return None
        raise MalmendError(
            "Perplexity is of decoders only, and this model has an encoder; leave out --text."
        )
    if given is not None:
        return whole_or_first(encoder, read_text(given), str(given))
    return unread(encoder, read_text(shipped("text.txt")), _text_read(patch))


def _text_read(patch: Patch | None) -> int:
    """How many tokens of the project's own text a patch's prior has read, or more."""
    said = {} if patch is None else patch.provenance
    known = [said.get("text_tokens"), said.get("settings", {}).get("text_tokens")]  # MEMIT's
    usual = CalibrationSettings().text_tokens
    return max(usual, *(one for one in [usual, *known] if isinstance(one, int)))


def _perplexity(
    name: str, bench: Workbench, plain: PlainText | None, progress: Progress
) -> dict[str, float]:
    """By the name of the model, as its weights now are; empty without a text."""
    if plain is None:
        return {}
    stage = f"perplexity, {name}"
    progress(stage, 0.0)
    found = perplexity(bench.loaded, bench.trunk, plain.words)
    progress(stage, 1.0)
    return {name: found}


def _sites(loaded: LoadedModel, patch: Patch | None, force: bool) -> Sequence[Site]:
    """Where the model is cut: where the patch shifts it, else as :func:`usual_sites`."""
    if patch is None:
        return usual_sites(loaded.model)
    check_base(loaded, patch, force)
    return sites_of(loaded.model, patch)


def _about(loaded: LoadedModel, facts: FactSet, patch: Patch | None) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "form": loaded.reading.form,
        "base": loaded.fingerprint,
        "dtype": loaded.dtype,
        "device": places_of(loaded.model),
        "facts_source": facts.source,
        "skipped": len(facts.skipped),
        "trained_on": None if patch is None else trained_on(patch.provenance, facts),
        "patch": dict(patch.provenance) if patch else None,
    }


def chat_encoder(plain: Encoder, facts: FactSet, decode_facts: int | None) -> Encoder | None:
    """The same encoder through the model's chat template; None where it has none.

    Raises:
        FactsError: the template makes prompts too long to be answered.
    """
    encoder = plain.in_chat()
    if encoder is None:
        return None
    faults = []
    for fact in facts.facts[:decode_facts]:
        for question in (fact.question, *fact.equivalents):
            size = len(encoder.prompt_ids(question.prompt))
            if size >= encoder.max_tokens:
                faults.append(
                    f"{fact.where}: the prompt {question.prompt[:40]!r}... has "
                    f"{size} tokens in the chat template, expected less than {encoder.max_tokens}"
                )
    if faults:
        raise FactsError(
            f"{facts.source}: {len(faults):,} prompt{'s are' if len(faults) > 1 else ' is'} too "
            "long for this model's chat template; shorten, or give --decode-facts 0:",
            faults,
        )
    return encoder
