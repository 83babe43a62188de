"""The end of the time: what is measured until then on quiet, slow and suddenly busy machines, by a turned clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mim_refiner.commands import deadline
from mim_refiner.commands.deadline import ATLAS, DEARER, REPORT, Box
from mim_refiner.core import threads
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source

Machine = Callable[[float], float]  # how many times slower than usual, by the time


def images(count: int) -> ImageSet:
    return ImageSet(open_source(np.zeros((count, 2, 2, 3), np.uint8)))


class Comparison:
    """Takes 4 ms an image of each of three encoders, more in the first look, in batches of 100 that report; the box
    holds 100 seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slower: Machine) -> None:
        self.now, self.slower = 0.0, slower
        self.calls: list[tuple[int, int]] = []
        monkeypatch.setattr(deadline, "monotonic", lambda: self.now)
        self.box = Box(lambda: 100 - self.now)

    def measure(self, bank: ImageSet, test: ImageSet, run: Run) -> str:
        self.calls.append((len(bank), len(test)))
        for stage in ("before", "after", "full"):
            run.reporter.phase(stage, len(bank) + len(test))
            for done in range(100, len(bank) + len(test) + 1, 100):
                self.now += 0.4 * self.slower(self.now) * (DEARER if len(self.calls) == 1 else 1)
                run.reporter.progress(done, {})
        return f"of {len(bank)} and {len(test)}"

    def run(self, bank: int = 3000, test: int = 10_000) -> str:
        found, *sets = self.box.most(self.measure, images(bank), images(test), Run())
        assert found == "of {} and {}".format(*map(len, sets))
        return found


def test_a_quiet_machine_measures_all_and_leaves_time_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Comparison(monkeypatch, lambda now: 0.25)
    assert quick.run() == "of 3000 and 10000"
    assert quick.box.unit == pytest.approx(DEARER * 0.25 * 3 * 1.5 * 4)
    assert quick.box.left(REPORT + ATLAS) > 0


def test_a_slower_machine_measures_fewer_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Comparison(monkeypatch, lambda now: 0.5)
    slow.run()
    assert slow.calls[0] == (1000, 500)
    bank, test = slow.calls[1]
    assert bank == 3000
    assert 5000 < test < 8000
    assert 0 < slow.box.left(REPORT + ATLAS) < 10  # little is left over


@pytest.mark.parametrize("begins", [10.0, 20.0, 40.0])
def test_a_load_that_begins_half_way_leaves_the_first_look(monkeypatch: pytest.MonkeyPatch, begins: float) -> None:
    loaded = Comparison(monkeypatch, lambda now: 10.0 if now > begins else 0.3)
    assert loaded.run() == "of 1000 and 500"
    assert loaded.calls[0] == (1000, 500)
    assert loaded.box.left(REPORT) > -10 * 0.4  # one batch late, at the slower speed


def test_a_crawling_machine_takes_the_first_look_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    crawling = Comparison(monkeypatch, lambda now: 4.0)
    assert crawling.run() == "of 1000 and 500"
    assert crawling.calls == [(1000, 500)]


def test_few_images_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Comparison(monkeypatch, lambda now: 1.0)
    assert small.run(512, 256) == "of 512 and 256"
    assert len(small.calls) == 1


def test_work_under_a_deadline_gets_the_threads_that_it_is_fastest_with(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    loaded = Comparison(monkeypatch, lambda _: 0.1 if now[0] == 1 else 1.0)
    with threads.threads_kept():
        assert loaded.run() == "of 3000 and 10000"
        assert now == [1]
    assert now == [2]
