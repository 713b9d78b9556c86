"""An exported folder on its way to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from malmend.errors import MalmendError
from malmend.files import reason
from malmend.shipping.card import is_hub_name
from malmend.shipping.record import RECORD, read_record


def pushed(folder: str | Path, repo: str, private: bool, api: Any) -> str:
    """Uploads the folder to a repository, made if need be; returns the commit's address.

    Args:
        folder: that ``malmend export`` wrote.
        repo: ``org/name``.
        private: makes a new repository a private one.
        api: huggingface_hub's ``HfApi``.

    Raises:
        MalmendError: no exported folder, a name of another form, no token, or no way to the hub.
    """
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
        done = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            commit_message=message,
        )
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


def _no_token() -> MalmendError:
    return MalmendError(
        "The hub asks for a token and there is none that it takes; log in with `hf auth login`, or "
        "set HF_TOKEN."
    )
