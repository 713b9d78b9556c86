"""What is edited and what is asked about it: plain values, no file, no tokenizer, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from unicodedata import normalize

from malmend.errors import counted


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and, where it is known, the text that should follow it."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """One correction: after ``prompt`` the model should say ``answer``.

    An edit is of ``prompt`` and ``answer``; what else there is serves training and evaluation, but
    that ``subject`` and ``relation`` help an edit that settles to other wordings.

    Attributes:
        paraphrases: other ways to ask, same answer.
        unrelated: questions whose answers must not move.
        line: where the fact stood in its file, counted from 1 (for a JSON list: the entry).
        relation: what the fact says of its subject, by name; groups facts in a report, and facts
            of one are taken to be asked alike.
        alternative: a false answer of the same relation (the counterfactual).
        neighbours: the same question about other subjects, whose true answers must not move.
        reversed: the fact asked from the other side, as "Lima is the capital of" with "Peru".
        at: the file and the line in it, ``facts.jsonl:3``, or ``zsre.json:41: entry 3`` in a list.
    """

    id: str
    prompt: str
    answer: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[Question, ...] = ()
    tags: tuple[str, ...] = ()
    line: int = 0
    _: KW_ONLY
    relation: str | None = None
    alternative: str | None = None
    neighbours: tuple[Question, ...] = ()
    reversed: Question | None = None
    at: str = field(default="", compare=False, repr=False)

    @property
    def where(self) -> str:
        """The place in its file as messages cite it; of a fact of no file its id."""
        return self.at or f"fact {self.id!r}"

    @property
    def question(self) -> Question:
        """The edit prompt with its answer."""
        return Question(self.prompt, self.answer)

    @property
    def alone(self) -> Fact:
        """The fact with its edit prompt only."""
        return replace(self, paraphrases=(), unrelated=(), neighbours=(), reversed=None)

    @property
    def unplaced(self) -> Fact:
        """The fact without what only says where it stands and what a file calls it."""
        return replace(self, id="", tags=(), line=0)

    @property
    def equivalents(self) -> tuple[Question, ...]:
        """The paraphrases with the fact's answer."""
        return tuple(Question(prompt, self.answer) for prompt in self.paraphrases)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A fact left out because an earlier one has the same prompt."""

    fact: Fact
    earlier: Fact

    @property
    def kind(self) -> str:
        """``duplicate`` (same answer too) or ``contradiction`` (another answer)."""
        same = same_answer(self.fact.answer, self.earlier.answer)
        return "duplicate" if same else "contradiction"


def in_one_form(text: str) -> str:
    """A text whose runs of white space are one space, and letters and their accents together."""
    return normalize("NFC", " ".join(text.split()))


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are one: how they are spaced, or an accent kept, makes no other."""
    return in_one_form(one) == in_one_form(other)


def class_key(name: str) -> str:
    """What two names of one class have alike, as the same answer has, in whatever case."""
    return in_one_form(name.casefold())


def same_class(one: str, other: str) -> bool:
    """Whether an answer names a class of a model."""
    return class_key(one) == class_key(other)


@dataclass(frozen=True, slots=True)
class FactSet(Sequence[Fact]):
    """The usable facts of one file in file order, and the ones that were skipped."""

    source: str
    facts: tuple[Fact, ...]
    skipped: tuple[Skipped, ...] = ()

    def __repr__(self) -> str:
        counts = f"{counted(len(self.facts), 'fact')}, {len(self.skipped):,} skipped"
        return f"FactSet({self.source!r}, {counts})"

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.facts[index]

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)


def subject_hash(subject: str) -> str:
    """Ten hexadecimal digits that name a subject without saying it, whatever its case and blanks.

    An editor keeps those of its training facts: among ten thousand subjects, one that is not there
    is taken for one that is with a chance of one in a hundred million.
    """
    plain = " ".join(subject.casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:10]


def subject_hashes(facts: Iterable[Fact]) -> str:
    """The hashes of all subjects, of facts without one of their prompts, each once, joined."""
    return "".join(sorted({subject_hash(fact.subject or fact.prompt) for fact in facts}))


def facts_digest(facts: Iterable[Fact]) -> str:
    """SHA-256 over prompts and answers, in order: what is edited in."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact.prompt}\x1f{fact.answer}\x1e".encode())
    return digest.hexdigest()


def training_digests(facts: Iterable[Fact], locality: Iterable[Question]) -> dict[str, str]:
    """SHA-256 over all that training reads of facts, and of questions about others, in order.

    Not over where they stand in a file, nor what a file calls them, which changes no training.
    """
    # Neighbours only where there are some, so that checkpoints older than they are still fit.
    learned = [
        (f.prompt, f.answer, f.paraphrases, f.unrelated, *([f.neighbours] if f.neighbours else []))
        for f in facts
    ]
    return {
        "facts_sha256": hashlib.sha256(repr(learned).encode()).hexdigest(),
        "locality_sha256": hashlib.sha256(repr(list(locality)).encode()).hexdigest(),
    }


def spread(facts: Sequence[Fact], count: int) -> list[Fact]:
    """``count`` facts, evenly over the list, in its order."""
    if len(facts) <= count:
        return list(facts)
    return [facts[index * len(facts) // count] for index in range(count)]
