"""A patch as a LoRA adapter in PEFT's format, and such an adapter as a patch.

Shape letters: V value width, K key width, R rank.

    W = W_0 + scaling * B A,   B = lora_B (V x R), A = lora_A (R x K)

PEFT keeps both factors this way round for ``nn.Linear`` and for ``Conv1D``, which alone stores its
weight K x V (``fan_in_fan_out``).  All layers get one rank and ``lora_alpha`` is that rank, so that
the scaling is 1 and readers without patterns of ranks (vLLM) read the same.  Nothing here
unpickles: an adapter is ``adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from malmend.errors import PatchError
from malmend.files import reason
from malmend.models.load import LoadedModel, name_of
from malmend.models.sites import Site
from malmend.models.source import lasting
from malmend.numerics.truncation import Spectrum
from malmend.patch import Patch
from malmend.patch_file import check_header, check_product, load_patch
from malmend.shipping.record import RECORD, read_record

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FOREIGN = "a LoRA adapter"  # the method of one that malmend did not write
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# Settings that make an adapter more, or other, than a shift of the layers it names.
MORE_THAN_A_SHIFT = (
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Starts (init_lora_weights) that take something off the base, so that B A is no shift of it.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MEASURED = ("metrics", "mean_residual", "residual_after")  # of a header: by the whole shifts
# Of a pattern's key: what matches more than one text, and what else there may be.
WILD, PLAIN = re.compile(r"\(\^\|\.\*\\\.\)|\.\*|\\d\+"), re.compile(r"(?:[\w.^$-]|\\\.)*")
MOST_WILD, LONGEST = 3, 200  # how often, and in how long a name: it is tried at each place of it
PLAIN_USES = ("use_rslora",)  # of PEFT's use_..., those that only scale


def write_adapter(
    loaded: LoadedModel, sites: Sequence[Site], shifts: Mapping[str, Spectrum], folder: Path
) -> int:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``; returns the rank.

    Args:
        loaded: the base; PEFT is told its name.
        sites: the layers.
        shifts: of each layer by its name.
        folder: to write into.
    """
    from peft import LoraConfig  # takes seconds

    rank = max(1, *(shift.rank for shift in shifts.values()))
    tensors: dict[str, Tensor] = {}
    for name, shift in shifts.items():
        left_VR, right_RK = shift.halves()
        missing = rank - shift.rank  # of a layer of lower rank: zeros
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(right_RK, (0, 0, 0, missing))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(left_VR, (0, missing))
    config = LoraConfig(
        # A classifier's task would have PEFT save and load its head too.
        task_type=TASKS.get(loaded.reading.form),
        base_model_name_or_path=lasting(loaded.name),
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(shifts),
        fan_in_fan_out=any(site.is_transposed for site in sites),
        inference_mode=True,
    )
    config.target_modules = sorted(shifts)  # it has made a set of them, of no order
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return rank


def _padded(matrix: Tensor, room: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(matrix, room).float().contiguous()


def is_adapter(path: str | Path) -> bool:
    """Whether a folder is a PEFT adapter's."""
    return (Path(path) / CONFIG).is_file()


def read_patch(path: str | Path | Patch) -> Patch:
    """A patch's file, or a LoRA adapter's folder as a patch; a patch as it is.

    Raises:
        PatchError: neither, or damaged.
    """
    if isinstance(path, Patch):
        return path
    if not isinstance(path, str | Path):
        raise PatchError(f"{path!r:.80} was given, expected a patch, or the path of one.")
    return read_adapter(path) if Path(path).is_dir() else load_patch(path)


def based_on(patch: Patch, loaded: LoadedModel) -> Patch:
    """The patch; of an adapter that malmend did not write, as one made for this model.

    PEFT keeps no fingerprint of a base.  Names and shapes of layers are compared all the same.
    """
    if patch.base or patch.provenance.get("method") != FOREIGN:
        return patch
    return Patch(patch.factors, {**patch.provenance, "base": loaded.fingerprint})


def read_adapter(folder: str | Path) -> Patch:
    """A LoRA adapter as a patch: factors scaling * B and A of each layer, float32.

    Its provenance is that of the patch where malmend exported it; of one that was cut for it,
    without what was measured of the patch.

    Raises:
        PatchError: no LoRA, one that is more than a shift of the base (DoRA, saved modules, PiSSA),
            or damaged.
    """
    folder = Path(folder)
    config = _config(folder)
    tensors = _tensors(folder)
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        part = part.removesuffix(".weight")
        if not key.startswith(PREFIX) or part not in ("A", "B") or tensor.ndim != 2:
            raise PatchError(
                f"{folder} holds {key!r}, expected lora_A and lora_B matrices of linear layers; "
                "only plain LoRA adapters are read."
            )
        if tensor.dtype not in FLOATS:
            raise PatchError(
                f"{folder} holds {key!r} as {name_of(tensor.dtype)}, expected "
                f"{', '.join(map(name_of, FLOATS))}; convert it, or save the adapter again."
            )
        if not tensor.isfinite().all():
            raise PatchError(f"{folder} holds NaN or infinity in {key!r}; it is damaged.")
        kept.setdefault(name, {})[part] = tensor
    _check_patterns(folder, config, kept)
    factors = {}
    for name, halves in kept.items():
        if halves.keys() != {"A", "B"} or halves["A"].shape[0] != halves["B"].shape[1]:
            raise PatchError(f"{folder} lacks a fitting half of {name}; it is damaged.")
        scaling = _scaling(folder, config, name, halves["A"].shape[0])
        left_VR, right_RK = (scaling * halves["B"].double()).float(), halves["A"].float()
        check_product(folder, name, left_VR, right_RK)
        factors[name] = (left_VR, right_RK)
    if not factors:
        raise PatchError(f"{folder} holds no adapter of any layer; it is damaged.")
    return Patch(factors, _provenance(folder, config))


def _config(folder: Path) -> dict[str, Any]:
    if not is_adapter(folder):
        raise PatchError(
            f"There is no patch file {folder}: it is a folder without {CONFIG}; give the file of a "
            "patch, or the folder of a LoRA adapter."
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatchError(
            f"{folder / CONFIG} cannot be read ({reason(error)}); give a folder that PEFT wrote."
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise PatchError(f"{folder} is an adapter of type {kind!r}, expected 'LORA'.")
    uses = [name for name in config if name.startswith("use_") and name not in PLAIN_USES]
    more = [name for name in (*uses, *MORE_THAN_A_SHIFT) if config.get(name)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_THE_BASE):
        more.append("init_lora_weights")
    if more:
        raise PatchError(
            f"{folder} is a LoRA adapter with {more[0]} {config[more[0]]!r:.80}, which is more "
            "than a shift of weights; merge it with PEFT, and compare models with `malmend diff`."
        )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise PatchError(
            f"{folder} holds no {WEIGHTS} (pickled adapters are never read); save the adapter "
            "again with PEFT, which writes it."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise PatchError(f"{path} is damaged ({reason(error)}); save the adapter again.") from error


def _check_patterns(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises PatchError about a pattern of ranks or alphas that PEFT may match for ever.

    Its keys are regular expressions, for names that are the file's own too.
    """
    for part in ("rank_pattern", "alpha_pattern"):
        said = config.get(part)
        for key in said if isinstance(said, dict) else ():
            rest, wild = WILD.subn("", key)
            if wild > MOST_WILD or not PLAIN.fullmatch(rest):
                raise PatchError(
                    f"{folder / CONFIG}: {part} has the key {key!r:.80}, expected a layer's name "
                    f"with \\d+, .* or (^|.*\\.) in it {MOST_WILD} times at most; name its layers."
                )
            if (longest := max(map(len, names), default=0)) > LONGEST:
                raise PatchError(
                    f"{folder} names a layer by {longest:,} characters, expected at most {LONGEST} "
                    f"where there is a {part}; it is damaged."
                )


def _scaling(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of a layer, as PEFT has it."""
    from peft.utils.other import get_pattern_key

    if rank < 1:
        raise PatchError(f"{folder} holds matrices of rank 0 of {name}; it is damaged.")
    try:
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        stated = ranks.get(get_pattern_key(list(ranks), name), config["r"])
        alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise PatchError(
            f"{folder / CONFIG} says no rank or alpha of {name}; it is damaged."
        ) from error
    if stated != rank:
        raise PatchError(f"{folder} says rank {stated} of {name}, its matrices have {rank}.")
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _provenance(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    record = read_record(folder)
    if record is not None:
        check_header(folder / RECORD, record["patch"])
        return dict(record["patch"]) if record.get("exact", True) else _cut(folder, record)
    model = config.get("base_model_name_or_path")
    return {"model": model, "method": FOREIGN, "settings": {}}


def _cut(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a patch whose shifts were cut: not the figures, which are of what they were."""
    said = {name: one for name, one in record["patch"].items() if name not in MEASURED}
    try:
        whole = max(site["rank"] for site in record["sites"].values())
        cut = {"rank": record["rank"], "from": said.get("cut", {}).get("from", whole)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PatchError(
            f"{folder / RECORD} says that the shifts were cut and not from which rank; it is "
            "damaged, export again."
        ) from error
    return {**said, "cut": cut}
