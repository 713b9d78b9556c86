"""Reads facts, questions and plain text from files, and reports every fault of a file at once.

A file's format is told by its content: one JSON list or JSON Lines, then by the fields of its
objects (see :data:`malmend.facts.formats.FORMATS`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from malmend.errors import FactsError, MalmendError, counted, nearest
from malmend.facts import lint
from malmend.facts.entry import Faults, FileEntry, short
from malmend.facts.fact import Fact, FactSet, Question
from malmend.facts.formats import CLAIMS, OWN, OWN_FIELDS, READERS, likely, own_fact, telling, told
from malmend.facts.objects import entries_of, has_objects, is_facts, is_list, looks_like, wrapped
from malmend.given import checked, faults_of

RECOGNISED = (
    "give JSON Lines with 'prompt' and 'answer', a MEND / zsRE JSON list with 'src' and 'answers', "
    "NQ-open JSON Lines with 'question' and 'answer', a MALMEN / FEVER JSON list with 'prompt', "
    "'equiv_prompt' and 'label', or KILT / FEVER JSON Lines with 'input' and 'output'"
)


@checked()
def read_facts(path: str | Path, limit: int | None = None, strict: bool = False) -> FactSet:
    """Read the facts of a file, all of it, and keep the first ``limit`` usable ones.

    A later fact with the prompt of an earlier one is skipped and listed in ``FactSet.skipped``.

    Raises:
        FactsError: with every fault of the file; when ``strict``, repeated prompts are faults too,
            and paraphrases that are no other wording of their fact alone.
        MalmendError: when ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise MalmendError(f"limit is {limit}; give 1 or more, or leave it out to read all facts.")
    source, (text, faults) = str(path), _read(path)
    entries, kind = _typed_entries(text, source, faults)
    read_fact, _ = READERS[kind]
    read = [(read_fact(entry), entry) for entry in entries]
    usable = [(replace(fact, at=entry.where), entry) for fact, entry in read if fact is not None]
    kept, skipped = lint.skip_repeats(fact for fact, _ in usable)
    places = {entry.number: entry for _, entry in usable}
    faults += lint.repeated_ids((fact for fact, _ in usable), places)
    if strict:
        faults += lint.repeated_prompts(skipped, places)
        for fact, what in lint.wordings(kept):
            faults.append((places[fact.line].line, f"{places[fact.line].where}: {what}"))
    if faults:
        _refuse(source, faults)
    return FactSet(source, kept[:limit], skipped)


def given_facts(facts: Sequence[Fact], limit: int | None = None, strict: bool = False) -> FactSet:
    """Facts from Python, under the rules of :func:`read_facts`.

    Raises:
        FactsError: there are none; every field that a file could not have so, and every id that is
            there twice; when ``strict``, for every repeated prompt, and every
            paraphrase that is no other wording of its fact alone.
        MalmendError: when ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise MalmendError(f"limit is {limit}; give 1 or more, or leave it out to take all facts.")
    if not isinstance(facts, Iterable):
        raise FactsError(f"facts is {short(facts)}, expected facts, or the path of a file of them.")
    read = facts if isinstance(facts, FactSet) else FactSet("facts", tuple(facts))
    if not read.facts:
        raise FactsError("No facts were given, expected at least one.")
    _check_are_facts(read)
    faults: Faults = []
    for fact in read.facts:
        own_fact(_as_entry(fact, faults))
    taken = Counter(fact.id for fact, _ in lint.taken_ids(read.facts))
    faults += [
        (0, f"{read.source}: {count + 1} facts have the id {short(name)}; give each its own")
        for name, count in taken.items()
    ]
    kept, skipped = lint.skip_repeats(read.facts)
    if faults:
        _refuse(read.source, faults)
    if strict:
        found = [lint.repeat(one, one.fact.where, one.earlier.where) for one in skipped]
        found += [f"{fact.where}: {what}" for fact, what in lint.wordings(kept)]
        if found:
            _refuse(read.source, [(0, one) for one in found])
    return FactSet(read.source, kept[:limit], (*read.skipped, *skipped))


def _as_entry(fact: Fact, faults: Faults) -> FileEntry:
    """A fact from Python as an object of malmend's own format, to be checked as one."""
    given = {name: value for name, value in asdict(fact).items() if name in OWN_FIELDS}
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    return FileEntry(fact.where, 0, 0, fields, faults)


def _check_are_facts(known: FactSet) -> None:
    """Raises FactsError with everything that is no fact, or has a field of another type."""
    wrong: Faults = []
    for at, one in enumerate(known.facts, start=1):
        if isinstance(one, Fact):
            wrong += [(at, f"{one.where}: {said}") for said in faults_of(one)]
        else:
            what = f"{known.source}: entry {at} is {short(one)}, expected a malmend.Fact"
            wrong.append((at, f"{what}; make one, or give the path of a facts file"))
    if wrong:
        _refuse(known.source, wrong)


def facts_of(
    facts: str | Path | Sequence[Fact], limit: int | None = None, strict: bool = False
) -> FactSet:
    """Of a file as :func:`read_facts`, from Python as :func:`given_facts`."""
    if isinstance(facts, str | Path):
        return read_facts(facts, limit, strict)
    return given_facts(facts, limit, strict)


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Read questions whose answers must not move, from a facts file or one prompt per line.

    NQ-open questions get the prefix that ``loc`` has in MEND's files, and no question mark.

    Raises:
        FactsError: with every fault of the file.
    """
    source, (text, faults) = str(path), _read(path)
    questions: list[Question | None]
    if not is_list(text) and not has_objects(text):
        lines = [line.strip() for line in text.split("\n")]
        questions = [Question(line) for line in lines if line]
    else:
        entries, kind = _typed_entries(text, source, faults)
        _, read_question = READERS[kind]
        questions = [read_question(entry) for entry in entries]
    if faults:
        _refuse(source, faults)
    return tuple(question for question in questions if question is not None)


def given_questions(questions: str | Path | Sequence[Question] | None) -> tuple[Question, ...]:
    """Those of a file, as :func:`read_questions`, or those in hand; of None none."""
    if isinstance(questions, str | Path):
        return read_questions(questions)
    return tuple(questions or ())


def read_text(path: str | Path) -> str:
    """Read plain UTF-8 text, with line ends as ``\\n`` and without a byte order mark.

    Raises:
        FactsError: when there is no such text in the file.
    """
    text, faults = _read(path)
    if not faults and is_facts(text):
        what = "looks like a facts file, expected plain text; give a file without JSON"
        faults = [(1, f"{path}: {what}")]
    if faults:
        _refuse(str(path), faults)
    return text.replace("\r\n", "\n")


def _typed_entries(text: str, source: str, faults: Faults) -> tuple[list[FileEntry], str]:
    """The entries of the file's format, and the format's name."""
    entries = entries_of(text, source, faults)
    if not entries and (other := looks_like(text)):
        what = f"looks like {other}; malmend reads JSON and JSON Lines: {RECOGNISED}"
        _refuse(source, [(1, f"{source}: {what}")])
    if not is_list(text) and not has_objects(text):
        _refuse(source, faults or [(1, f"{source}: is in no format of facts; {RECOGNISED}")])
    if not entries:
        _refuse(source, faults or [(1, f"{source}: holds an empty list; {RECOGNISED}")])
    formats = told(entries)
    kind = next((name for name in formats if name), None) or likely(entries)
    if kind is None:
        given = ", ".join(short(name) for name in list(entries[0].fields)[:8]) or "none"
        what = (
            wrapped(entries[0].fields)
            or f"the fields ({given}) are of no format of facts; {RECOGNISED}"
        )
        _refuse(source, [*faults, (entries[0].line, f"{entries[0].where}: {what}")])
    for entry, own in zip(entries, formats, strict=True):
        if own is not None and own != kind:
            # both of these formats have a 'prompt'
            name = "answer" if (own, kind) == (OWN, CLAIMS) else telling(entry.fields)
            other = f"the {own} format, but the file is in the {kind} one"
            what = f"{entry.where}: field {name!r} is of {other}; keep one format per file"
            faults.append((entry.line, what))
    return [e for e, own in zip(entries, formats, strict=True) if own in (None, kind)], kind


def _read(path: str | Path) -> tuple[str, Faults]:
    """The file's text, and a fault per line that is no UTF-8 (its bad bytes are replaced)."""
    data = _read_bytes(path)
    if (at := data.find(b"\0")) >= 0:  # of a patch, an archive, UTF-16: every line would be a fault
        what = f"is no UTF-8 text (byte 0x00 at offset {at}); give a file of text, saved as UTF-8"
        _refuse(str(path), [(1, f"{path}: {what}")])
    body = data.removeprefix(b"\xef\xbb\xbf")  # the byte order mark
    faults: Faults = []
    offset = len(data) - len(body)
    for number, line in enumerate(body.split(b"\n"), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            at, byte = offset + error.start, line[error.start]
            what = f"byte 0x{byte:02x} at offset {at} is not UTF-8; save the file as UTF-8 text"
            faults.append((number, f"{path}:{number}: {what}"))
        offset += len(line) + 1
    text = body.decode(errors="replace")
    if not text.strip():
        _refuse(str(path), [(1, f"{path}: is empty; give a file with some text in it")])
    return text, faults


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        what = f"there is no such file{nearest_file(path) or '; check the path'}"
    except IsADirectoryError:
        what = "is a folder; give a file"
    except PermissionError:
        what = "may not be read (permission denied); change its permissions or give another file"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({error}); give another file"
    return _refuse(str(path), [(1, f"{path}: {what}")])


def nearest_file(path: str | Path) -> str:
    """The file of the same folder whose name is nearest, as a hint."""
    folder, name = os.path.split(path)
    try:
        return nearest(name, os.listdir(folder or "."))
    except OSError:
        return ""


def _refuse(source: str, faults: Faults) -> NoReturn:
    everything = [fault for _, fault in sorted(faults, key=lambda fault: fault[0])]
    count = counted(len(faults), "fault")
    raise FactsError(f"{source} cannot be used: {count}", everything) from None
