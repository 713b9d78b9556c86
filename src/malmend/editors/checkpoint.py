"""An editor on disk: a folder with ``editor.json`` and the weights that it names, versioned.

The JSON says what the editor is (settings, sites and shapes), what it was made for (fingerprint of
the base), how (training settings, seeds, data), and how it did; ``training.safetensors`` beside it
holds what resuming needs and may be deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from malmend.editors.editor import Editor, SiteStatistics
from malmend.editors.folder import (
    identity_of,
    read_folder,
    said_in,
    settings_from,
    weights_in,
    whole,
    write_folder,
)
from malmend.editors.network import NetworkSettings
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError, nearest
from malmend.facts.fact import Fact, subject_hash
from malmend.models.descent import Descent
from malmend.models.load import LoadedModel
from malmend.numerics.lowrank import compressed, restored
from malmend.numerics.moments import RunningMoments

FORMAT = 3
# Of a shipped editor's moments; text weighs least in what was learned.
RANKS = {"text": 64, "asked": 224, "wording": 192}


@dataclass(frozen=True, eq=False)
class SavedEditor:
    """An editor with what its folder says about it.

    ``identity`` tells its weights from any others', wherever the folder lies and whatever it is
    called; empty of an editor that came from no folder.
    """

    editor: Editor = field(repr=False)
    about: Mapping[str, Any] = field(repr=False)
    identity: str = ""

    @property
    def base(self) -> str:
        """Fingerprint of the model that the editor was trained for."""
        return str(self.about.get("base", ""))

    def seen(self, facts: Sequence[Fact]) -> int | None:
        """How many of the facts are about a subject that the editor was trained on.

        None where the folder does not say what it was trained on, which is not the same as 0.
        """
        return _seen(self.about, facts)


def seen_in_training(folder: Path, identity: str, facts: Sequence[Fact]) -> int | None:
    """As :meth:`SavedEditor.seen`, of a folder that may hold another editor by now, or none.

    None where it is not the editor of this identity that lies there.
    """
    try:
        about = said_in(folder)
        return _seen(about, facts) if identity_of(weights_in(folder, about)) == identity else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # whoever reads it next says what is wrong


def check_trained_for(loaded: LoadedModel, name: str, base: str) -> None:
    """Raises EditorError unless the editor of this name was trained for a model of its weights."""
    if base != loaded.fingerprint:
        raise EditorError(
            f"The editor {name} was trained for a base with fingerprint {base[:12] or 'none'}, the "
            f"model {loaded.name} has {loaded.fingerprint[:12]}; train one for this model."
        )


def _seen(about: Mapping[str, Any], facts: Sequence[Fact]) -> int | None:
    if "subjects" not in about:
        return None
    joined, size = str(about["subjects"]), len(subject_hash(""))
    known = {joined[start : start + size] for start in range(0, len(joined), size)}
    return sum(subject_hash(fact.subject or fact.prompt) in known for fact in facts)


def save_editor(editor: Editor, about: Mapping[str, Any], folder: Path, slim: bool = False) -> None:
    """Writes the two files of an editor's folder.

    ``slim`` is for an editor that is shipped: its networks in float16, and the moments of its prior
    as in equation (16), of the ranks in :data:`RANKS`.
    """
    what = {
        **about,
        "format": FORMAT,
        "settings": asdict(editor.settings),
        "sites": {name: list(shape) for name, shape in editor.shapes.items()},
    }
    tensors = editor.state_dict()
    write_folder(_slim(tensors) if slim else tensors, what, folder)


def _slim(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split("_")
        if kind == "prior":
            term, site = rest
            out[f"low_{term}_{site}"], out[f"rest_{term}_{site}"] = compressed(tensor, RANKS[term])
        else:
            out[name] = tensor.half() if name.startswith("networks.") else tensor
    return out


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`_slim` took apart, put together."""
    out = dict(tensors)
    for name in [name for name in out if name.startswith("low_")]:
        which = name.removeprefix("low_")
        out[f"prior_{which}"] = restored(out.pop(name), out.pop(f"rest_{which}"))
    return out


def load_editor(folder: str | Path, otherwise: str = "train it again") -> SavedEditor:
    """Reads an editor's folder.

    Args:
        folder: as :func:`save_editor` wrote it.
        otherwise: what is to be done about one that is damaged.

    Raises:
        EditorError: no such folder, not an editor, damaged, or written by a newer version.
    """
    folder = Path(folder)
    with whole(f"The editor in {folder}", otherwise):
        about, tensors, identity = read_folder(folder, partial(_check_format, folder))
        editor = _rebuilt(_settings(about["settings"]), about["sites"], _whole(tensors))
        return SavedEditor(editor, about, identity)


def _check_format(folder: Path, about: Mapping[str, Any]) -> None:
    if about["format"] != FORMAT:
        raise EditorError(
            f"{folder} has editor format {about['format']!r}, this version reads {FORMAT}; "
            "use the malmend version that wrote it."
        )


def _rebuilt(
    settings: EditorSettings, sites: Mapping[str, list[int]], tensors: Mapping[str, Tensor]
) -> Editor:
    shapes = {name: (shape[0], shape[1]) for name, shape in sites.items()}
    statistics = {
        name: SiteStatistics(
            RunningMoments(key),
            RunningMoments(value),
            {term: tensors[f"prior_{term}_{index}"] for term in settings.terms},
        )
        for index, (name, (value, key)) in enumerate(shapes.items())
    }
    editor = Editor(settings, shapes, statistics)
    editor.load_state_dict(tensors)  # float16 becomes float32
    check_finite(tensors)
    return editor


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where one holds NaN or infinity.

    A prior's weight of zero and a lambda of zero have minus infinity for a logarithm.
    """
    for name, tensor in tensors.items():
        is_log = name.endswith(("log_weights_SP", "log_ridge_S"))
        if not (tensor.exp() if is_log else tensor).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def _settings(raw: Mapping[str, Any]) -> EditorSettings:
    known = {field.name for field in fields(EditorSettings)}
    for name in raw:
        if name not in known:
            raise EditorError(
                f"The editor has an unknown setting {name!r}{nearest(name, known)}; it was written "
                "by a newer version of malmend, use that."
            )
    descent, network = raw["descent"], settings_from(NetworkSettings, raw["network"])
    descent = None if descent is None else settings_from(Descent, descent)
    given = {**raw, "network": network, "descent": descent}
    settings: EditorSettings = settings_from(EditorSettings, given)
    return settings
