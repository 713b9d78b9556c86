"""A process whose children run malmend's command line until they end or are killed.

    python killed_worker.py

A line of standard input is the arguments, as JSON; a child is forked that runs them, and its
process id printed; then its exit code, or "killed".  A fork is there at once, where a program would
spend its first seconds on imports and be killed in those.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

from malmend.cli import main

torch.set_num_threads(1)


def run(arguments: list[str]) -> int:
    """The exit code; what is printed goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 99


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("killed" if status < 0 else status, flush=True)
