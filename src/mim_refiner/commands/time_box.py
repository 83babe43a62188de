"""How much of the demo fits into a few minutes on this machine: measured by real steps, before anything else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from time import monotonic

import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.inputs import train_loader
from mim_refiner.commands.refine import prepare
from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import (
    REFINEMENT,
    WARMUP,
    Refinement,
    begin_refinement,
    begin_warmup,
    build,
    forward_backward,
    make_views,
    resolve,
    view_specs,
)

Clock = Callable[[], float]
PROBE_STEPS, PROBE_SECONDS, PROBE_IMAGES = 3, 1.0, 256  # each kind of step is timed so often or so long
USED = 0.92  # of the time is planned with
EVALUATION = 6.0  # comparing three encoders, and the report, cost so many passes over bank and test images (LOG.md)
GUARD_IMAGES = 3000  # that the guard looks at during the refinement
MOST_FOR_EVALUATION, LEAST_FOR_TRAINING = 0.4, 0.25  # of the time
LEAST_TEST_IMAGES, MOST_EPOCHS = 2000, 100


@dataclass(frozen=True)
class Costs:
    """Seconds that this machine takes for a step of each phase, and for the features of one image."""

    warmup_step: float
    refinement_step: float
    image: float


@dataclass(frozen=True)
class Plan:
    """What fits; the phases end by their limits (seconds) whatever happens."""

    warmup_epochs: int
    refinement_epochs: int
    warmup_limit: float
    refinement_limit: float
    test_images: int
    seconds: float  # expected, of all from here on

    def settings(self) -> list[str]:
        """The plan as settings of a recipe."""
        phases = {
            "warmup": (self.warmup_epochs, self.warmup_limit),
            "refinement": (self.refinement_epochs, self.refinement_limit),
        }
        return [
            line
            for name, (epochs, limit) in phases.items()
            for line in (f"{name}.epochs={epochs}", f"{name}.max_seconds={limit:.1f}")
        ]


def fit(left: float, costs: Costs, recipe: RefineRecipe, *, images: int, bank: int, test: int) -> Plan:
    """Fit both phases, in the recipe's proportion, and the comparison into ``left`` seconds.

    First come the test images, as long as they leave the training enough; then epochs over ``images``.
    """
    usable = USED * left
    tested = affordable_test_images(MOST_FOR_EVALUATION * usable, costs.image, bank=bank, test=test)
    evaluation = _evaluation(tested, costs.image, bank)
    looks = GUARD_IMAGES * costs.image
    training = max(usable - evaluation, LEAST_FOR_TRAINING * left)
    steps = images // recipe.batch_size
    share = recipe.warmup.epochs / recipe.refinement.epochs
    epochs = min((training - looks) / (steps * (costs.refinement_step + share * costs.warmup_step)), MOST_EPOCHS)
    refinement, warmup = max(1, int(epochs)), max(1, int(share * epochs))
    planned = [warmup * steps * costs.warmup_step, refinement * steps * costs.refinement_step + looks]
    limits = [training * seconds / sum(planned) for seconds in planned]
    expected = sum(map(min, planned, limits)) + evaluation
    return Plan(warmup, refinement, limits[0], limits[1], tested, expected)


def affordable_test_images(seconds: float, image_cost: float, *, bank: int, test: int) -> int:
    """Test images on which three encoders can be compared in that time, between 2,000 and all."""
    affordable = int(seconds / (EVALUATION * image_cost)) - bank
    return min(test, max(LEAST_TEST_IMAGES, affordable))


def _evaluation(test: int, image_cost: float, bank: int) -> float:
    return EVALUATION * image_cost * (bank + test)


def measure(model: str, images: ImageSet, recipe: RefineRecipe, run: Run, clock: Clock = monotonic) -> Costs:
    """Take a few steps of the very run that is to come, with a rate of zero, on an encoder that is thrown away."""
    backbone = load_backbone(model)
    recipe = resolve(recipe, backbone)
    refiner = prepare(backbone, recipe, run)
    with closing(train_loader(images, view_specs(recipe), recipe, run)) as loader:
        refinement = build(recipe, refiner, loader, run)
        warmup, step = (seconds_a_step(refinement, number, clock) for number in (WARMUP, REFINEMENT))
    costs: Costs = from_rank_0(Costs(warmup, step, seconds_an_image(load_backbone(model), images, run, clock)))
    return costs


def seconds_a_step(refinement: Refinement, number: int, clock: Clock = monotonic) -> float:
    """Mean time of a step of one phase, after one that is not counted; the weights stay as they are."""
    optimizer = (begin_warmup if number == WARMUP else begin_refinement)(refinement)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    generator, run = torch.Generator().manual_seed(0), refinement.run
    with closing(refinement.loader.epoch(0)) as batches:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            views, ids = make_views(refinement, next(batches), generator)
            forward_backward(refinement.refiner, views, ids, generator, run)
            optimizer.step()
            if run.device.type == "cuda":
                torch.cuda.synchronize()

        step()
        started, done = clock(), 0
        while not done or (done < PROBE_STEPS and decide_on_rank_0(lambda: clock() - started < PROBE_SECONDS)):
            step()
            done += 1
        return (clock() - started) / done


def seconds_an_image(backbone: Backbone, images: ImageSet, run: Run, clock: Clock = monotonic) -> float:
    """Time for the features of one image at every block, in float32 as the comparison computes them."""
    run = replace(run, precision="fp32")
    for rows in (range(64), range(min(PROBE_IMAGES, len(images)))):  # the first is not counted
        started = clock()
        extract_features(backbone, images, run=run, indices=rows)
    return (clock() - started) / len(rows)
