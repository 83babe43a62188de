"""Several processes of the command line, as torchrun starts them: python forked_cli.py FOLDER PROCESSES.

PROCESSES: JSON, a list of {"words", "environment", "code"}; ``code`` is run in the process first. Torch is loaded once,
every process is a fork of this one. Prints the exit codes; what process R says goes to FOLDER/R.out and FOLDER/R.err.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mim_refiner.commands.pretrain
import mim_refiner.commands.refine  # noqa: F401  (loaded here, not in every process)
from mim_refiner.cli.app import main

LIMIT = 200  # seconds


def run(process: dict[str, Any], rank: int, folder: Path) -> None:
    """Become the process: its streams, environment and command."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.environ.update(process["environment"])
    exec(process["code"], {"rank": rank})
    code = main(process["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def start(processes: list[dict[str, Any]], folder: Path) -> list[int | None]:
    """Exit codes by rank; None of one that had to be killed because it stands still."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children: dict[int, int] = {}
    for rank, process in enumerate(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(processes)), "MASTER_PORT": port}
        process["environment"] = {"MASTER_ADDR": "127.0.0.1", **place, **process["environment"]}
        child = os.fork()
        if not child:
            run(process, rank, folder)
        children[child] = rank
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children) and time.monotonic() < end:
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if child:  # a stopped one counts as ended, and is killed when the others have
            codes[children[child]] = -signal.SIGSTOP if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.05)
    for child, rank in children.items():
        if codes.get(rank, -signal.SIGSTOP) == -signal.SIGSTOP:
            os.kill(child, signal.SIGKILL)
    return [codes.get(rank) for rank in range(len(processes))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(start(json.loads(sys.argv[2]), Path(sys.argv[1]))))
