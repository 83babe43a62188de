"""Signals that end a run in good order: Ctrl-C, a scheduler's warning, a requeue."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

# SLURM sends SIGTERM at the time limit, and before it what --signal asked for (USR1 or USR2, by habit).
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *(getattr(signal, n) for n in ("SIGUSR1", "SIGUSR2") if hasattr(signal, n)),
)
P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Stop signals set a flag, read between steps, instead of tearing a step apart."""
    seen: list[int] = []
    with _handled(lambda received, frame: seen.append(received)):
        yield lambda: bool(seen)


def stops_cleanly(verb: Callable[P, T]) -> Callable[P, T]:
    """Outside the training loop every stop signal is what Ctrl-C is: KeyboardInterrupt, exit code 130."""

    def interrupt(received: int, frame: Any) -> None:
        raise KeyboardInterrupt

    @functools.wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with _handled(interrupt):
            return verb(*args, **kwargs)

    return wrapped


@contextmanager
def _handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are left to the caller
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
