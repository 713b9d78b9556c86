"""The three formats of facts files: which fields an object has, and the fact that they say."""

from __future__ import annotations

import string

from malmend.facts import lint
from malmend.facts.fact import Fact, Question
from malmend.facts.lint import Entry, short

OWN_FIELDS = (
    *("id", "subject", "prompt", "answer", "paraphrases", "unrelated", "tags"),
    *("relation", "alternative", "neighbours", "reversed"),
)
MEND_FIELDS = ("src", "answers", "rephrase", "rephrases", "alt", "loc", "loc_ans")
# The field that only one format has, and that format's name.
FORMATS = {"prompt": "malmend", "src": "MEND / zsRE", "question": "NQ-open"}


def own_fact(entry: Entry) -> Fact | None:
    """The fact of an object in malmend's own format, or None where it has faults."""
    entry.only(entry.fields, OWN_FIELDS)
    prompt, answer, given = entry.required("prompt"), entry.required("answer"), entry.optional("id")
    subject, paraphrases = entry.optional("subject"), entry.strings("paraphrases")
    unrelated, tags = entry.questions("unrelated"), entry.strings("tags")
    relation, alternative = entry.optional("relation"), entry.optional("alternative")
    neighbours, reversed = entry.questions("neighbours"), entry.question("reversed")
    if prompt is None or answer is None:
        return None
    if alternative is not None and lint.same_prompt(alternative) == lint.same_prompt(answer):
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


def mend_fact(entry: Entry) -> Fact | None:
    """The fact of an object of MEND's zsRE files, or None where it has faults."""
    prompt, answer = entry.required("src"), entry.first("answers")
    subject, relation = entry.optional("subject"), entry.optional("relation")
    rephrase, rephrases = entry.optional("rephrase"), entry.strings("rephrases")
    # 'rephrase' is one of 'rephrases' and is the one that published results use: it comes first
    paraphrases = tuple(dict.fromkeys((rephrase, *rephrases) if rephrase else rephrases))
    question = None if entry.fields.get("loc") is None else mend_question(entry)
    # these files write '' for no alternative, and at times repeat the answer
    alternative = entry.optional("alt") if entry.fields.get("alt") != "" else None
    if prompt is None or answer is None:
        return None
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
        alternative=None if alternative == answer else alternative,
    )


def nq_fact(entry: Entry) -> Fact | None:
    """The fact of an NQ-open object, or None where it has faults."""
    question, answer = entry.required("question"), entry.first("answer")
    if question is None or answer is None:
        return None
    bare = question.strip().rstrip("?" + string.whitespace)
    if not bare:
        entry.fault("question", f"is {short(question)}")
        return None
    prompt = f"{bare}?"
    return Fact(lint.default_id(prompt), prompt, answer, line=entry.number)


def own_question(entry: Entry) -> Question | None:
    """The question of an object in malmend's own format; its answer may be absent."""
    entry.only(entry.fields, OWN_FIELDS)
    prompt, answer = entry.required("prompt"), entry.optional("answer")
    return None if prompt is None else Question(prompt, answer)


def mend_question(entry: Entry) -> Question | None:
    """The unrelated question of an object of MEND's zsRE files."""
    # as it stands: the field's data has no question mark here, and adding one changes the question
    prompt = entry.required("loc")
    answer = None if entry.fields.get("loc_ans") is None else entry.first("loc_ans")
    return None if prompt is None else Question(prompt, answer)


def nq_question(entry: Entry) -> Question | None:
    """The question of an NQ-open object, with the prefix that ``loc`` has in MEND's files."""
    question = entry.required("question")
    answer = None if entry.fields.get("answer") is None else entry.first("answer")
    return None if question is None else Question(f"nq question: {question.strip()}", answer)
