"""What a ledger does with the model at hand: facts added, facts replaced, and all of them asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from malmend.commands.ledger_init import signed_by
from malmend.editors.editor import Editor
from malmend.editors.refine import CHAT
from malmend.errors import LedgerError, counted
from malmend.evaluation.replies import Reply
from malmend.facts.fact import Fact, FactSet
from malmend.facts.lint import unseen, unseen_said
from malmend.given import checked
from malmend.ledgers.about import About
from malmend.ledgers.access import WAIT, reading, writing
from malmend.ledgers.check import named, paired, unlike
from malmend.ledgers.entries import Entry, Generation
from malmend.ledgers.ledger import Ledger, Signed
from malmend.ledgers.rows import taken
from malmend.ledgers.watch import Watch
from malmend.models.load import LoadedModel
from malmend.models.trunk import TrunkSettings
from malmend.patch import by_one_thread
from malmend.progress import Progress, silent
from malmend.workbench import Workbench, aimed, checked_facts, encoder_for, lay_out, opened

Told = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class LedgerChange:
    """A change of a ledger.

    Attributes:
        generation: that it made, or the current one where there was nothing to do.
        entered, left: facts that came and went.
        duplicates: facts that were left out, since the ledger holds them.
        known: of those that came, the ones that the unedited model answers already.
        warning: of the ledger's rule; None where it is kept or nothing was measured.
    """

    generation: Generation
    entered: Sequence[Entry] = ()
    left: Sequence[Entry] = ()
    duplicates: Sequence[Fact] = ()
    known: Sequence[Fact] = ()
    warning: str | None = None

    def __repr__(self) -> str:
        counts = f"{len(self.entered):,} entered, {len(self.left):,} left"
        return f"LedgerChange({self.generation!r}, {counts}, warning={self.warning!r})"


@dataclass(frozen=True)
class Verified:
    """A fact as it was asked; ``reply`` says what came, through the chat template too if asked."""

    entry: Entry
    reply: Reply

    @property
    def holds(self) -> bool:
        """Whether the model gives the fact's answer, in its own words where it has any."""
        return bool(self.reply.right)

    @property
    def holds_in_chat(self) -> bool | None:
        """The same in a chat; None where it was not asked in one."""
        in_chat = self.reply.generated_chat
        return None if in_chat is None else in_chat == 1.0


@dataclass(frozen=True)
class Verification:
    """Every active fact asked of the model that carries them.

    Attributes:
        rows: in the order the facts came.
        retention: over general questions; None where none are asked.
        warning: of the ledger's rule.
    """

    rows: Sequence[Verified]
    retention: float | None = None
    warning: str | None = None

    def __repr__(self) -> str:
        held = f"{len(self.rows) - len(self.failing):,} of {counted(len(self.rows), 'fact')} hold"
        return f"Verification({held}, retention={self.retention}, warning={self.warning!r})"

    @property
    def failing(self) -> list[Verified]:
        """The facts that do not hold."""
        return [row for row in self.rows if not row.holds]


@by_one_thread
@checked("facts")
def add(
    ledger: str | Path,
    facts: str | Path | Sequence[Fact],
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    away: bool = False,
    skip_known: bool = False,
    model: str | LoadedModel | None = None,
    device: str = "cpu",
    author: str | None = None,
    wait: float = WAIT,
    trunk: TrunkSettings = TrunkSettings(),
    progress: Progress = silent,
    told: Told = lambda line: None,
) -> LedgerChange:
    """Adds facts: the shift is then as if all had been added at once.

    Args:
        ledger: its folder.
        facts: a facts file, or facts.
        limit: take only the first so many facts.
        strict: refuse facts that the ledger holds already, in place of leaving them out.
        alternative: add each fact's alternative (a false answer) in place of its answer.
        away: of a classifier: add what the unedited model does not say of each fact.
        skip_known: leave out what the unedited model answers right already.
        model: where the ledger's model lies now; null for where it lay at the start.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        author: who does this; null for the user's name.
        wait: seconds to wait for another process that writes the ledger.
        trunk: grouping of questions and the disk budget for trunk activations.
        progress: called with stage and share done.
        told: called with what is to be said before the work, line by line.

    Raises:
        MalmendError: any bad input; a fact that contradicts one of the ledger's.
    """
    signed = signed_by(author)
    with writing(ledger, wait) as held:
        known = _read(held, facts, model, limit, strict, alternative, away)
        bench = None
        if away:  # what a fact says is known only once the model is asked
            bench = _bench(held.about, held.editor, model, device, trunk)
            known = aimed(bench, known, away)
        fresh, duplicates = unlike(held.active, known, strict)
        _tell(duplicates, known, told)
        if not fresh:
            told("There is nothing to add.")
            return LedgerChange(held.current, duplicates=duplicates)
        bench = bench or _bench(held.about, held.editor, model, device, trunk)
        work = _Work(held, bench, signed, known.source, progress, told)
        done = work.change("add", fresh, (), skip_known)
        return dataclasses.replace(done, duplicates=duplicates)


@by_one_thread
@checked("facts")
def replace(
    ledger: str | Path,
    facts: str | Path | Sequence[Fact],
    limit: int | None = None,
    strict: bool = False,
    alternative: bool = False,
    model: str | LoadedModel | None = None,
    device: str = "cpu",
    author: str | None = None,
    wait: float = WAIT,
    trunk: TrunkSettings = TrunkSettings(),
    progress: Progress = silent,
    told: Told = lambda line: None,
) -> LedgerChange:
    """Gives prompts that the ledger holds other answers, all in one generation.

    Args:
        ledger: its folder.
        facts: a facts file, or facts, whose prompts are those of active facts.
        limit: take only the first so many facts.
        strict: refuse facts that the ledger holds as they are, in place of leaving them out.
        alternative: take each fact's alternative (a false answer) in place of its answer.
        model: where the ledger's model lies now; null for where it lay at the start.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        author: who does this; null for the user's name.
        wait: seconds to wait for another process that writes the ledger.
        trunk: grouping of questions and the disk budget for trunk activations.
        progress: called with stage and share done.
        told: called with what is to be said before the work, line by line.

    Raises:
        MalmendError: any bad input; a prompt that no active fact has.
    """
    signed = signed_by(author)
    with writing(ledger, wait) as held:
        known = _read(held, facts, model, limit, strict, alternative)
        pairs, duplicates = paired(held.active, known, strict)
        _tell(duplicates, known, told)
        if not pairs:
            told("There is nothing to replace.")
            return LedgerChange(held.current, duplicates=duplicates)
        bench = _bench(held.about, held.editor, model, device, trunk)
        work = _Work(held, bench, signed, known.source, progress, told)
        fresh, old = [new for new, _ in pairs], [one for _, one in pairs]
        done = work.change("replace", fresh, old, skip_known=False)
        return dataclasses.replace(done, duplicates=duplicates)


@by_one_thread
@checked()
def verify(
    ledger: str | Path,
    model: str | LoadedModel | None = None,
    device: str = "cpu",
    trunk: TrunkSettings = TrunkSettings(),
    wait: float = WAIT,
    progress: Progress = silent,
) -> Verification:
    """Asks the edited model every active fact, free-running, and general questions.

    Facts that are solved in chat (``frames`` of :func:`init`) are asked in a chat besides.

    Args:
        ledger: its folder.
        model: where the ledger's model lies now; null for where it lay at the start.
        device: where the model is put: "cpu", "cuda" or another accelerator, one of several
            as "cuda:1", or "auto" for spread over all.
        trunk: grouping of questions and the disk budget for trunk activations.
        wait: seconds to wait for another process that writes the ledger.
        progress: called with stage and share done.
    """
    with reading(ledger, wait) as held:
        entries, moved, rule = held.active, held.move(held.active, progress), held.about.rule
        if not entries:
            return Verification([])
        about, editor = held.about, held.editor
    # Outside of the block: a writer waits for whoever reads.
    bench, facts = _bench(about, editor, model, device, trunk), [one.fact for one in entries]
    watch = Watch(bench, facts, rule, progress, in_chat=CHAT in about.frames)
    found = watch.with_shifts(moved.shifts)
    rows = [Verified(one, reply) for one, reply in zip(entries, found.replies, strict=True)]
    return Verification(rows, found.retention, rule.warning(found.retention))


@dataclass(frozen=True, eq=False)
class _Work:
    """Facts on their way into a ledger."""

    held: Ledger
    bench: Workbench
    signed: Signed
    source: str
    progress: Progress
    told: Told

    def change(
        self, action: str, facts: Sequence[Fact], old: Sequence[Entry], skip_known: bool
    ) -> LedgerChange:
        """Takes in facts for old ones; what is to be said is said before the work."""
        held, rule = self.held, self.held.about.rule
        watch = Watch(self.bench, facts, rule, self.progress)
        known = [fact for fact, is_known in zip(facts, watch.known(), strict=True) if is_known]
        self._tell_known(known, action, skip_known)
        left_out = {fact.id for fact in known} if skip_known else set()
        fresh = [fact for fact in facts if fact.id not in left_out]
        if not fresh:
            self.told("There is nothing to add.")
            return LedgerChange(held.current, known=known)
        rows = taken(self.bench, held.editor, fresh, held.about.frames, self.progress)
        entries = held.take(fresh, rows, self.source, self.signed)
        gone = {entry.number for entry in old}
        rest = [entry for entry in held.active if entry.number not in gone]
        moved = held.move([*rest, *entries], self.progress)
        found = watch.with_shifts(moved.shifts)
        warning = rule.warning(found.retention)
        if warning is not None and rule.refuse:
            raise LedgerError(
                f"With these facts {warning}, so nothing was changed; add fewer, or revoke some."
            )
        right = {fact.id: holds for fact, holds in zip(facts, found.held, strict=True)}
        entries = [dataclasses.replace(one, held=right[one.id]) for one in entries]
        moved = dataclasses.replace(moved, entries=[*rest, *entries])
        made = held.commit(moved, action, self.signed, "replaced", found.retention)
        return LedgerChange(made, entries, old, known=known, warning=warning)

    def _tell_known(self, known: Sequence[Fact], action: str, skip_known: bool) -> None:
        if known:
            option = " (--skip-known leaves them out)" * (action == "add")  # which alone has it
            what = "left out" if skip_known else f"taken in all the same{option}"
            self.told(f"The unedited model answers {named(known)} right already; {what}.")


def _read(
    held: Ledger,
    facts: str | Path | Sequence[Fact],
    model: str | LoadedModel | None,
    limit: int | None,
    strict: bool,
    alternative: bool,
    away: bool = False,
) -> FactSet:
    """The facts of a file, checked without the model's weights."""
    encoder = encoder_for(model or held.about.model, held.editor.settings.end_of_answer)
    return checked_facts(facts, encoder, limit, strict, alternative, away)


def _bench(
    about: About,
    editor: Editor,
    model: str | LoadedModel | None,
    device: str,
    trunk: TrunkSettings,
) -> Workbench:
    """The ledger's model, which must be the one that it began with."""
    loaded = opened(model or about.model, about.dtype, device)
    about.check(loaded)
    sites = editor.settings.sites_in(loaded.model)
    bench = lay_out(loaded, sites, editor.settings.end_of_answer, trunk=trunk)
    editor.check_fits(bench.trunk.sites)
    return bench


def _tell(duplicates: Sequence[Fact], known: FactSet, told: Told) -> None:
    """What nobody sees, which facts the ledger holds already, and which the file holds twice."""
    for line in unseen_said(unseen(known)):
        told(line)
    if duplicates:
        told(f"The ledger holds {named(duplicates)} already; left out.")
    for one in known.skipped:
        told(f"Fact {one.fact.id!r} is a {one.kind} of {one.earlier.id!r} before it; left out.")
