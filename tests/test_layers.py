from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in an empty folder that also stands in for the home."""
    environment = {
        **os.environ,
        "HOME": str(folder),
        "MALMEND_CACHE": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))
"""


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, str(config)]
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=120)


def test_imports_run_one_way():
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kept, 0 broken" in done.stdout


def test_every_module_has_a_layer():
    """One without could import anything."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = settings["contracts"][0]["layers"]
    there = {one.name for one in pkgutil.iter_modules([str(ROOT / "src/malmend")])}
    assert {name.strip() for layer in layers for name in layer.split("|")} == {
        f"malmend.{name}" for name in there
    }


def test_a_broken_contract_would_be_seen(tmp_path):
    config = tmp_path / "upside_down.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "malmend"\n'
        '[[tool.importlinter.contracts]]\nname = "upside down"\ntype = "layers"\n'
        'layers = ["malmend.errors", "malmend.files"]\n'
    )
    done = lint(config)
    assert done.returncode == 1
    assert "0 kept, 1 broken" in done.stdout


@pytest.mark.parametrize("module", ["malmend", "malmend.errors", "malmend.cli"])
def test_importing_is_quick_and_silent_and_leaves_nothing(module, tmp_path):
    heavy = "{'torch', 'transformers', 'jsonargparse', 'rich', 'numpy'}"
    done = run(f"import sys, {module}; sys.exit(sorted({heavy} & set(sys.modules)) or 0)", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_every_public_name_can_be_had_and_nothing_is_printed(tmp_path):
    code = (
        "import malmend\n"
        "for name in malmend.__all__: getattr(malmend, name)\n"
        "assert malmend.eval is malmend.evaluate\n"
        "assert set(dir(malmend)) == set(malmend.__all__)\n"
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "line",
    [
        "from malmend import ledger",
        "import malmend.ledger as ledger",
        "import malmend; ledger = malmend.ledger",
        "import malmend.ledger; from malmend.ledger import add; ledger = malmend.ledger",
    ],
)
def test_the_ledger_is_a_module_however_it_is_imported(line, tmp_path):
    code = f"{line}; import malmend; assert ledger is malmend.ledger; ledger.add, ledger.patch"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import malmend

    with pytest.raises(AttributeError, match="has no attribute 'edits'"):
        malmend.edits  # noqa: B018
