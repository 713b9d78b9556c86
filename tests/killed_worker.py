"""A process whose children run malmend's command line until they end or are killed.

    python killed_worker.py FOLDER LOG

A line of standard input is JSON: the arguments, and when the child that is forked for them is
killed: before which step in FOLDER; "writing", when half of the first file of tensors in FOLDER/out
is written; or null.  Its exit code is printed, or "killed"; what it said is in LOG, and as its last
line how many steps it took.  A fork is there at once, where a program would spend its first seconds
on imports.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

from killing import kill_at, kill_in_writing
from malmend.cli import main

torch.set_num_threads(1)


def run(arguments: list[str], at: int | str | None, folder: str, log: str) -> int:
    """The exit code."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    steps = kill_at(None if at == "writing" else at, folder)
    if at == "writing":
        kill_in_writing(os.path.join(folder, "out"))
    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        print(f"\n{steps()}", flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(*json.loads(line), *sys.argv[1:]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("killed" if status < 0 else status, flush=True)
