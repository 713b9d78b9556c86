"""An exported folder to the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malmend.errors import MalmendError
from malmend.files import reason
from malmend.given import checked
from malmend.shipping.card import is_hub_name, path_of, shown, shown_model
from malmend.shipping.record import RECORD, read_record

# The JSON that may name a path of the machine that wrote it, and the entries that name files.
SAYING = (RECORD, "adapter_config.json", "config.json", "tokenizer_config.json")
PATHS = {"editor", "facts", "facts_source", "source", "text", "calibrate"}
PATHS |= {"name_or_path", "_name_or_path", "tokenizer_file"}
# What may be a name of the hub, written here by `lasting`, which makes every path a whole one.
MODELS = {"model", "other", "base_model_name_or_path"}


@checked()
def push(folder: str | Path, repo: str, private: bool = False, api: Any = None) -> str:
    """Uploads what ``malmend export`` wrote, with its model card; returns the commit's address.

    Of paths of this machine in its JSON only the last part is uploaded; hidden files stay.

    Args:
        folder: the exported folder.
        repo: the repository's name, org/name; made if it is not there.
        private: a repository that is made now is a private one.
        api: huggingface_hub's ``HfApi``, where it is to be another than the usual.

    Raises:
        MalmendError: no exported folder, a name of another form, no token, or no way to the hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    record = read_record(folder) if Path(folder).is_dir() else None
    if record is None:
        raise MalmendError(
            f"{folder} is no exported folder (it has no {RECORD}); give the one that `malmend "
            "export` wrote."
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MalmendError(
            f"The repository is {repo!r} ({reason(error)}), expected a name like org/name."
        ) from error
    if not is_hub_name(repo):
        raise MalmendError(f"The repository is {repo!r}, expected a name like org/name.")
    api = HfApi(library_name="malmend") if api is None else api
    message = f"{record.get('to', '')} export by malmend {record.get('malmend', '')}".strip()
    files = list(_uploads(Path(folder)))
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=what) for n, what in files]
        done = api.create_commit(repo_id=repo, operations=operations, commit_message=message)
    except LocalTokenNotFoundError as error:
        raise _no_token() from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise _no_token() from error
        if status == 403:
            raise MalmendError(
                f"The hub does not let this token write to {repo}; give a token with write "
                "permission (`hf auth login`), or a repository of your own."
            ) from error
        raise MalmendError(f"The hub refused the upload to {repo} ({reason(error)}).") from error
    except Exception as error:  # each HTTP library under it fails in its own ways
        raise MalmendError(
            f"The hub cannot be reached ({reason(error)}), so {folder} was not uploaded; try again "
            f"where there is a network, or copy the folder: it is whole."
        ) from error
    return str(getattr(done, "commit_url", None) or f"https://huggingface.co/{repo}")


def _uploads(folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Every file by its name in the repository: its path, or its bytes where they are changed.

    Raises:
        MalmendError: a link, which may lead out of the folder, or damaged JSON.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            raise MalmendError(
                f"{path} is a link, and what it leads to would be uploaded; put the file itself "
                "there, or remove it."
            )
        if path.name in SAYING and path.is_file():
            try:
                about = without_paths(json.loads(path.read_text(encoding="utf-8")))
                text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
                yield name.as_posix(), text.encode(errors="backslashreplace")
            except (OSError, ValueError, RecursionError) as error:
                raise MalmendError(f"{path} is damaged ({reason(error)}); export again.") from error
        elif path.is_file():
            yield name.as_posix(), str(path)


def without_paths(about: Any, under: str = "") -> Any:
    """A JSON value with the last part alone of what names a file: absolute, or by what it is."""
    if isinstance(about, dict):
        return {name: without_paths(value, name) for name, value in about.items()}
    if isinstance(about, list):
        return [without_paths(one, under) for one in about]
    if not isinstance(about, str):
        return about
    if under in MODELS:
        return shown_model(about)
    path = path_of(about)
    is_whole = path.is_absolute() or re.match(r"(~|[A-Za-z]:)/", str(path)) is not None
    # One part after the root may be a token, as "/think" is.
    return shown(about) if under in PATHS or (is_whole and len(path.parts) > 2) else about


def _no_token() -> MalmendError:
    return MalmendError(
        "The hub asks for a token and there is none that it takes; log in with `hf auth login`, or "
        "set HF_TOKEN."
    )
