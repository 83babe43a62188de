"""How much of the demo fits into a few minutes on this machine: measured by real steps, before anything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, repeat
from time import monotonic

import torch
from torch.optim import Optimizer

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.deadline import ATLAS, FEW_BANK, FEW_TEST, PLANNED, REPORT, affordable_images
from mim_refiner.commands.inputs import train_loader
from mim_refiner.commands.refine import prepare
from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0
from mim_refiner.core.run import Run
from mim_refiner.core.threads import pace_of
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.evaluation.features import extract_features
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import (
    Refinement,
    begin_refinement,
    begin_warmup,
    build,
    forward_backward,
    frozen_views,
    make_views,
    resolve,
    view_specs,
)

Clock = Callable[[], float]
PROBE_STEPS, PROBE_SECONDS, PROBE_IMAGES = 5, 2.0, 256  # each kind of step is timed so often or so long
SLOW_SECONDS = 3.0  # a step that takes longer is timed once more only: another process may have held the machine
USED = 0.92  # of the time is planned with
# Measured on whole runs, whose log.txt tells when each part began (LOG.md): opening the data and tracing a step cost so
# many features of an image, comparing three encoders so many of each image, real steps so many times the least one.
BEFORE, EVALUATION, REAL = 12_000, 7.0, 1.2
GUARD_IMAGES = 3000  # that the guard looks at during the refinement
MOST_FOR_EVALUATION, LEAST_FOR_TRAINING = 0.3, 0.25  # of the time
MOST_FOR_POOL = 0.2  # of the training's time
USUAL_SECONDS = 240  # the recipe's epochs are for so long; more time gives more


@dataclass(frozen=True)
class Costs:
    """Seconds that this machine takes for a step of each phase, for the features of one image, and for a batch of the
    view pool."""

    warmup_step: float
    refinement_step: float
    image: float
    pool_step: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What fits; the phases end by their limits (seconds) whatever happens."""

    warmup_epochs: int
    refinement_epochs: int
    warmup_limit: float  # with the view pool
    refinement_limit: float
    view_pool: int  # epochs
    test_images: int
    seconds: float  # expected, of all from here on

    def settings(self) -> list[str]:
        """The plan as settings of a recipe."""
        return [
            f"view_pool={self.view_pool}",
            f"warmup.epochs={self.warmup_epochs}",
            f"warmup.max_seconds={self.warmup_limit:.1f}",
            f"refinement.epochs={self.refinement_epochs}",
            f"refinement.max_seconds={self.refinement_limit:.1f}",
        ]


def fit(left: float, costs: Costs, recipe: RefineRecipe, *, images: int, bank: int, test: int) -> Plan:
    """Fit both phases, in the recipe's proportion, and the comparison into ``left`` seconds.

    First come the test images, as long as they leave the training enough; then epochs over ``images``. Training that
    ends early leaves time for more test images, and what is expected counts those too.
    """
    usable, steps, an_image = USED * left, REAL * (images // recipe.batch_size), EVALUATION * costs.image
    before, first_look, everything = BEFORE * costs.image, (FEW_BANK + FEW_TEST) * an_image, (bank + test) * an_image
    around = before + (1 + ATLAS + REPORT) * first_look + min(everything / PLANNED, MOST_FOR_EVALUATION * usable)
    looks = GUARD_IMAGES * costs.image
    training = max(usable - around, LEAST_FOR_TRAINING * left)
    pool_epoch = steps * costs.pool_step
    pool = min(recipe.view_pool, int(MOST_FOR_POOL * training / pool_epoch)) if pool_epoch else 0
    pooling = pool * pool_epoch
    share = recipe.warmup.epochs / recipe.refinement.epochs
    most = recipe.refinement.epochs * max(1.0, left / USUAL_SECONDS)  # beyond it no gain was seen (LOG.md)
    epochs = min((training - pooling - looks) / (steps * (costs.refinement_step + share * costs.warmup_step)), most)
    refinement, warmup = max(1, int(epochs)), max(1, int(share * epochs))
    planned = [pooling + warmup * steps * costs.warmup_step, refinement * steps * costs.refinement_step + looks]
    limits = [training * seconds / sum(planned) for seconds in planned]
    expected = before + sum(map(min, planned, limits)) + first_look
    affordable, tested = affordable_images(left - expected, an_image) - bank, FEW_TEST
    if affordable > FEW_TEST:
        tested = test // math.ceil(test / affordable)
        expected += (bank + tested) * an_image
    expected += max(0.0, min((ATLAS + REPORT / 2) * first_look, left - expected))  # given up where no time is left
    return Plan(warmup, refinement, limits[0], limits[1], pool, tested, expected)


def measure(model: str, images: ImageSet, recipe: RefineRecipe, run: Run, clock: Clock = monotonic) -> Costs:
    """Take a few steps of the very run that is to come, with a rate of zero, on an encoder that is thrown away."""
    backbone = load_backbone(model)
    recipe = resolve(recipe, backbone)
    refiner = prepare(backbone, recipe, run)
    generator = torch.Generator().manual_seed(0)
    with closing(train_loader(images, view_specs(recipe), recipe, run)) as loader, closing(_endless(loader)) as fresh:
        refinement = build(recipe, refiner, loader, run)
        kept: list[ViewBatch] = []  # the newest of the pool

        def fill() -> None:
            features, ids = frozen_views(refinement, next(fresh), generator)
            kept[:] = [ViewBatch([feature.half().float() for feature in features], ids, None)]

        def seconds_a_step(begin: Callable[[Refinement], Optimizer], batches: Iterator[ViewBatch]) -> float:
            optimizer = begin(refinement)
            for group in optimizer.param_groups:
                group["lr"] = 0.0

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                views, ids = make_views(next(batches), refinement.photometrics, generator, run)
                forward_backward(refiner, views, ids, generator, run)
                optimizer.step()

            return seconds_of(step, run, clock)

        pool_step = seconds_of(fill, run, clock, choose_threads=True) * bool(recipe.view_pool)
        pooled = repeat(kept[0]) if recipe.view_pool else fresh
        warmup = seconds_a_step(begin_warmup, pooled)
        step = seconds_a_step(begin_refinement, pooled if recipe.frozen_blocks else fresh)
    image = seconds_an_image(load_backbone(model), images, run, clock)
    costs: Costs = from_rank_0(Costs(warmup, step, image, pool_step))
    return costs


def _endless(loader: TrainLoader) -> Generator[ViewBatch, None, None]:
    for epoch in count():
        yield from loader.epoch(epoch)


def seconds_of(
    work: Callable[[], object], run: Run, clock: Clock = monotonic, *, choose_threads: bool = False
) -> float:
    """Least time of some work, after one time that is not counted unless it was slow.

    The least, since other processes only make it longer, and a phase that turns out slower leaves steps out.
    ``choose_threads``: from then on as many are used as the work takes least time with.
    """

    def once() -> float:
        started = clock()
        work()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    first = once()
    pace = pace_of(0.0 if choose_threads else None, run.device)
    while pace.looking:
        pace.note(once())
        first = pace.usual
    if decide_on_rank_0(lambda: first > SLOW_SECONDS):
        return min(first, once())
    started, taken = clock(), [once()]
    while len(taken) < PROBE_STEPS and decide_on_rank_0(lambda: clock() - started < PROBE_SECONDS):
        taken.append(once())
    return min(taken)


def seconds_an_image(backbone: Backbone, images: ImageSet, run: Run, clock: Clock = monotonic) -> float:
    """Least time for the features of one image at every block, in float32 as the comparison computes them."""
    rows, run = range(min(PROBE_IMAGES, len(images))), replace(run, precision="fp32")
    return seconds_of(lambda: extract_features(backbone, images, run=run, indices=rows), run, clock) / len(rows)
