"""Whether a configuration can be believed, before a library that believes it builds the model.

Every layer, expert and label that it states is an object, made before any weight is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from malmend.errors import ModelError

# What families call what is built one by one, and what tables are made of, by the last word of its
# name; and the most of it that is believed, several times what the largest models have.
MOST_LAYERS = 1_000
MOST: tuple[tuple[str, int], ...] = (
    (r"(layers?|blocks?|depths?|stages?|groups?|group_num|attention_types)$", MOST_LAYERS),
    (r"(heads?|experts)$", 4_096),
    (r"(labels|codebooks)$", 100_000),
    (r"(positions|embeddings|buckets|ctx|size|dim|embd|model|inner)$", 50_000_000),
)
NAMES = ("id2label", "label2id")  # names of a user's own, with numbers


def check_config(source: str, **how: Any) -> None:
    """Raises ModelError where a configuration states more than any model has.

    Args:
        source: a folder or a hub name.
        how: as for ``from_pretrained``.
    """
    stated, _ = PreTrainedConfig.get_config_dict(source, **how)
    for name, value in _counts(stated):
        most = next((most for last, most in MOST if re.search(f"(^|_){last}", name)), None)
        if most is not None and value > most:
            raise ModelError(
                f"The configuration of {source!r} states {name} = {value:,}, expected at most "
                f"{most:,}; fetch the model again."
            )


def _counts(stated: Any, under: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number with its name, of nested configurations too."""
    if isinstance(stated, dict):
        for name, value in stated.items():
            if name not in NAMES:
                yield from _counts(value, str(name))
    elif isinstance(stated, list):
        for value in stated:
            yield from _counts(value, under)
    elif isinstance(stated, int) and not isinstance(stated, bool):
        yield under, stated
