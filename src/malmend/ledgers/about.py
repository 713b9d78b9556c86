"""What is fixed when a ledger begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from malmend.editors.refine import RefineSettings
from malmend.errors import EditorError, LedgerError
from malmend.facts.encoded import Form
from malmend.ledgers.tables import spoilt
from malmend.ledgers.watch import StopRule
from malmend.models.identity import bits, configuration_of, tokens_digest, unlike
from malmend.models.load import LoadedModel


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
        bits, settings: of the unedited model: digest of its weights as they are, and what
            counts of its configuration; empty of ledgers that are older.
        frames: in which each fact is solved beside its plain prompt; none in ledgers that are
            older.
        tokenizer: digest of its tokenizer, and with frames of its chat template; empty likewise.
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
    bits: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    frames: Sequence[str] = ()
    tokenizer: str = ""

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
            if not isinstance(found.settings, dict) or not isinstance(found.bits, str):
                raise TypeError("bits or settings is of another kind")
            if not isinstance(found.tokenizer, str):
                raise TypeError("tokenizer is no text")
            RefineSettings(frames=tuple(found.frames))
            if not isinstance(found.editor, dict) or not found.weight_norm > 0:
                raise TypeError("editor or weight_norm is of another kind")
        except (TypeError, KeyError, ValueError, EditorError) as error:
            raise spoilt(path, f"its table 'about': {error}") from error
        return found

    def check(self, loaded: LoadedModel) -> None:
        """Raises LedgerError unless this is the model that the ledger began with."""
        if (loaded.fingerprint, loaded.dtype) != (self.base, self.dtype):
            raise LedgerError(
                f"The ledger is of a model with fingerprint {self.base[:12]} in {self.dtype}, the "
                f"model {loaded.name} has {loaded.fingerprint[:12]} in {loaded.dtype}; give that "
                "one with --model, or begin another ledger."
            )
        names = list(unlike(self.settings, configuration_of(loaded.model)))
        what = f"another {names[0]} in its configuration" if names else ""
        if not names and self.bits and self.bits != bits(loaded.model):
            what = "weights that differ below bfloat16"
        tokens = tokens_digest(loaded.tokenizer, in_chat=bool(self.frames))
        if not what and self.tokenizer not in ("", tokens):
            what = "another tokenizer" + " or chat template" * bool(self.frames)
        if what:
            raise LedgerError(
                f"The model {loaded.name} has {what}, so that facts read by it would not add up "
                "with the ledger's; give the one that it began with, or begin another ledger."
            )

    def values(self) -> dict[str, Any]:
        """For the table."""
        return asdict(self)
