"""An exported folder on its way to the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from malmend.errors import MalmendError
from malmend.files import reason
from malmend.shipping.card import is_hub_name
from malmend.shipping.record import RECORD, read_record

# Where the files of an export may name a path of the machine that wrote them.
SAYING = (RECORD, "adapter_config.json", "config.json", "tokenizer_config.json")
PATHS = {"model", "editor", "facts", "facts_source", "keys"}
PATHS |= {"base_model_name_or_path", "name_or_path", "_name_or_path"}


def pushed(folder: str | Path, repo: str, private: bool, api: Any) -> str:
    """Uploads the folder to a repository, made if need be; returns the commit's address.

    Of paths of this machine in its JSON only the last part is uploaded; hidden files stay.

    Args:
        folder: that ``malmend export`` wrote.
        repo: ``org/name``.
        private: makes a new repository a private one.
        api: huggingface_hub's ``HfApi``.

    Raises:
        MalmendError: no exported folder, a name of another form, no token, or no way to the hub.
    """
    from huggingface_hub import CommitOperationAdd
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
    message = f"{record.get('to', '')} export by malmend {record.get('malmend', '')}".strip()
    try:
        api.create_repo(repo_id=repo, private=private, exist_ok=True)
        files = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=what)
            for name, what in _uploads(Path(folder))
        ]
        done = api.create_commit(repo_id=repo, operations=files, commit_message=message)
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
    """Every file by its name in the repository: its path, or its bytes where they are changed."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if name.as_posix() in SAYING:
            about = without_paths(json.loads(path.read_text(encoding="utf-8")))
            yield name.as_posix(), (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()
        else:
            yield name.as_posix(), str(path)


def without_paths(about: Any) -> Any:
    """A JSON value with the last part alone of every absolute path that is said under PATHS."""
    if isinstance(about, list):
        return [without_paths(one) for one in about]
    if not isinstance(about, dict):
        return about
    return {
        name: PurePath(value).name
        if name in PATHS and isinstance(value, str) and Path(value).expanduser().is_absolute()
        else without_paths(value)
        for name, value in about.items()
    }


def _no_token() -> MalmendError:
    return MalmendError(
        "The hub asks for a token and there is none that it takes; log in with `hf auth login`, or "
        "set HF_TOKEN."
    )
