"""Write src/malmend/data/facts.jsonl: true facts of many kinds, from four packages.

Run ``python scripts/make_facts.py`` to write the file, with ``--check`` to compare only.
The same releases give the same bytes: inputs are sorted, and every choice is made by a hash of
the entry's key, so neither dictionary order nor the Python version matters. The parts are in
``scripts/facts``; sources and licences are in src/malmend/data/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from facts.build import file_text

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "malmend" / "data" / "facts.jsonl"


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or with ``--check`` say whether it is up to date."""
    parser = argparse.ArgumentParser(description="Write src/malmend/data/facts.jsonl.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    text = file_text()
    data = text.encode()
    if options.check:
        same = OUTPUT.is_file() and OUTPUT.read_bytes() == data
        print(f"{OUTPUT.name}: {'up to date' if same else 'differs: run scripts/make_facts.py'}")
        return 0 if same else 1
    OUTPUT.write_bytes(data)
    print(f"{OUTPUT.name}: {len(text.splitlines()):,} facts, {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
