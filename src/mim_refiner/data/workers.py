"""Loader processes: how many, and those that die or hang, noticed where a batch is waited for; and a loader thread."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from mim_refiner.errors import WorkerError

_T = TypeVar("_T")


MOST_WORKERS, MOST_THREADS = 12, 32
_AT_ONCE = 1024  # images given to threads
WORKER_BYTES = 20 * 10**6  # of a loader process that it does not share with the others (measured: 16 MB)


def own_cores() -> int:
    """Cores for this process: those it may run on, divided by the processes of its node (torchrun tells)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def worker_count(asked: int, *, cached: bool) -> int:
    """Loader processes: ``asked``, or for -1 one a core but one; a thread (0) for decoded images on few cores."""
    if asked >= 0:
        return asked
    cores = own_cores()
    return 0 if cached and cores <= 2 else max(1, min(MOST_WORKERS, cores - 1))


def decoding_threads() -> int:
    """Threads that decode images for evaluation."""
    return max(2, min(MOST_THREADS, own_cores()))


def in_threads(work: Callable[[int], _T], count: int, threads: int) -> Iterator[_T]:
    """``work`` of 0, 1, ..., count - 1 in order; of 0 alone first, which opens the source that the threads share."""
    yield from map(work, range(min(1, count)))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(1, count, _AT_ONCE):
            yield from pool.map(work, range(start, min(start + _AT_ONCE, count)))


def watched(loader: Iterable[_T]) -> Generator[_T, None, None]:
    """Begin an epoch of a DataLoader and yield its batches; raises WorkerError instead of what torch does.

    torch raises out of a SIGCHLD handler, wherever the main thread is: in the middle of an optimizer's step, weights
    would be left half updated. Here its handler works only while a batch is waited for.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of fork with threads about; the workers use neither our threads nor CUDA.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        iterator = iter(loader)
    waiting = died = False
    theirs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None

    def handler(number: int, frame: Any) -> None:
        nonlocal died
        died = True
        if waiting and callable(theirs):
            theirs(number, frame)

    installed = callable(theirs) and _set(handler)
    try:
        while True:
            waiting = True
            if died and callable(theirs):
                died = False
                theirs(signal.SIGCHLD, None)
            try:
                item = next(iterator)
            except StopIteration:
                return
            waiting = False
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A batch is fetched from the process that made it, which may die in the middle; an error of the process itself
        # comes with words about its DataLoader worker.
        if ("DataLoader" in str(error)) is not isinstance(error, RuntimeError):
            raise
        waiting = False  # the others are ended too, and what is told of all of them comes before torch listens again
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()
            worker.join()
        what = "gave no batch in time" if "timed out" in str(error) else "was killed (out of memory?)"
        raise WorkerError(f"a loader process {what}; check the storage and the memory, or set fewer workers") from None
    finally:
        waiting = False
        if installed:
            _set(theirs)


def end_workers(loader: DataLoader[Any] | None) -> None:
    """Kill what is left of a loader's processes; a hanging one does not hear a friendlier word."""
    if (iterator := getattr(loader, "_iterator", None)) is None:
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


def in_background(items: Generator[_T, None, None], ahead: int) -> Generator[_T, None, None]:
    """Yield ``items``, computed in a thread up to ``ahead`` items early; closing the generator ends the thread."""
    end = object()
    with contextlib.closing(items), ThreadPoolExecutor(1, "mim-refiner-loader") as pool:
        ready = deque(pool.submit(next, items, end) for _ in range(max(1, ahead)))
        try:
            while (item := ready.popleft().result()) is not end:
                ready.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)
