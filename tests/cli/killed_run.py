"""python killed_run.py KILLS SEED RUN ARGUMENTS...: run the command, SIGKILL it at random moments, then let it finish.

Each attempt is a fork of a process that has everything imported, so that an attempt costs its own work only.
Prints how many kills hit a living command.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import mim_refiner.commands.refine  # noqa: F401  (before the forks)
from mim_refiner.cli.app import main


def logged_steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def attempt(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    return child


def killed(child: int, run: Path, draw: random.Random) -> bool:
    """Kill the child after some steps of its own and a random while; False if it was over before."""
    more, pause = draw.randint(0, 4), draw.random()
    before = logged_steps(run)
    while more and logged_steps(run) < before + more:
        before = min(before, logged_steps(run))  # lines of steps that will be run again are dropped
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(pause * (0.03 if more else 1.0))
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def run_and_kill(kills: int, seed: int, run: Path, arguments: list[str]) -> int:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        hits += killed(attempt(arguments), run, draw)
    print(f"kills that hit: {hits}", file=sys.stderr, flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(attempt(arguments), 0)[1])


if __name__ == "__main__":
    sys.exit(run_and_kill(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
