"""Signals that end a run in good order: Ctrl-C, a scheduler's warning, a requeue."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# SLURM sends SIGTERM at the time limit, and before it what --signal asked for (USR1 or USR2, by habit).
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2") if hasattr(signal, n)),
)


@contextmanager
def stops_cleanly(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Stop signals inside go to ``handler``; else each is what Ctrl-C is, KeyboardInterrupt, exit code 130."""
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are left to the caller
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
