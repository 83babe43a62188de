"""Loader processes that die or hang: noticed where a batch is waited for, and nowhere else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from mim_refiner.errors import WorkerError

_T = TypeVar("_T")


def watched(iterator: Iterator[_T]) -> Iterator[_T]:
    """Yield the batches of a DataLoader's iterator; raises WorkerError instead of what torch does.

    torch raises out of a SIGCHLD handler, wherever the main thread is: in the middle of an optimizer's step, weights
    would be left half updated. Here its handler works only while a batch is waited for.
    """
    waiting = [False]
    died = [False]
    theirs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None

    def handler(number: int, frame: Any) -> None:
        died[0] = True
        if waiting[0] and callable(theirs):
            theirs(number, frame)

    installed = callable(theirs) and _set(handler)
    try:
        while True:
            waiting[0] = True
            if died[0] and callable(theirs):
                died[0] = False
                theirs(signal.SIGCHLD, None)
            try:
                item = next(iterator)
            except StopIteration:
                return
            waiting[0] = False
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A batch is fetched from the process that made it, which may die in the middle; an error of the process itself
        # comes with words about its DataLoader worker.
        if ("DataLoader" in str(error)) is not isinstance(error, RuntimeError):
            raise
        what = "gave no batch in time" if "timed out" in str(error) else "was killed (out of memory?)"
        raise WorkerError(f"a loader process {what}; check the storage and the memory, or set fewer workers") from None
    finally:
        waiting[0] = False
        if installed:
            _set(theirs)


def end_workers(loader: DataLoader[Any] | None) -> None:
    """Kill what is left of a loader's processes; a hanging one does not hear a friendlier word."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is None:
        return
    theirs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    quiet = theirs is not None and _set(lambda number, frame: None)  # these deaths are no news
    try:
        for worker in iterator._workers:
            worker.kill()
            worker.join()
        iterator._shutdown_workers()
    finally:
        if quiet:
            _set(theirs)


def _set(handler: Any) -> bool:
    try:
        signal.signal(signal.SIGCHLD, handler)
    except ValueError:  # not in the main thread
        return False
    return True
