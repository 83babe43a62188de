"""The demo's time: what is planned for fast and slow machines, and measured by a clock that tests turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from mim_refiner.commands import deadline, time_box
from mim_refiner.commands.deadline import ATLAS, DEARER, REPORT, Box
from mim_refiner.commands.demo import demo as demo_verb
from mim_refiner.commands.demo import plan_lines
from mim_refiner.commands.time_box import BEFORE, EVALUATION, REAL, Costs, Plan, fit
from mim_refiner.core.run import Run
from mim_refiner.core.threads import Pace
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import create_vit
from mim_refiner.report.numbers import duration
from mim_refiner.training.estimate import PhaseCost
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import demo

FAST, TWO_OLD_CORES, CRAWLING = Costs(0.05, 0.1, 0.0002), Costs(0.2, 0.4, 0.0007), Costs(8.0, 20.0, 0.01)

HALF_AS_FAST = Costs(0.6, 1.2, 0.0007)  # here time is what limits the epochs


def planned(costs: Costs, seconds: float = 240) -> Plan:
    return fit(seconds, costs, demo(), images=3000, bank=3000, test=10_000)


def training_seconds(plan: Plan, costs: Costs) -> float:
    steps = 3000 // demo().batch_size
    return REAL * steps * (plan.warmup_epochs * costs.warmup_step + plan.refinement_epochs * costs.refinement_step)


@pytest.mark.parametrize("costs", [FAST, TWO_OLD_CORES, HALF_AS_FAST])
@pytest.mark.parametrize("seconds", [120, 240, 600])
def test_what_is_planned_ends_in_time_and_uses_it(costs: Costs, seconds: float) -> None:
    plan = planned(costs, seconds)
    evaluation = EVALUATION * costs.image * (3000 + plan.test_images)
    assert training_seconds(plan, costs) + evaluation <= plan.seconds <= seconds
    assert plan.warmup_limit + plan.refinement_limit + evaluation <= seconds
    assert plan.seconds > 0.7 * seconds or plan.refinement_epochs == int(6 * max(1, seconds / 240))


def test_a_faster_machine_or_more_minutes_give_more_epochs_of_both_phases() -> None:
    slow, more, fast = planned(TWO_OLD_CORES, 120), planned(TWO_OLD_CORES, 600), planned(FAST, 600)
    assert 1 <= slow.warmup_epochs < more.warmup_epochs <= fast.warmup_epochs
    assert 1 < slow.refinement_epochs < more.refinement_epochs <= fast.refinement_epochs
    assert fast.test_images == more.test_images == 10_000


def test_a_crawling_machine_does_the_least_and_its_limits_still_hold() -> None:
    plan = planned(CRAWLING)
    assert (plan.warmup_epochs, plan.refinement_epochs, plan.test_images) == (1, 1, 500)
    assert plan.warmup_limit + plan.refinement_limit == pytest.approx(60)  # a quarter
    assert training_seconds(plan, CRAWLING) > 240  # so most steps will be left out


def test_a_view_pool_is_planned_with_and_given_up_where_it_would_eat_the_training() -> None:
    recipe = override(demo(), ["view_pool=4", "frozen_blocks=8"])
    costs = Costs(0.3, 0.8, 0.0007, pool_step=0.4)
    plan = fit(240, costs, recipe, images=3000, bank=3000, test=10_000)
    spent = REAL * plan.view_pool * 23 * costs.pool_step + training_seconds(plan, costs)
    assert plan.view_pool == 2  # a third epoch would take more than a fifth of the training
    assert "view_pool=2" in plan.settings()
    assert spent + EVALUATION * costs.image * (3000 + plan.test_images) <= plan.seconds <= 240
    assert fit(240, Costs(0.3, 0.8, 0.0007, pool_step=3), recipe, images=3000, bank=3000, test=10_000).view_pool == 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_an_image_costs_is_not_told_by_a_busy_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = Clock(), iter([0.9, 0.4, 2.5])

    def extract(*_: object, indices: range, **__: object) -> None:
        clock.now += next(seconds)

    monkeypatch.setattr(time_box, "extract_features", extract)
    monkeypatch.setattr(time_box, "monotonic", clock)
    monkeypatch.setattr(time_box, "pace_of", lambda *_: Pace(lambda threads: None, most=1))
    images = ImageSet(open_source(np.zeros((200, 1, 1, 3), np.uint8)))
    assert time_box.seconds_an_image(cast(Any, None), images, Run()) == pytest.approx(0.4 / 200)


def test_processes_that_share_images_time_them_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own clock would end after another number of passes, and wait for the others for ever."""
    done: list[int] = []
    monkeypatch.setattr(time_box, "is_distributed", lambda: True)
    monkeypatch.setattr(time_box, "extract_features", lambda *_, **__: done.append(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = ImageSet(open_source(np.zeros((8, 1, 1, 3), np.uint8)))
    time_box.seconds_an_image(cast(Any, None), images, Run())
    assert len(done) == time_box.PROBES


@pytest.mark.parametrize(("together", "threads"), [(0.3, 2), (3.7, 1)])
def test_threads_that_wait_for_another_process_are_left_out(
    monkeypatch: pytest.MonkeyPatch, together: float, threads: int
) -> None:
    used: list[int] = []
    phases = [
        PhaseCost("", math.inf, 1, 23, seconds, 0.0, alone, 69.0, 46.0) for seconds, alone in ((together, 0.5), (9, 1))
    ]
    monkeypatch.setattr(time_box, "refine_phases", lambda *_: dict(enumerate(phases)))
    monkeypatch.setattr(time_box, "seconds_an_image", lambda *_: 0.1)
    monkeypatch.setattr(time_box, "prepare", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    images = ImageSet(open_source(np.zeros((3000, 32, 32, 3), np.uint8)))
    model = create_vit("vit_w32_d9_h2_p8", image_size=32)
    costs = time_box.measure(cast(Any, model), images, demo(), Run())
    assert costs == Costs(min(together, 0.5), 1, 0.1, 46.0 / (3 * 23))
    assert used == [1] * (threads == 1)


@pytest.mark.parametrize(
    ("costs", "left", "taken"),
    [
        (Costs(0.130, 0.235, 0.00083, 0.150), 235, 182),
        (Costs(0.140, 0.260, 0.00085, 0.160), 231, 190),
        (Costs(0.130, 0.250, 0.00117, 0.155), 234, 217),  # other work beside it
        (Costs(0.187, 0.360, 0.00080, 0.279), 226, 171),  # AVX2 without bf16; costs as they were measured
    ],
)
def test_what_is_told_is_what_runs_took(costs: Costs, left: float, taken: float) -> None:
    """Runs of 2026-11-28 by their log.txt; an image's cost is the plan's, the steps share the rest of it."""
    assert planned(costs, left).seconds == pytest.approx(taken, rel=0.2)


@pytest.mark.parametrize("slower", [0.3, 1.0, 1.4, 2.0, 3.0, 4.5])
def test_every_part_of_a_run_is_in_what_is_told(monkeypatch: pytest.MonkeyPatch, slower: float) -> None:
    """By a clock that a machine turns: preparing, training, first look, comparison, atlas, report."""
    costs = Costs(slower * 0.13, slower * 0.235, slower * 0.0008)
    plan, clock, an_image = planned(costs, 235), Clock(), EVALUATION * costs.image
    box = Box(lambda: 235 - clock())
    monkeypatch.setattr(deadline, "monotonic", clock)

    def compare(bank: ImageSet, test: ImageSet, _: Run) -> None:
        clock.now += an_image * (len(bank) + len(test)) * (DEARER if len(test) == 500 else 1)

    clock.now += BEFORE * costs.image + min(training_seconds(plan, costs), plan.warmup_limit + plan.refinement_limit)
    sets = [ImageSet(open_source(np.zeros((count, 1, 1, 3), np.uint8))) for count in (3000, 10_000)]
    test = box.most(compare, *sets, Run())[2]
    clock.now += box.unit * sum(part for part in (ATLAS, REPORT) if box.left(part) > 0)
    assert plan.seconds == pytest.approx(clock.now, rel=0.2)
    assert clock.now <= 240
    assert plan.test_images == pytest.approx(len(test), rel=0.1) or slower == 3.0  # at the edge a little decides


@pytest.mark.parametrize(("image", "images"), [(0.0001, 10_000), (0.002, 5000), (0.01, 500)])
def test_test_images_are_cut_before_the_comparison_overruns(image: float, images: int) -> None:
    assert planned(Costs(0.1, 0.2, image)).test_images == pytest.approx(images, rel=0.2)


def test_the_plan_is_said_with_its_distance_from_the_full_recipe() -> None:
    plan = planned(TWO_OLD_CORES)
    recipe = override(demo(), plan.settings())
    draws = (plan.warmup_epochs + plan.refinement_epochs) * 23 * 128
    first, second = plan_lines(plan, recipe, 3000, 1_600_000)
    assert f"about {duration(plan.seconds)}" in first
    assert f"{plan.refinement_epochs} of refinement on 3,000 images (the first 8 blocks stay frozen)" in first
    assert f"{draws:,} images, {100 * draws / 1_600_000:.1f}% of the 1,600,000" in second
    assert recipe.refinement.max_seconds == pytest.approx(plan.refinement_limit, abs=0.1)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), 1e6])
def test_minutes_that_are_none_are_refused_before_anything_is_made(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(InputError, match="--minutes"):
        demo_verb(out=str(tmp_path / "out"), minutes=minutes)
    assert not (tmp_path / "out").exists()
