from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def save(tmp_path):
    def write(content: object, name: str = "facts") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_bytes(content.encode())
        return path

    return write
