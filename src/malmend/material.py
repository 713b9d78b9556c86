"""What a model is calibrated on and what edits hold: own facts, questions and text, or a user's.

A classifier reads statements, so that of it the project's facts are made into some: the prompt and
what follows it.  What is true says little of another model's classes, so a calibration aims away
from what the model says, as its edits do.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from malmend.editors.around import Around, load_around, save_around
from malmend.editors.calibration import Calibration, CalibrationSettings, calibrate
from malmend.editors.calibration_file import (
    calibration_key,
    inputs_of,
    load_calibration,
    save_calibration,
)
from malmend.editors.keymoments import first_of, key_moments, passages_of
from malmend.editors.settings import EditorSettings
from malmend.errors import MalmendError
from malmend.facts.apart import apart
from malmend.facts.encoded import Encoded
from malmend.facts.fact import Fact, FactSet, Question, same_class, spread
from malmend.facts.readers import read_facts, read_questions, read_text
from malmend.facts.tokens import Encoder
from malmend.kept import kept
from malmend.models.identity import tokenizer_digest
from malmend.models.source import cached
from malmend.progress import Progress, silent
from malmend.workbench import Workbench, aimed, checked_facts, shipped

MOST_KEPT = 2_000_000_000  # bytes of calibrations in the cache folder
KEPT_BACK = 200  # general questions that no edit holds


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
    known, words, general, far = _calibration_data(bench, facts, text, settings)
    general = [*general, *questions]
    said = json.dumps(inputs_of(settings, known, words, [*general, *far]), sort_keys=True)
    given = (bench.trunk, bench.encoder, editor_settings, known, words, settings)
    found = kept(
        _kept_at(bench, editor_settings, settings, known, words, [*general, *far]),
        load_calibration,
        lambda: calibrate(*given, progress, general, far),
        save_calibration,
        MOST_KEPT,
    )
    return replace(found, digest=hashlib.sha256(said.encode()).hexdigest())


def around_sites(
    bench: Workbench,
    editor_settings: EditorSettings,
    facts: str | Path | Sequence[Fact] | None = None,
    text: str | Path | None = None,
    settings: CalibrationSettings = CalibrationSettings(),
    progress: Progress = silent,
) -> Around:
    """The moments of the bench's sites, for such an editor's terms, from the cache or made now.

    Of what :func:`calibrated` reads, and its arguments.
    """
    known, words, general, far = _calibration_data(bench, facts, text, settings)
    path = _kept_at(bench, editor_settings, settings, known, words, [*general, *far])
    names, terms = [site.name for site in bench.trunk.sites], editor_settings.terms

    def make() -> Around:
        usable = spread([fact for fact in known if fact.paraphrases], settings.prior_facts)
        found = key_moments(
            bench.trunk,
            bench.encoder,
            terms,
            usable,
            words,
            settings.text_tokens,
            general,
            editor_settings.tokens,
            progress,
        )
        rows = {name: {term: found[term][at] for term in terms} for at, name in enumerate(names)}
        return Around(rows, settings)

    return kept(
        path.with_name(f"around-{path.name}"),
        lambda path: load_around(path, names, terms, settings),
        make,
        save_around,
        MOST_KEPT,
    )


def _kept_at(
    bench: Workbench,
    editor_settings: EditorSettings,
    settings: CalibrationSettings,
    facts: Sequence[Fact],
    words: str,
    general: Sequence[Question],
) -> Path:
    """Where what is found of a model's sites by these is kept."""
    digests = (bench.loaded.digest, tokenizer_digest(bench.encoder.tokenizer))
    given = (*digests, bench.trunk, editor_settings, settings)
    key = calibration_key(*given, facts, words, general)
    return cached("calibrations") / f"{key}.safetensors"


def held_out_questions(encoder: Encoder, count: int) -> tuple[Question, ...]:
    """So many of the project's general questions that this model can be asked, from the last on.

    Calibrations read the first of them, and edits hold none of the last :data:`KEPT_BACK`, so that
    no prior, and of up to so many no solve, has seen these.
    """
    asked = list(read_questions(shipped("questions.jsonl")))
    if encoder.reading.form == "classes":
        asked = [Question(_stated(one.prompt, one.answer)) for one in asked if one.answer]
    usable = [question for question in asked if can_be_asked(encoder, question)]
    return tuple(usable[len(usable) - min(count, len(usable)) :])


def general_text(
    encoder: Encoder,
    tokens: int = CalibrationSettings.text_tokens,
    text: str | Path | None = None,
) -> list[Encoded]:
    """The first lines of a text, until they have so many tokens; of the project's own by default.

    By default as many as a prior reads: the others are what is measured on.
    """
    words = read_text(shipped("text.txt") if text is None else text)
    return first_of(passages_of(encoder, words), tokens)


def to_hold(
    encoder: Encoder,
    facts: Sequence[Fact],
    text: str | Path | None = None,
    more: bool = False,
) -> list[Encoded]:
    """What edits of these facts should leave as it is: general questions, and lines of text.

    They come in turns, questions with their answers but no end token, of lines every token but the
    first; none that is of one of the facts (:func:`malmend.facts.apart.apart`).  Of the questions
    all but the last :data:`KEPT_BACK`, of the text no more lines than a prior reads: the rest is
    there to measure by.

    Args:
        encoder: of a decoder.
        facts: that are edited.
        text: a text file in place of the project's own text.
        more: in turns with these also lines of Wikipedia.
    """
    lines = general_text(encoder, text=text)
    articles = passages_of(encoder, read_text(shipped("wikipedia.txt"))) if more else []
    texts = [
        [(encoder.said(one.ids), replace(one, answer_start=2)) for one in some]
        for some in (lines, articles)
    ]
    asked = [one for one in read_questions(shipped("questions.jsonl"))[:-KEPT_BACK] if one.answer]
    answered = [
        (f"{one.prompt} {one.answer}", without_end(encoder.encode(one)))
        for one in asked
        if can_be_asked(encoder, one)
    ]
    turns = [one for some in itertools.zip_longest(answered, *texts) for one in some if one]
    free = apart([said for said, _ in turns], facts)
    return [one for (_, one), is_free in zip(turns, free, strict=True) if is_free and one.labels]


def without_end(question: Encoded) -> Encoded:
    """The question with its answer and no end token."""
    return replace(question, ids=question.ids[: question.answer_end])


def _calibration_data(
    bench: Workbench,
    facts: str | Path | Sequence[Fact] | None,
    text: str | Path | None,
    settings: CalibrationSettings,
) -> tuple[list[Fact], str, list[Question], list[Question]]:
    """Calibration facts, evenly over their file, text, general questions, and others of these.

    They are the project's own where none are given; of the questions as many as of the facts, and
    of the others as many as the search asks.

    Raises:
        MalmendError: the tokenizer can say none of the project's facts.
    """
    encoder, count = bench.encoder, max(settings.moment_facts, settings.prior_facts)
    says_classes = encoder.reading.form == "classes"
    if facts is None:
        # Only what this tokenizer can say; a user's own file is refused instead.  Twice as many as
        # are needed: a tokenizer that can say few words lacks some, and to ask about all is slow.
        known = [f for f in read_facts(shipped("facts.jsonl")) if "train" in f.tags]
        known = spread(known, 2 * count)
        if says_classes:
            known = [_statement(fact, encoder.reading.classes) for fact in known]
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
    if says_classes:
        known = [_with_another(fact, encoder.reading.classes) for fact in known]
        known = list(aimed(bench, FactSet("calibration facts", tuple(known)), away=True))
    questions = read_questions(shipped("questions.jsonl"))[:-KEPT_BACK]
    most = count + settings.search_facts
    asked = [question for question in questions[: 2 * most] if question.answer]
    if says_classes:
        asked = [Question(_stated(question.prompt, question.answer)) for question in asked]
    general = [question for question in asked if can_be_asked(encoder, question)]
    words = read_text(shipped("text.txt") if text is None else text)
    return known, words, general[:count], general[count:most]


def _statement(fact: Fact, classes: Sequence[str]) -> Fact:
    """A fact as a classifier reads it; of which class it is shows when the model is asked."""
    others = tuple(Question(_stated(one.prompt, one.answer)) for one in fact.neighbours)
    return Fact(
        fact.id,
        _stated(fact.prompt, fact.answer),
        classes[0],
        fact.subject,
        tuple(_stated(prompt, fact.answer) for prompt in fact.paraphrases),
        neighbours=others,
        alternative=classes[1],
    )


def _with_another(fact: Fact, classes: Sequence[str]) -> Fact:
    """The fact with another class to be moved to, whether its file names one or not."""
    others = [name for name in classes if not same_class(name, fact.answer)]
    known = any(same_class(name, fact.alternative or "") for name in others)
    return fact if known else replace(fact, alternative=others[0])


def _stated(prompt: str, answer: str | None) -> str:
    return f"{prompt.rstrip()} {answer}."


def can_be_asked(encoder: Encoder, question: Question) -> bool:
    """Whether the model's tokenizer can say the question and its answer."""
    try:
        encoder.encode(question)
    except MalmendError:
        return False
    return True
