"""The processes of test_launch.py: python launch_worker.py CASES; prints {case: [[exit code, stdout, stderr], ...]}.

Torch is loaded once; every process is a fork of this one, with torchrun's environment.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from mim_refiner.core import launch
from mim_refiner.core.collectives import agree, decide_on_rank_0, end_together
from mim_refiner.core.watch import writing
from mim_refiner.errors import DataError, MimRefinerError

AT_A_TIME = 8  # processes


class Told:
    """A reporter that prints."""

    def message(self, text: str) -> None:
        print(text, flush=True)


@launch.together()
def work(what: str, rank: int) -> None:
    """Join, then meet with what the case is about while the others wait in an exchange."""
    if what == "version" and rank == 1:
        launch.__version__ = "9.9"
    launch.join_processes(torch.device("cpu"), Told())  # type: ignore[arg-type]
    agree(1.0)
    if what == "recipe":
        launch.refuse_difference(lambda: {"batch_size": 8, "epochs": 1 + rank})
    if what == "refusal":
        decide_on_rank_0(lambda: refuse("the disk of process 0 is full; free space"))
    if what == "error" and rank == 1:
        refuse("the pictures of process 1 are gone; mount the disk")
    if what == "agreed error":
        end_together(False, DataError(f"no picture {rank}; mount the disk") if rank == 1 else None)
    if what == "stop":
        end_together(False)
        print("nobody stops", flush=True)
        try:
            end_together(rank == 1)
        except KeyboardInterrupt:
            print("all stop", flush=True)
        return
    if what == "bug" and rank == 0:
        raise ValueError("out of cheese")
    if what in ("interrupt 0", "interrupt 1") and rank == int(what[-1]):
        raise KeyboardInterrupt
    if what in ("kill 0", "kill 1"):
        if rank == int(what[-1]):
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as commands do; torchrun then sends it to the rest
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if what in ("stop 0", "stop 1") and rank == int(what[-1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill while writing" and rank == 1:
        time.sleep(0.5)  # process 0 is at it
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill while writing":
        with writing:
            time.sleep(10)  # longer than silence and grace together
            print("written", flush=True)
    if what in ("leave 0", "leave 1"):
        time.sleep(2 * (rank != int(what[-1])))
        return
    agree(2.0)


def refuse(text: str) -> None:
    """Raise the error."""
    raise DataError(text)


def start(case: dict[str, Any], rank: int, port: int, out: Path, err: Path) -> int:
    """Fork a process of the case; returns its id."""
    child = os.fork()
    if child:
        return child
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), descriptor)
    place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **case["environment"]}
    place["RANK"] = place.pop(f"RANK_OF_{rank}", rank)
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 0
    try:
        work(case["what"], rank)
    except MimRefinerError as error:
        print("error:", error, file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        print("bug:", error, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(cases: list[dict[str, Any]]) -> dict[str, list[tuple[int, str, str]]]:
    """Start the processes of all cases, a few cases at a time, and wait for them."""
    running: dict[int, tuple[str, int]] = {}  # process id: case and rank
    files: dict[tuple[str, int], tuple[Path, Path]] = {}
    codes: dict[tuple[str, int], int] = {}
    folder = Path(tempfile.mkdtemp())
    end = time.monotonic() + 150
    for number, case in enumerate(cases):
        wait_until(AT_A_TIME, running, codes, end)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in case["ranks"]:
            key = (case["name"], rank)
            files[key] = (folder / f"{number}-{rank}.out", folder / f"{number}-{rank}.err")
            running[start(case, rank, port, *files[key])] = key
    wait_until(0, running, codes, end)
    said = {key: [file.read_text() if file.exists() else "" for file in pair] for key, pair in files.items()}
    return {
        case["name"]: [(codes[case["name"], rank], *said[case["name"], rank]) for rank in case["ranks"]]
        for case in cases
    }


def wait_until(most: int, running: dict[int, tuple[str, int]], codes: dict[tuple[str, int], int], end: float) -> None:
    """Wait until at most that many processes run; a stopped one is killed when the others of its case have ended."""
    while len(running) > most:
        for child, key in list(running.items()):
            alone = [other for other in running.values() if other[0] == key[0]] == [key]
            if (alone and key[0] == f"stop {key[1]}") or time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]))))
