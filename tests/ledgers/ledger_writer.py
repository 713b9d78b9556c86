"""A process whose children write a ledger until they are killed; run by test_ledger_killed.py.

    python ledger_writer.py LEDGER CACHE SEED

For every line on standard input, a number, a child is forked that is killed at so many steps in the
ledger's folder (see killing.py).  It changes the ledger over and over, and prints every generation
that was committed, with its number of facts; "gone" is printed behind it.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from pathlib import Path

import malmend
from command_support import make_facts, make_model
from helpers import byte_level
from killing import kill_at
from malmend.models.load import LoadedModel, prepared

FACTS = make_facts(60, seed=5)


def write(ledger: Path, loaded: LoadedModel, generator: random.Random) -> None:
    """Adds, revokes and rolls back, at random, without end."""
    while True:
        active = [entry.id for entry in malmend.ledger.list_facts(ledger)]
        absent = [fact for fact in FACTS if fact.id not in active]
        last = malmend.ledger.history(ledger)[-1].generation.number
        chosen = generator.random()
        if absent and (chosen < 0.5 or not active):
            some = generator.sample(absent, min(len(absent), 20))
            done = malmend.ledger.add(ledger, some, model=loaded)
        elif chosen < 0.8 or not last:
            some_ids = generator.sample(active, min(len(active), 5))
            done = malmend.ledger.revoke(ledger, some_ids)
        else:
            done = malmend.ledger.rollback(ledger, generator.randrange(last))
        print(f"generation {done.generation.number} {done.generation.facts}", flush=True)


def main() -> None:
    """Forks for every line."""
    ledger, cache, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ["MALMEND_CACHE"] = cache
    tokenizer = byte_level()
    loaded = prepared(make_model(tokenizer), tokenizer, "tiny")
    for number, line in enumerate(sys.stdin):
        child = os.fork()
        if child == 0:
            kill_at(int(line), ledger)
            try:
                write(ledger, loaded, random.Random(seed + number))
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main()
