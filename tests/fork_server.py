"""One process that has everything imported, of which tests fork theirs: a fresh interpreter costs five seconds.

Reads requests from stdin, a JSON object a line: {"folder", "processes": [{"code", "environment"}]}. Of every process
``code`` is run in the environment given, with ``rank``; what process R says goes to FOLDER/R.out and FOLDER/R.err.
Answers with a line of their ids, and one of their exit codes when all have ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.backends.backend_agg  # noqa: F401  (all of these are loaded here, not in every process)
import sklearn.cluster  # noqa: F401
import torch
import torch.distributed.checkpoint

import mim_refiner.cli.app
import mim_refiner.commands.doctor
import mim_refiner.commands.embed
import mim_refiner.commands.evaluate
import mim_refiner.commands.pretrain
import mim_refiner.commands.refine  # noqa: F401

LIMIT = 280  # seconds


def become(process: dict[str, Any], rank: int, folder: Path) -> NoReturn:
    """The process: its streams, environment, code and end."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    torch.set_num_threads(1)  # makes the fork's thread pool anew before two threads of autograd would at once
    os.environ.clear()
    os.environ.update(process["environment"])
    code: object = 1
    try:
        exec(process["code"], {"rank": rank, "__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def start(processes: list[dict[str, Any]], folder: Path) -> list[int]:
    """Their ids; several get the places that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        together = {
            "WORLD_SIZE": str(len(processes)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
        }
    children = []
    for rank, process in enumerate(processes):
        if len(processes) > 1:
            process["environment"] = {"RANK": str(rank), "LOCAL_RANK": str(rank), **together, **process["environment"]}
        child = os.fork()
        if not child:
            become(process, rank, folder)
        children.append(child)
    return children


def ended(children: list[int]) -> list[int | None]:
    """Exit codes by rank; None of one that had to be killed because it stands still."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(children) and time.monotonic() < end:
        child, status = os.waitpid(-1, os.WNOHANG | (os.WUNTRACED if len(children) > 1 else 0))
        if child:  # of several a stopped one counts as ended, and is killed when the others have
            codes[child] = -signal.SIGSTOP if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    for child in children:
        if codes.get(child, -signal.SIGSTOP) == -signal.SIGSTOP:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [codes.get(child) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        ids = start(request["processes"], Path(request["folder"]))
        print(json.dumps(ids), flush=True)
        print(json.dumps(ended(ids)), flush=True)
