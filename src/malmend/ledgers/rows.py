"""The tokens of a ledger's facts: one file for each time that facts were added, never changed.

What a fact put into the sums must come out of them again, and facts come back by a rollback.
Capturing them anew would not do: descent stops at thresholds, so a rounding that differs between
micro-batches can be one step more of a fact.  So each fact's rows are kept, of SmolLM2-135M about
50 kB a token, and neither revoking nor rolling back needs the model.

Shape letters: N tokens, K key width, V value width, M facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from malmend.editors.editor import Editor
from malmend.editors.refine import framed
from malmend.errors import EditorError
from malmend.facts.fact import Fact
from malmend.files import reason
from malmend.ledgers.entries import Entry
from malmend.ledgers.sums import Rows, checked, damaged, read_tensor, save_durably
from malmend.models.capture import capture, token_counts
from malmend.progress import Progress, counting
from malmend.workbench import Workbench

PART = 4096  # facts whose rows are held at a time
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Taken:
    """Rows of some facts by site name, and how many of them each fact has there."""

    rows: Mapping[str, Rows]
    counts: Mapping[str, list[int]]

    def tokens(self, fact: int) -> tuple[int, ...]:
        """How many rows a fact has, by site."""
        return tuple(counts[fact] for counts in self.counts.values())


def taken(
    bench: Workbench,
    editor: Editor,
    facts: Sequence[Fact],
    frames: Sequence[str],
    progress: Progress,
) -> Taken:
    """Captures facts on the unedited model and transforms them: (6), (9) and (12).

    A fact's rows are those of its plain prompt, then those of it in each frame that it fits in.

    Raises:
        EditorError: a key or a value difference is not finite.
    """
    settings = editor.settings
    plain = [fact.question for fact in facts]
    inside = [framed(bench.encoder, plain, frame) for frame in frames]
    each = [
        [one for one in ones if one]
        for ones in zip(bench.encoder.encode_all(plain), *inside, strict=True)
    ]
    questions = list(chain.from_iterable(each))
    count = counting(progress, "keys and value gradients", len(questions))
    captured = capture(bench.trunk, questions, settings.tokens, settings.descent, count)
    rows, counts = {}, {}
    aggregated = editor.aggregate(captured)
    for index, (site, pair) in enumerate(zip(bench.trunk.sites, captured, strict=True)):
        ones_N = torch.ones(len(pair.keys_NK), dtype=torch.float64)
        weights_N = editor.row_weights(index, pair)
        weights_N = ones_N if weights_N is None else weights_N.detach()
        both = (pair.keys_NK, aggregated[index].diffs_NV)
        if not all(tensor.isfinite().all() for tensor in both):
            raise EditorError(
                f"What {bench.loaded.name} gives for these facts at {site.name} holds NaN or "
                "infinity, so nothing was added; check that its weights are whole."
            )
        rows[site.name] = Rows(*both, weights_N)
        counts[site.name] = [
            sum(token_counts(ones, settings.tokens, site.in_encoder)) for ones in each
        ]
    return Taken(rows, counts)


def save_rows(one: Taken, path: Path) -> None:
    """Writes the rows; they are on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    for name, rows in one.rows.items():
        tensors |= {
            f"{name}.keys": rows.keys_NK,
            f"{name}.diffs": rows.diffs_NV,
            f"{name}.weights": rows.weights_N,
            f"{name}.starts": torch.tensor([0, *one.counts[name]]).cumsum(0),
        }
    save_durably(tensors, path, {})


def rows_of(
    folder: Path, name: str, shape_VK: tuple[int, int], site: int, entries: Sequence[Entry]
) -> Iterator[Rows]:
    """The rows of facts at one site, in their order, some thousand facts at a time.

    Args:
        folder: of the ledger.
        name, shape_VK: of the site.
        site: its place among the sites, by which ``Entry.tokens`` are told.
        entries: the facts.

    Raises:
        LedgerError: a file is not there, is damaged, or does not hold what its facts say.
    """
    for file, group in groupby(entries, key=lambda entry: entry.rows):
        facts = list(group)
        for start in range(0, len(facts), PART):
            yield _read(folder / file, name, shape_VK, site, facts[start : start + PART])


def _read(
    path: Path, name: str, shape_VK: tuple[int, int], site: int, facts: Sequence[Entry]
) -> Rows:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {
                part: read_tensor(file, f"{name}.{part}")
                for part in ("keys", "diffs", "weights", "starts")
            }
            chosen = _places(path, f"{name}.starts", parts["starts"], site, facts)
            total, (value, key) = int(parts["starts"][-1]), shape_VK
            found = []
            for part, width in (("keys", (key,)), ("diffs", (value,)), ("weights", ())):
                whole = parts[part]
                if tuple(whole.shape) != (total, *width):
                    checked(path, f"{name}.{part}", whole, (total, *width), (whole.dtype,))
                some = whole[chosen]
                wide = _WIDE[1:] if part == "weights" else _WIDE
                checked(path, f"{name}.{part}", some, (len(chosen), *width), wide)
                found.append(some)
    except (OSError, SafetensorError) as error:
        raise damaged(path, reason(error)) from error
    return Rows(*found)


def _places(path: Path, name: str, starts_M: Tensor, site: int, facts: Sequence[Entry]) -> Tensor:
    """Which rows are the facts', checked against what the facts' own table says of them."""
    is_list = starts_M.ndim == 1 and starts_M.dtype == torch.int64 and len(starts_M) > 1
    if not is_list or starts_M[0] != 0 or not (starts_M.diff() >= 0).all():
        raise damaged(path, f"{name} are no starts of facts")
    starts = starts_M.tolist()
    for fact in facts:
        inside = fact.place + 1 < len(starts)
        if not inside or starts[fact.place + 1] - starts[fact.place] != fact.tokens[site]:
            raise damaged(path, f"{name} does not fit fact {fact.id!r}")
    return torch.cat([torch.arange(starts[one.place], starts[one.place + 1]) for one in facts])
