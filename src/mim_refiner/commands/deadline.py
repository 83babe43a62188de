"""A comparison that ends in time, whatever other processes do: on a few images first, then on as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import TypeVar

import torch

from mim_refiner.core.run import Run
from mim_refiner.core.threads import pace_of
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.source_base import sliced
from mim_refiner.reporting import Reporter

T = TypeVar("T")
SecondsLeft = Callable[[], float]

FEW_BANK, FEW_TEST = 1000, 500  # images that are measured on whatever it costs
PLANNED = 0.8  # of the time that is left
LATER = 2.0  # times the cost of the few are left for atlas, pictures and report (LOG.md)


class OutOfTimeError(Exception):
    """What was begun would end too late."""


class Deadline:
    """Passes progress on, and at every report of it looks at the clock: stops work whose time is up, and gives the rest
    the number of threads that it is fastest with.
    """

    def __init__(self, reporter: Reporter, seconds_left: SecondsLeft, device: torch.device) -> None:
        self.reporter, self.seconds_left, self.device = reporter, seconds_left, device
        self._begin()

    def _begin(self) -> None:
        self._pace, self._since = pace_of(0.0, self.device), monotonic()

    def _stop_if_late(self) -> None:
        if self.seconds_left() < 0:
            raise OutOfTimeError

    def phase(self, name: str, total: int) -> None:
        """Begin other work, at another pace."""
        self._stop_if_late()
        self.reporter.phase(name, total)
        self._begin()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """A piece of the work is done."""
        self._stop_if_late()
        self.reporter.update(step, metrics)
        self._pace.note(monotonic() - self._since)
        self._since = monotonic()

    def message(self, text: str) -> None:
        """Tell it."""
        self.reporter.message(text)

    def done(self) -> None:
        """End the display."""
        self.reporter.done()


def until(run: Run, seconds_left: SecondsLeft) -> Run:
    """The run, with a deadline for whatever reports progress to it."""
    return replace(run, reporter=Deadline(run.reporter, seconds_left, run.device))


def thinned(images: ImageSet, limit: int) -> ImageSet:
    """Every n-th image so that at most ``limit`` remain (even over sorted class folders)."""
    step = -(-len(images) // limit)
    if step <= 1:
        return images
    return ImageSet(sliced(images.source, slice(None, None, step), f"[::{step}]"), channels=images.channels)


def most_in_time(
    measure: Callable[[ImageSet, ImageSet, Run], T],
    bank: ImageSet,
    test: ImageSet,
    run: Run,
    seconds_left: SecondsLeft,
) -> tuple[T, ImageSet, ImageSet, float]:
    """``measure`` on a few images, which tells what more will cost, then on the whole bank and as many test images as
    there is time for.

    Returns what was measured, on which bank and test images, and how many seconds the few took. Where the rest takes longer than it looked, what was
    measured on the few stands.
    """
    few = thinned(bank, FEW_BANK), thinned(test, FEW_TEST)
    run.reporter.message(f"a first look: {len(few[0])} bank and {len(few[1])} test images")
    began = monotonic()
    found = measure(*few, until(run, lambda: 0.0))
    took = monotonic() - began

    def left() -> float:
        return seconds_left() - LATER * took

    affordable = int(PLANNED * left() / took * sum(map(len, few))) - len(bank)
    if affordable <= len(few[1]):
        run.reporter.message("no time for more images: the result is that of the first look")
        return found, *few, took
    more = thinned(test, affordable)
    try:
        return measure(bank, more, until(run, left)), bank, more, took
    except OutOfTimeError:
        run.reporter.message("other processes took the time for more images: the result is that of the first look")
        return found, *few, took
