"""What ends a run of several processes: an error that one of them posts, or one that gives no sign of life any more.

Every process counts up under its own key of the store that they met at, beside the training. The first trouble is
posted there once, so all end with the same line. A main thread that waits for a process that is gone cannot be woken,
so its process is ended from here; unfinished files are no danger, because they are written beside their names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from mim_refiner.core.processes import TIMEOUT_VARIABLE, Place

GRACE = 5.0  # seconds that the main thread has for ending by itself
PATIENCE = 8.0  # seconds of silence that are enough once a connection broke
ANSWER = 5.0  # seconds that the others have for reading what was posted
INTERRUPTED = 130

writing = threading.RLock()  # held while a checkpoint is written: it is finished first


@dataclass(frozen=True)
class Trouble:
    """Why all processes end: the line to print, and the exit code."""

    code: int
    text: str


class Watch:
    """The signs of life and the first trouble of the processes that share ``store``; ``names``: {rank: host, pid}."""

    def __init__(self, store: Store, place: Place, names: Mapping[int, str], timeout: float) -> None:
        self.place, self.names, self.timeout = place, names, timeout
        # connections of their own, made while all are known to be there: to make one can block every thread
        self._store, self._talks = store.clone(), store.clone()
        self.trouble: Trouble | None = None
        self.settled = threading.Event()  # the main thread is on its way out
        self._left = threading.Event()
        self._interval = min(1.0, timeout / 8)
        self._beat = 0
        # rank 0 watches all, the others rank 0: its word reaches them through the store
        watched = range(1, place.world_size) if place.rank == 0 else (0,)
        self._heard = {rank: ("0", time.monotonic()) for rank in watched}
        self._answered = time.monotonic()  # by the store
        self._readers = 0  # processes that know the trouble
        self._suspicious = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def post(self, trouble: Trouble) -> Trouble:
        """Make this the reason to end unless there is one already; returns the one that holds for all."""
        if self.trouble is None and self._answers():
            with contextlib.suppress(RuntimeError):  # the store went with its process
                answer = self._store.compare_set("trouble", "", json.dumps([trouble.code, trouble.text]))
                self.trouble = Trouble(*json.loads(answer))
        self.trouble = self.trouble or trouble
        return self.trouble

    def suspect(self) -> None:
        """An exchange failed: processes that are silent for PATIENCE seconds count as gone from now on, everywhere."""
        self._suspicious = True
        if self._answers():
            with contextlib.suppress(RuntimeError):
                self._store.set("suspect", "1")

    def wait_for_trouble(self, seconds: float) -> Trouble | None:
        """The reason to end, once it is known. Stop signals change nothing: torchrun sends them when a process died."""
        end = time.monotonic() + seconds
        while self.trouble is None and time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.05)
        return self.trouble

    def leave(self) -> None:
        """Stop watching. The others may go on; whoever holds the store stays until they have left or are gone."""
        end = time.monotonic() + ANSWER if self.trouble else math.inf  # time to read it
        while time.monotonic() < end and self._needed():
            time.sleep(0.05)
        self._left.set()
        for thread in self._threads:
            thread.join(2 * self._interval + 1)
        if any(thread.is_alive() for thread in self._threads):  # it waits for a store that is stopped
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.trouble.code if self.trouble else 0)

    def _needed(self) -> bool:
        if self.trouble:
            return self._answers() and self._readers < self.place.world_size
        return self.place.rank == 0 and any(value != "left" for value, _ in self._heard.values())

    def _answers(self) -> bool:
        """Whether the store does: a question to one that is stopped would not come back."""
        return time.monotonic() - self._answered < min(self.timeout, ANSWER)

    # --- the two threads

    def _talk(self) -> None:
        """Give signs of life and take those of the others. Waits for ever when the store's process is stopped."""
        store = self._talks
        told = 0
        try:
            while True:
                left = self._left.is_set()
                self._beat += 1
                store.set(life(self.place.rank), "left" if left else str(self._beat))
                if left:
                    return
                if self.trouble is None and store.check(["trouble"]):
                    self.trouble = Trouble(*json.loads(store.get("trouble")))
                if self.trouble:
                    self._readers, told = store.add("readers", 1 - told), 1
                self._suspicious = self._suspicious or store.check(["suspect"])
                ranks = list(self._heard)
                now = time.monotonic()
                for rank, value in zip(ranks, store.multi_get([life(rank) for rank in ranks]), strict=True):
                    if value.decode() != self._heard[rank][0]:
                        self._heard[rank] = (value.decode(), now)
                self._answered = now
                self._left.wait(self._interval)
        except RuntimeError:  # the process that holds the store ended
            self._answered = -math.inf

    def _judge(self) -> None:
        """End this process when there is a reason and the main thread does not end by itself."""
        while not self._left.wait(self._interval / 2):
            lost = self._lost()
            if self.trouble is None and lost is not None:
                self.post(Trouble(2, self._gone(lost)))
            if self.trouble is not None:
                if not self.settled.wait(GRACE):
                    with writing:
                        interrupted = self.trouble.code == INTERRUPTED
                        line = "interrupted" if interrupted else f"error: {self.trouble.text}"
                        cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # a live display may have hidden it
                        print(f"{cursor}{line}", file=sys.stderr, flush=True)
                        os._exit(self.trouble.code)
                return

    def _lost(self) -> int | None:
        patience = min(self.timeout, PATIENCE) if self._suspicious else self.timeout
        now = time.monotonic()
        if now - self._answered > patience and self._heard.get(0, ("", 0.0))[0] != "left":
            return 0
        silent = (rank for rank, (value, since) in self._heard.items() if value != "left" and now - since > patience)
        return next(silent, None)

    def _gone(self, rank: int) -> str:
        return (
            f"process {rank} of {self.place.world_size} ({self.names.get(rank, 'unknown')}) is gone or gives no sign "
            "of life: killed, stopped or cut off; start the same command again, a training run (without --overwrite) "
            f"resumes from its last checkpoint ({TIMEOUT_VARIABLE}={self.timeout:g} sets how many seconds are waited)"
        )


def life(rank: int) -> str:
    """The key of a process's signs of life; there before the processes are welcomed."""
    return f"life/{rank}"
