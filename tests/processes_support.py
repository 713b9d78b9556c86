"""Python in two processes of one run, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def run_two(*command: object) -> list[subprocess.CompletedProcess[str]]:
    """Python with these arguments in both processes, each with what it wrote."""
    with socket.socket() as kept:
        # Bound until both have ended, else another program may be given the port before the first
        # process, whose imports take seconds, listens there: that it may all the same.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        return _run_two(kept.getsockname()[1], command)


def _run_two(port: int, command: Sequence[object]) -> list[subprocess.CompletedProcess[str]]:
    started = []
    for rank in (0, 1):
        around = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        around["PYTHONPATH"] = os.pathsep.join(
            map(str, (TESTS.parent / "src", TESTS, TESTS / "editors"))
        )
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, **{name: str(value) for name, value in around.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = []
    for one in started:
        out, err = one.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(one.args, one.returncode, out, err))
    return done
