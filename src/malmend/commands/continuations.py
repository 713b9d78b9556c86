"""Plain text in, facts out: passages and what follows them (MEND's generation setting)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from malmend.facts.continuations import continuations as parted
from malmend.facts.fact import Fact, Skipped
from malmend.facts.objects import write_facts
from malmend.facts.readers import read_text
from malmend.files import writable
from malmend.given import checked
from malmend.models.load import LoadedModel
from malmend.patch import by_one_thread
from malmend.workbench import encoder_for


@dataclass(frozen=True)
class ContinuationsResult:
    """The facts, the file they were written to, and those left out as their prompt is there."""

    facts: tuple[Fact, ...] = field(repr=False)
    path: Path
    skipped: tuple[Skipped, ...] = field(default=(), repr=False)


@by_one_thread
@checked()
def continuations(
    model: str | LoadedModel,
    text: str | Path,
    out: str | Path,
    tokens: int = 10,
    prompt_tokens: int = 32,
    limit: int | None = None,
) -> ContinuationsResult:
    """Writes a facts file of a text's passages; edit them with ``--end-of-answer none``.

    Args:
        model: whose tokens are counted; its weights are not read.
        text: a text file, a passage per line.
        out: path of the facts file to write.
        tokens: of each continuation.
        prompt_tokens: of each prompt, at least.
        limit: the first so many passages that are long enough.

    Raises:
        MalmendError: any bad input, in one sentence.
    """
    path = writable(out, text, model)
    words = read_text(text)
    facts, skipped = parted(encoder_for(model, "none"), words, tokens, prompt_tokens, limit)
    write_facts(facts, path)
    return ContinuationsResult(tuple(facts), path, tuple(skipped))
