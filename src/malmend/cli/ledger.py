"""``malmend ledger ACTION ...``: the options of its actions, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape

from malmend import ledger as actions
from malmend.cli import show
from malmend.cli.options import (
    add_editor,
    add_editor_settings,
    derive,
    parse,
    parser_of,
    take_editor_settings,
)
from malmend.errors import LedgerError, MalmendError, counted, nearest
from malmend.ledger import Entry, Generation

FAILING = 3  # exit code of a `verify` that found facts that do not hold
SHOWN = 20  # facts of a list that are named one by one


def ledger(arguments: list[str], _what: str) -> int:
    """Runs one action and returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        show.plain(
            "usage: malmend ledger ACTION ...   (malmend ledger ACTION --help says more)\n\n"
        )
        show.plain("".join(f"  {name:<10} {what}\n" for name, (_, what) in ACTIONS.items()))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in ACTIONS:
        raise MalmendError(
            f"There is no action {name!r} of malmend ledger{nearest(name, ACTIONS) or '.'} "
            f"Expected one of {', '.join(ACTIONS)}."
        )
    run, _ = ACTIONS[name]
    return run(rest) or 0


def _parser(action: str) -> Any:
    parser = parser_of(f"ledger {action}", ACTIONS[action][1])
    parser.add_argument("ledger", type=str, help="the ledger's folder")
    return parser


def _with_model(action: str, function: Callable[..., Any], skip: set[str]) -> Any:
    """The parser of an action that loads the model."""
    parser = _parser(action)
    if "facts" in skip:
        parser.add_argument("facts", type=str, help="facts file")
    parser.add_argument(
        "--model", type=str, help="where the model lies now; null for where it lay at the start"
    )
    derive(parser, function, {"ledger", "model", "told"} | skip)
    return parser


def _init(arguments: list[str]) -> None:
    from malmend.editors.settings import EditorSettings

    parser = _parser("init")
    parser.add_argument("model", type=str, help="name, folder or GGUF file")
    own = {"ledger", "model", "editor", "settings", "method", "told", "rule"}
    derive(parser, actions.init, own)
    add_editor(parser)
    parser.add_argument("--method", type=str, default="malmen", help="malmen; others do not add up")
    parser.add_class_arguments(actions.StopRule, "rule")
    add_editor_settings(parser, {"network", "method"})
    given = parse(parser, arguments)
    rule, method = actions.StopRule(**given.pop("rule")), given["method"]
    settings = take_editor_settings({**given, "method": "malmen"}, network=False)
    given = {name: value for name, value in given.items() if not hasattr(settings, name)}
    given |= {"settings": None if settings == EditorSettings() else settings}
    show.with_bars(actions.init, {**given, "method": method, "rule": rule})
    show.status(f"Ledger: {given['ledger']}, generation 0, no facts.")


def _add(arguments: list[str]) -> None:
    given = parse(_with_model("add", actions.add, {"facts"}), arguments)
    _changed(show.with_bars(actions.add, given))


def _replace(arguments: list[str]) -> None:
    given = parse(_with_model("replace", actions.replace, {"facts"}), arguments)
    _changed(show.with_bars(actions.replace, given))


def _revoke(arguments: list[str]) -> None:
    parser = _parser("revoke")
    parser.add_argument("ids", type=str, nargs="+", help="ids of the facts, as list shows them")
    derive(parser, actions.revoke, {"ledger", "ids"})
    given = parse(parser, arguments)
    with show.bars() as bars:
        done = actions.revoke(**given, progress=bars)
    _changed(done)


def _rollback(arguments: list[str]) -> None:
    parser = _parser("rollback")
    parser.add_argument("generation", type=int, help="as history shows them; 0 holds no fact")
    derive(parser, actions.rollback, {"ledger", "generation"})
    given = parse(parser, arguments)
    with show.bars() as bars:
        done = actions.rollback(**given, progress=bars)
    _changed(done)


def _patch(arguments: list[str]) -> None:
    parser = _parser("patch")
    parser.add_argument("--out", type=str, required=True, help="path of the patch to write")
    given = parse(parser, arguments)
    made = show.with_bars(actions.patch, given)
    count, generation = made.provenance["facts"], made.provenance["generation"]
    empty = " The shift is zero: the model with it is the base, bit for bit." * (not count)
    show.say(f"Patch of generation {generation}, {_facts(count)}: {given['out']}.{empty}")


def _list(arguments: list[str]) -> None:
    from malmend.facts.objects import write_facts
    from malmend.files import writable

    parser = _parser("list")
    derive(parser, actions.list_facts, {"ledger"})
    parser.add_argument("--out", type=str, help="facts file to write them to, as JSON Lines")
    given = parse(parser, arguments)
    out = given.pop("out")
    if out is not None:
        if given["former"]:
            raise LedgerError(
                "--out writes facts to add again, where one that was replaced would stand before "
                "the one that replaced it; leave --former out."
            )
        writable(out, given["ledger"])
    entries = actions.list_facts(**given)
    for one in entries:
        show.say(f"{one.id}  {one.prompt} -> {one.answer}")
        where = f"{one.status} since generation {one.generation}"
        show.OUT.print(
            escape(f"    {where}; {one.author}, {one.time}, {one.source}"),
            style="dim",
            soft_wrap=True,
        )
    if not entries:
        show.say("The ledger holds no fact.")
    if out is not None:
        write_facts((one.fact for one in entries), out)
        show.say(f"Facts file: {out}")


def _history(arguments: list[str]) -> None:
    for step in actions.history(**parse(_parser("history"), arguments)):
        one = step.generation
        moved = f"{step.entered:,} came, {step.left:,} went, {_facts(one.facts)}"
        show.say(f"{one.number:>4}  {one.time}  {one.action}: {moved}{_state(one)}  ({one.author})")
    show.OUT.print(
        "norm: of all shifts, as a share of the edited weights' own\n"
        "kept: general questions' answer tokens that keep their first choice",
        style="dim",
    )


def _state(one: Generation) -> str:
    """How far the model is from the unedited one."""
    kept = "" if one.retention is None else f", kept {one.retention:.1%}"
    return f", norm {one.norm:.2%}{kept}"


def _verify(arguments: list[str]) -> int:
    given = parse(_with_model("verify", actions.verify, set()), arguments)
    with show.bars() as bars:
        found = actions.verify(**given, progress=bars)
    failing = found.failing
    show.say(f"{len(found.rows) - len(failing):,} of {_facts(len(found.rows))} hold.")
    for row in failing:
        since = "held when it was added" if row.entry.held else "did not hold when it was added"
        show.say(f"  {_asked(row.entry, row.reply.said)} ({since})")
    in_chat = [row for row in found.rows if row.holds_in_chat is not None]
    if in_chat:
        lost = [row for row in in_chat if not row.holds_in_chat]
        show.say(f"In a chat {len(in_chat) - len(lost):,} of {_facts(len(in_chat))} hold.")
        for row in lost:
            show.say(f"  {_asked(row.entry, row.reply.text_chat)}")
    if found.retention is not None:
        show.say(f"General questions keep {found.retention:.1%} of their answer tokens.")
    _warn(found.warning)
    return FAILING if failing else 0


def _asked(entry: Entry, said: str | None) -> str:
    """What a fact should give and what the model gives."""
    return f"{entry.id}: {entry.prompt!r} should give {entry.answer!r}, gives {said!r}"


def _changed(done: actions.LedgerChange) -> None:
    """What a change came to."""
    one = done.generation
    if not done.entered and not done.left:
        same = one.action.startswith("rollback")  # which is a generation all the same
        what = "The same facts as before" if same else "Nothing changed"
        show.say(f"{what}: generation {one.number}, {_facts(one.facts)}.")
        return
    parts = []
    for what, entries in (("came", done.entered), ("went", done.left)):
        if entries:
            parts.append(f"{_facts(len(entries))} {what} ({_ids(entries)})")
    show.say(f"Generation {one.number}: {', '.join(parts)}; {_facts(one.facts)} now.")
    new = [entry for entry in done.entered if entry.generation == one.number]
    if new and one.action in ("add", "replace"):
        show.say(f"New facts that hold: {sum(entry.held for entry in new):,} of {len(new):,}.")
    kept = "" if one.retention is None else f", general questions keep {one.retention:.1%}"
    show.say(f"Norm of the shift: {one.norm:.2%} of the edited weights' own{kept}.")
    _warn(done.warning)


def _warn(warning: str | None) -> None:
    if warning:
        show.say(f"Warning: {warning}. Revoke facts, or expect other answers to go.")


def _ids(entries: Sequence[Entry]) -> str:
    shown = ", ".join(entry.id for entry in entries[:SHOWN])
    return shown + (f" and {len(entries) - SHOWN:,} more" if len(entries) > SHOWN else "")


def _facts(count: int) -> str:
    return counted(count, "fact")


# What runs each action, and what it does, for a person.
ACTIONS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "init": (_init, "begin a ledger: fix the model, the editor and its calibration"),
    "add": (_add, "add facts; the shift is as if all had been added at once"),
    "revoke": (_revoke, "take facts out, as if they had never been added"),
    "replace": (_replace, "give prompts that the ledger holds other answers"),
    "list": (_list, "the facts that the model carries"),
    "verify": (_verify, "ask the model every active fact; exit code 3 where one does not hold"),
    "history": (_history, "every generation, and what it did"),
    "rollback": (_rollback, "make the facts of an earlier generation active again"),
    "patch": (_patch, "write the current generation as a patch"),
}
