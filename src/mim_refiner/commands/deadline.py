"""A comparison that ends in time, whatever other processes do: on a few images first, then on as many as fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import TypeVar

import torch

from mim_refiner.commands.survey import thinned
from mim_refiner.core.run import Run
from mim_refiner.core.threads import pace_of
from mim_refiner.data.decode import ImageSet
from mim_refiner.reporting import Reporter, Tee

T = TypeVar("T")

FEW_BANK, FEW_TEST = 1000, 500  # images of the first look, which is taken whatever it costs
PLANNED = 0.9  # of the time that is left
# Measured by the CPU's seconds (LOG.md): an image of the first look costs so many times one of the whole comparison,
DEARER = 1.5
# and what comes after so many times the first look: the report with its pictures, and the atlas before it.
REPORT, ATLAS = 0.7, 1.0


class OutOfTimeError(Exception):
    """What was begun would end too late."""


class Deadline(Tee):
    """Passes progress on, and at every report of it looks at the clock: stops work whose time is up, and gives the rest
    the number of threads that it is fastest with.
    """

    def __init__(self, reporter: Reporter, seconds_left: Callable[[], float], device: torch.device) -> None:
        super().__init__([reporter])
        self.seconds_left, self.device = seconds_left, device
        self._pace, self._since = pace_of(0.0, device), monotonic()

    def _stop_if_late(self) -> None:
        if self.seconds_left() < 0:
            raise OutOfTimeError

    def phase(self, name: str, total: int) -> None:
        """Begin other work, at another pace."""
        self._stop_if_late()
        super().phase(name, total)
        self._pace.end()
        self._pace, self._since = pace_of(0.0, self.device), monotonic()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """A piece of the work is done."""
        self._stop_if_late()
        super().progress(step, values)
        self._pace.note(monotonic() - self._since)
        self._since = monotonic()


def affordable_images(seconds: float, first_look: float, images: int = FEW_BANK + FEW_TEST) -> int:
    """Bank and test images that can be measured in so many seconds, with the atlas and the report after them, where the
    first look at so many ``images`` took ``first_look`` seconds.
    """
    return int(PLANNED * (seconds - (REPORT + ATLAS) * first_look) * DEARER * images / first_look)


@dataclass
class Box:
    """The time that is left, and the ``unit`` that costs are known in: the seconds of a first look at a few images."""

    seconds_left: Callable[[], float]
    unit: float = 0.0

    def left(self, reserve: float) -> float:
        """Seconds, without a reserve of so many units."""
        return self.seconds_left() - reserve * self.unit

    def until(self, run: Run, reserve: float) -> Run:
        """The run for work that raises OutOfTimeError when no more than a reserve is left."""
        return replace(run, reporter=Deadline(run.reporter, lambda: self.left(reserve), run.device))

    def most(
        self, measure: Callable[[ImageSet, ImageSet, Run], T], bank: ImageSet, test: ImageSet, run: Run
    ) -> tuple[T, ImageSet, ImageSet]:
        """``measure`` a few images, which tells what more will cost, then the whole bank and as many test images as
        there is time for. Returns what was measured and on which images.

        Where the rest takes longer than it looked, it takes the atlas's time too; then what was measured on the few
        stands.
        """
        few = thinned(bank, FEW_BANK), thinned(test, FEW_TEST)
        began = monotonic()
        found = measure(*few, replace(run, reporter=Deadline(run.reporter, lambda: math.inf, run.device)))
        self.unit = monotonic() - began
        if few == (bank, test):
            return found, *few
        affordable = affordable_images(self.seconds_left(), self.unit, sum(map(len, few))) - len(bank)
        if affordable > len(few[1]):
            more = thinned(test, affordable)
            try:
                found = measure(bank, more, self.until(run, REPORT))
                run.reporter.message(f"compared on {len(bank):,} bank and {len(more):,} test images")
                return found, bank, more
            except OutOfTimeError:
                pass
        run.reporter.message(f"no time for more: the comparison is on {len(few[0])} bank and {len(few[1])} test images")
        return found, *few
