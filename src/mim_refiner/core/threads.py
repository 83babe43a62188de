"""How many threads compute: torch's found by the clock, for work that goes by it; those of other libraries by size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from time import monotonic
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")

TRIES = 3  # pieces of work for each number of threads
CLEAR = 1.5  # times slower in every try: no need for a third
SLOW, RECENT = 2.0, 3  # times slower than usual, in so many pieces running (the median): time to look again
SMALL = 1e8  # multiplications that one thread does in a few milliseconds


class Pace:
    """Watches equal pieces of work and finds with how many threads they take least time.

    The threads meet after every operation. Where another process holds a core, all wait for the one that shares it, and
    two can take longer than one. Candidates are the present number of threads, one less, and half of it; the
    choice is made anew when the work becomes slow. Other numbers of threads round differently.
    """

    def __init__(self, use: Callable[[int], None] | None = None, most: int | None = None) -> None:
        most = most or torch.get_num_threads()
        self._use = use or torch.set_num_threads
        self._candidates = list(dict.fromkeys(max(1, count) for count in (most, most - 1, most // 2)))
        self._look()

    def _look(self) -> None:
        self._taken: dict[int, list[float]] = {count: [] for count in self._candidates}
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.usual = math.inf  # seconds of a piece, once that is known
        self.looking = len(self._candidates) > 1
        self._set(self._candidates[0])

    def _set(self, threads: int) -> None:
        self.threads = threads
        self._use(threads)

    def note(self, seconds: float) -> None:
        """A piece of work took so long with the number of threads that was asked for last."""
        if self.looking:
            self._taken[self.threads].append(seconds)
            self._set(self._next())
        elif len(self._candidates) > 1:
            self._recent.append(seconds)
            if len(self._recent) == RECENT:
                now = median(self._recent)
                self.usual = min(self.usual, now)
                if now > SLOW * self.usual:
                    self._look()

    def end(self) -> None:
        """The work is over: where nothing was decided, the number of threads is what it was."""
        if self.looking:
            self._set(self._candidates[0])

    def _next(self) -> int:
        """The number of threads to try next, or the best."""
        tries = min(map(len, self._taken.values()))
        best = min(self._taken, key=lambda count: median(self._taken[count] or [0.0]))
        others = [taken for count, taken in self._taken.items() if count != best]
        if tries >= TRIES or (tries > 1 and all(min(t) > CLEAR * max(self._taken[best]) for t in others)):
            self.looking, self.usual = False, median(self._taken[best])
            return best
        return min(self._taken, key=lambda count: len(self._taken[count]))


def pace_of(limit: float | None, device: torch.device) -> Pace:
    """For work of limited time on the CPU; for all else one that leaves the threads, and so the bits, alone."""
    if limit is None or device.type != "cpu":
        return Pace(lambda threads: None, most=1)
    return Pace()


def paced(items: Iterable[T], limit: float | None, device: torch.device) -> Iterator[T]:
    """Yield the items; what is done with each is the work that a Pace watches."""
    pace = pace_of(limit, device)
    for item in items:
        started = monotonic()
        yield item
        pace.note(monotonic() - started)
    pace.end()


@contextmanager
def threads_kept() -> Iterator[None]:
    """Whatever was chosen inside, afterwards the number of threads is what it was."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads_for(multiplications: float) -> Iterator[None]:
    """NumPy, SciPy and scikit-learn compute operations of so many multiplications: small ones with one thread.

    Their threads meet after every operation: beside a busy process k-means took five times as long, on a crowded
    machine sixty, and on a quiet one 1.6 (LOG.md).
    """
    with threadpool_limits(1 if multiplications < SMALL else None):
        yield
