"""The formats of facts files: which fields tell each one, and the fact that an object says."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from malmend.errors import nearest
from malmend.facts import lint
from malmend.facts.entry import FileEntry, described, short
from malmend.facts.fact import Fact, Question, same_answer

OWN_FIELDS = (
    *("id", "subject", "prompt", "answer", "paraphrases", "unrelated", "tags"),
    *("relation", "alternative", "neighbours", "reversed"),
)
MEND_FIELDS = ("src", "answers", "rephrase", "rephrases", "alt", "loc", "loc_ans")
CLAIM_FIELDS = ("prompt", "equiv_prompt", "label", "alt", "unrel_prompt", "unrel_ans")
NQ_FIELDS = ("question", "answer")
KILT_FIELDS = ("input", "output", "filtered_rephrases", "rephrases")
OWN, MEND, NQ = "malmend", "MEND / zsRE", "NQ-open"
CLAIMS, KILT = "MALMEN / FEVER", "KILT / FEVER"
# The fields that tell a format, and its name; of several in one object the first counts.
FORMATS = {
    "prompt": OWN,
    "src": MEND,
    "question": NQ,
    "input": KILT,
    "equiv_prompt": CLAIMS,
    "unrel_prompt": CLAIMS,
}


def telling(fields: dict[str, object]) -> str | None:
    """The field by which an object's format is told."""
    found = next((name for name in FORMATS if name in fields), None)
    if found == "prompt" and "answer" not in fields:
        # MALMEN's objects have a 'prompt' too, but never an 'answer', and malmend's facts always
        return next((name for name in fields if FORMATS.get(name) == CLAIMS), found)
    return found


def told(entries: Sequence[FileEntry]) -> list[str | None]:
    """The format of each object, or None where none of its fields tells one."""
    names = [telling(entry.fields) for entry in entries]
    formats = [FORMATS[name] if name else None for name in names]
    # a bare 'prompt' is a field of two formats: the first object that is surely of one of them says
    # whose it is
    bare = [n == "prompt" and "answer" not in e.fields for n, e in zip(names, entries, strict=True)]
    sure = (f for f, b in zip(formats, bare, strict=True) if f in (OWN, CLAIMS) and not b)
    owner = next(sure, None) or (CLAIMS if _nearly_claims(entries) else OWN)
    return [owner if b else f for f, b in zip(formats, bare, strict=True)]


def likely(entries: Sequence[FileEntry]) -> str | None:
    """The format of a file in which the telling field is missing everywhere."""
    names = {name for entry in entries for name in entry.fields}
    if "unrel_ans" in names:
        return CLAIMS
    if "filtered_rephrases" in names or names.issuperset(("id", "output")):
        return KILT
    if names.intersection(MEND_FIELDS):
        return MEND
    return OWN if names.intersection(OWN_FIELDS) else None


def _nearly_claims(entries: Sequence[FileEntry]) -> bool:
    """Whether a file has labels, and the fields that would tell its format only misspelt."""
    names = {name for entry in entries for name in entry.fields}
    unknown = names.difference(OWN_FIELDS, CLAIM_FIELDS)
    tells = [name for name, format in FORMATS.items() if format == CLAIMS]
    return bool(names & {"label", "alt"}) and any(nearest(name, tells) for name in unknown)


def _misspelt(entry: FileEntry, valid: Sequence[str]) -> None:
    """A fault for every unknown field whose name is nearly that of one that is not there.

    These formats come with any number of other fields, so only such a one is likely misspelt.
    """
    absent = [name for name in valid if name not in entry.fields]
    for name in entry.fields:
        if name not in valid and (hint := nearest(name, absent)):
            fault = f"{entry.where}: unknown field {short(name)}{hint}"
            entry.faults.append((entry.line, fault))


def own_fact(entry: FileEntry) -> Fact | None:
    """The fact of an object in malmend's own format, or None where it has faults."""
    entry.only(entry.fields, OWN_FIELDS)
    prompt, answer, given = entry.required("prompt"), entry.required("answer"), entry.optional("id")
    subject, paraphrases = entry.optional("subject"), entry.strings("paraphrases")
    unrelated, tags = entry.questions("unrelated"), entry.strings("tags")
    relation, alternative = entry.optional("relation"), entry.optional("alternative")
    neighbours, reversed = entry.questions("neighbours"), entry.question("reversed")
    if prompt is None or answer is None:
        return None
    if alternative is not None and same_answer(alternative, answer):
        entry.fault("alternative", f"is {short(alternative)}, the answer itself")
    return Fact(
        id=given or lint.default_id(prompt),
        prompt=prompt,
        answer=answer,
        subject=subject,
        paraphrases=paraphrases,
        unrelated=unrelated,
        tags=tags,
        line=entry.number,
        relation=relation,
        alternative=alternative,
        neighbours=neighbours,
        reversed=reversed,
    )


def mend_fact(entry: FileEntry) -> Fact | None:
    """The fact of an object of MEND's zsRE files, or None where it has faults."""
    _misspelt_of_mend(entry)
    prompt, answer = entry.required("src"), entry.first("answers")
    rephrase, rephrases = entry.optional("rephrase"), entry.strings("rephrases")
    # 'rephrase' is one of 'rephrases' and is the one that published results use: it comes first
    paraphrases = tuple(dict.fromkeys((rephrase, *rephrases) if rephrase else rephrases))
    question = None if entry.fields.get("loc") is None else _loc(entry)
    return _benchmark_fact(entry, prompt, answer, _alt(entry), paraphrases, question)


def _misspelt_of_mend(entry: FileEntry) -> None:
    """As :func:`_misspelt`; a file has 'rephrase' or 'rephrases', and either is enough."""
    either = ("rephrase", "rephrases")
    there = any(name in entry.fields for name in either)
    _misspelt(entry, [name for name in MEND_FIELDS if not (there and name in either)])


def _alt(entry: FileEntry) -> str | None:
    """The field 'alt'; these files write '' for no alternative."""
    return entry.optional("alt") if entry.fields.get("alt") != "" else None


def _benchmark_fact(
    entry: FileEntry,
    prompt: str | None,
    answer: str | None,
    alternative: str | None,
    paraphrases: tuple[str, ...],
    question: Question | None,
) -> Fact | None:
    """What MEND's and MALMEN's files have alike: subject, relation, one unrelated question."""
    subject, relation = entry.optional("subject"), entry.optional("relation")
    if prompt is None or answer is None:
        return None
    if alternative and same_answer(alternative, answer):
        alternative = None  # these files repeat the answer at times
    return Fact(
        id=lint.default_id(prompt),
        prompt=prompt,
        answer=answer,
        subject=subject,
        paraphrases=paraphrases,
        unrelated=(question,) if question else (),
        tags=(relation,) if relation else (),
        line=entry.number,
        relation=relation,
        alternative=alternative,
    )


def nq_fact(entry: FileEntry) -> Fact | None:
    """The fact of an NQ-open object, or None where it has faults."""
    _misspelt(entry, NQ_FIELDS)
    question, answer = entry.required("question"), entry.first("answer")
    if question is None or answer is None:
        return None
    bare = question.strip().rstrip("?" + string.whitespace)
    if not bare:
        entry.fault("question", f"is {short(question)}")
        return None
    prompt = f"{bare}?"
    return Fact(lint.default_id(prompt), prompt, answer, line=entry.number)


def claim_fact(entry: FileEntry) -> Fact | None:
    """The fact of an object of MALMEN's FEVER files, or None where it has faults."""
    _misspelt(entry, CLAIM_FIELDS)
    prompt, paraphrases, alternative = entry.required("prompt"), _wordings(entry), _alt(entry)
    question = None if entry.fields.get("unrel_prompt") is None else _unrelated_claim(entry)
    if entry.fields.get("label") is None and entry.fields.get("alt"):
        # MALMEN itself reads no label: 'alt' is what its edits aim at
        answer, alternative = alternative, None
    else:
        answer = entry.required("label")
    return _benchmark_fact(entry, prompt, answer, alternative, paraphrases, question)


def kilt_fact(entry: FileEntry) -> Fact | None:
    """The fact of an object of KILT's FEVER files, or None where it has faults."""
    _misspelt(entry, KILT_FIELDS)
    prompt, answer, number = entry.required("input"), _first_output(entry), entry.fields.get("id")
    # KILT's ids are numbers or strings
    numbered = isinstance(number, int) and not isinstance(number, bool)
    given = str(number) if numbered else entry.optional("id")
    # where both are there, 'filtered_rephrases' are the usable ones of 'rephrases'
    filtered = entry.fields.get("filtered_rephrases") is not None
    rephrases = entry.strings("filtered_rephrases" if filtered else "rephrases")
    if prompt is None or answer is None:
        return None
    return Fact(
        id=given or lint.default_id(prompt),
        prompt=prompt,
        answer=answer,
        # some of them are the claim itself
        paraphrases=tuple(dict.fromkeys(text for text in rephrases if text != prompt)),
        line=entry.number,
    )


def own_question(entry: FileEntry) -> Question | None:
    """The question of an object in malmend's own format; its answer may be absent."""
    entry.only(entry.fields, OWN_FIELDS)
    prompt, answer = entry.required("prompt"), entry.optional("answer")
    return None if prompt is None else Question(prompt, answer)


def mend_question(entry: FileEntry) -> Question | None:
    """The unrelated question of an object of MEND's zsRE files."""
    _misspelt_of_mend(entry)
    return _loc(entry)


def _loc(entry: FileEntry) -> Question | None:
    # as it stands: the field's data has no question mark here, and adding one changes the question
    prompt = entry.required("loc")
    answer = None if entry.fields.get("loc_ans") is None else entry.first("loc_ans")
    return None if prompt is None else Question(prompt, answer)


def nq_question(entry: FileEntry) -> Question | None:
    """The question of an NQ-open object, with the prefix that ``loc`` has in MEND's files."""
    _misspelt(entry, NQ_FIELDS)
    question = entry.required("question")
    answer = None if entry.fields.get("answer") is None else entry.first("answer")
    return None if question is None else Question(f"nq question: {question.strip()}", answer)


def claim_question(entry: FileEntry) -> Question | None:
    """The unrelated claim of an object of MALMEN's FEVER files, or else the claim itself."""
    _misspelt(entry, CLAIM_FIELDS)
    if entry.fields.get("unrel_prompt") is not None:
        return _unrelated_claim(entry)
    prompt, label = entry.required("prompt"), entry.optional("label")
    return None if prompt is None else Question(prompt, label)


def kilt_question(entry: FileEntry) -> Question | None:
    """The claim of an object of KILT's FEVER files; its label may be absent."""
    _misspelt(entry, KILT_FIELDS)
    prompt = entry.required("input")
    answer = None if entry.fields.get("output") is None else _first_output(entry)
    return None if prompt is None else Question(prompt, answer)


def _unrelated_claim(entry: FileEntry) -> Question | None:
    prompt, label = entry.required("unrel_prompt"), entry.optional("unrel_ans")
    return None if prompt is None else Question(prompt, label)


def _wordings(entry: FileEntry) -> tuple[str, ...]:
    """The other wordings of a claim: a list of them, or one string."""
    value = entry.fields.get("equiv_prompt")
    one = entry.text("equiv_prompt", value) if isinstance(value, str) else None
    texts = entry.strings("equiv_prompt") if not isinstance(value, str) else (one,) if one else ()
    return tuple(dict.fromkeys(texts))


def _first_output(entry: FileEntry) -> str | None:
    """The answer of the first of KILT's outputs that has one."""
    value, before = entry.fields.get("output"), len(entry.faults)
    if "output" not in entry.fields:
        entry.fault("output", "is missing")
    elif value is None or value == []:
        entry.fault("output", "is null, not a list" if value is None else "is an empty list")
    answers = []
    for where, item in entry.items("output"):
        if not isinstance(item, dict):
            entry.fault(where, f"is {described(item)}, not an object")
        elif item.get("answer") not in (None, ""):  # such an output has provenance alone
            answers.append(entry.text(f"{where}.answer", item["answer"]))
    if not answers and len(entry.faults) == before:
        entry.fault("output", "has no 'answer' in any object")
    return next(iter(answers), None)


# How an object of each format is read: as a fact, and as a question that must not move.
READERS: dict[
    str, tuple[Callable[[FileEntry], Fact | None], Callable[[FileEntry], Question | None]]
] = {
    OWN: (own_fact, own_question),
    MEND: (mend_fact, mend_question),
    NQ: (nq_fact, nq_question),
    CLAIMS: (claim_fact, claim_question),
    KILT: (kilt_fact, kilt_question),
}
