"""An exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from malmend.given import checked
from malmend.shipping.hub import pushed


@checked()
def push(folder: str | Path, repo: str, private: bool = False, api: Any = None) -> str:
    """Uploads what ``malmend export`` wrote, with its model card; returns the commit's address.

    Args:
        folder: the exported folder.
        repo: the repository's name, org/name; made if it is not there.
        private: a repository that is made now is a private one.
        api: huggingface_hub's ``HfApi``, where it is to be another than the usual.

    Raises:
        MalmendError: no exported folder, no token, no network.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="malmend")
    return pushed(folder, repo, private, api)
