"""What is fixed when a ledger begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from malmend.facts.encoded import Form
from malmend.shipping.ledger_table import spoilt
from malmend.shipping.ledger_watch import StopRule


@dataclass(frozen=True)
class About:
    """What is fixed when a ledger begins.

    Attributes:
        model, base, dtype, form: of the unedited model: name, fingerprint, dtype, form of reading.
        editor: what patches say of the editor: its name, and the identity of a trained one.
        identity: of the copy in the ledger's folder.
        weight_norm: root of the sum of squares of all edited weights.
        rule: when to warn.
        created, malmend: when, and by which version.
    """

    model: str
    base: str
    dtype: str
    form: Form
    editor: Mapping[str, Any]
    identity: str
    weight_norm: float
    rule: StopRule
    created: str
    malmend: str

    @classmethod
    def read(cls, raw: Mapping[str, Any], path: Path) -> About:
        """From what the table holds.

        Raises:
            LedgerError: it holds other names, or values of another kind.
        """
        try:
            found = cls(**{**raw, "rule": StopRule(**raw["rule"])})
            for name in ("model", "base", "dtype", "form", "identity", "created"):
                if not isinstance(getattr(found, name), str):
                    raise TypeError(f"{name} is no text")
            if not isinstance(found.editor, dict) or not found.weight_norm > 0:
                raise TypeError("editor or weight_norm is of another kind")
        except (TypeError, KeyError, ValueError) as error:
            raise spoilt(path, f"its table 'about': {error}") from error
        return found

    def values(self) -> dict[str, Any]:
        """For the table."""
        return asdict(self)
