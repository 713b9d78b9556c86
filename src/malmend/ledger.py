"""The words of ``malmend ledger`` as functions: ``malmend.ledger.add("LEDGER", "facts.jsonl")``."""

from malmend.commands.ledger import Step, history, list_facts, patch, revoke, rollback
from malmend.commands.ledger_facts import (
    LedgerChange,
    Verification,
    Verified,
    add,
    replace,
    verify,
)
from malmend.commands.ledger_init import init
from malmend.ledgers.entries import Entry, Generation
from malmend.ledgers.watch import StopRule

__all__ = [
    "Entry",
    "Generation",
    "LedgerChange",
    "Step",
    "StopRule",
    "Verification",
    "Verified",
    "add",
    "history",
    "init",
    "list_facts",
    "patch",
    "replace",
    "revoke",
    "rollback",
    "verify",
]
