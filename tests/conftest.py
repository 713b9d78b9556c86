"""Its place makes ``helpers`` and ``tiny`` importable from every test."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tiny tensors on two threads only wait for one another.
torch.set_num_threads(1)

# Nothing may hang on how busy a machine is: no deadline for an example, none for drawing the first.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

# Nor on what a terminal or a run of several processes has set: what is printed would be another.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "WORLD_SIZE"):
    os.environ.pop(name, None)

SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what slow.txt lists; it may list nothing that is not there."""
    lines = SLOW.read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    cases = Counter[str]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        cases[name] += 1
        if name in listed or (f"{name}[1:]" in listed and cases[name] > 1):
            item.add_marker(pytest.mark.slow)
    gone = sorted(line for line in listed if not cases[line.removesuffix("[1:]")])
    if gone and not config.getoption("file_or_dir"):
        raise pytest.UsageError(f"{SLOW.name} lists {gone[0]}, which is no test (any more).")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, in place of the user's."""
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
