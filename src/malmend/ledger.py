"""The words of ``malmend ledger`` as functions: ``malmend.ledger.add("LEDGER", "facts.jsonl")``."""

from malmend.commands.ledger import (
    Entry,
    Generation,
    LedgerChange,
    Step,
    StopRule,
    Verification,
    Verified,
    add,
    history,
    init,
    list_facts,
    patch,
    replace,
    revoke,
    rollback,
    verify,
)

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
