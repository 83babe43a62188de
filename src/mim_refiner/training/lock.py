"""One run writes into a folder at a time: a lock that names process, host and start, and ends with the process."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import weakref
from pathlib import Path
from typing import IO

from mim_refiner.errors import RunFolderError

LOCK = ".lock"


def hold(folder: Path, holder: object) -> None:
    """Lock ``folder`` until ``holder`` is gone or the process ends, however it ends; RunFolderError if another has it.
    What a killed process left is taken over: the system has let go of it. Where the file system knows no locks is none.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    path = folder / LOCK
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: loader processes do not inherit it
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holds = file.read(500)
        file.close()
        with contextlib.suppress(Exception):
            facts = json.loads(holds)
            holds = f"process {facts['process']} on {facts['host']}, since {facts['since']}"
        raise RunFolderError(
            f"{folder}: a run is writing here ({' '.join(holds.split()) or 'not named'}); wait for it, or choose "
            "another --out"
        ) from None
    except OSError:
        file.close()
        return
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(json.dumps({"process": os.getpid(), "host": platform.node(), "since": since}) + "\n")
    file.flush()
    weakref.finalize(holder, _release, file, path, os.getpid())


def _release(file: IO[str], path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked process has a copy of the holder, not the lock
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
