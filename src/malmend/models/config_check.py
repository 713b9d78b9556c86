"""Whether a configuration can be believed, before a library that believes it builds the model.

Every layer, expert and label that it states is an object, made before any weight is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from malmend.errors import ModelError

# The last word of the names under which families count what is built one by one.
COUNTED = re.compile(r"(^|_)(layers?|blocks?|depths?|experts|labels|heads?|codebooks|stages?)$")
MOST = 100_000
MOST_LAYERS = 1_000  # each is a dozen modules: ten thousand take minutes
LAYERS = re.compile(r"(layers?|blocks?|depths?|stages?)$")


def check_config(source: str, **how: Any) -> None:
    """Raises ModelError where a configuration states more parts than any model has.

    Args:
        source: a folder or a hub name.
        how: as for ``from_pretrained``.
    """
    stated, _ = PreTrainedConfig.get_config_dict(source, **how)
    for name, value in _counts(stated):
        most = MOST_LAYERS if LAYERS.search(name) else MOST
        if value > most:
            raise ModelError(
                f"The configuration of {source!r} states {name} = {value:,}, expected at most "
                f"{most:,}; fetch the model again."
            )


def _counts(stated: Any, under: str = "") -> Iterator[tuple[str, int]]:
    """Every number that counts parts, of nested configurations too."""
    if isinstance(stated, dict):
        for name, value in stated.items():
            yield from _counts(value, str(name))
    elif isinstance(stated, list):
        for value in stated:
            yield from _counts(value, under)
    elif isinstance(stated, int) and not isinstance(stated, bool) and COUNTED.search(under):
        yield under, stated
