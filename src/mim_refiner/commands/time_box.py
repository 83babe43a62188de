"""How much of the demo fits into a few minutes on this machine: measured by real steps, before anything else."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from time import monotonic

import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.deadline import ATLAS, DEARER, FEW_BANK, FEW_TEST, PLANNED, REPORT, affordable_images
from mim_refiner.commands.inputs import train_loader
from mim_refiner.commands.refine import prepare
from mim_refiner.core.collectives import from_rank_0, is_distributed
from mim_refiner.core.run import Run
from mim_refiner.core.threads import pace_of
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.estimate import refine_phases
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import view_specs
from mim_refiner.training.resolve import resolve
from mim_refiner.training.view_pool import pooled_epochs

PATIENCE = 2.0  # seconds for timing each kind of step: other processes make some longer
PROBES, PROBE_IMAGES = 3, 256  # so often the features of so many images are timed
USED = 0.92  # of the time is planned with
# Measured on whole runs, whose log.txt tells when each part began (LOG.md): opening the data and tracing a step cost so
# many features of an image, comparing three encoders so many of each image, real steps so many times the least one.
BEFORE, EVALUATION, REAL = 12_000, 5.5, 1.2
GUARD_IMAGES = 3000  # that the guard looks at during the refinement
MOST_FOR_EVALUATION, LEAST_FOR_TRAINING = 0.4, 0.25  # of the time
MOST_FOR_POOL = 0.2  # of the training's time
BEGUN = 0.25  # of an epoch: what almost fits is begun, since the steps above are told carefully
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
    before, first_look = BEFORE * costs.image, DEARER * (FEW_BANK + FEW_TEST) * an_image
    everything = (bank + test) * an_image
    around = before + (1 + ATLAS + REPORT) * first_look + min(everything / PLANNED, MOST_FOR_EVALUATION * usable)
    looks = GUARD_IMAGES * costs.image
    training = max(usable - around, LEAST_FOR_TRAINING * left)
    pool_epoch = steps * costs.pool_step
    pool = min(recipe.view_pool, int(MOST_FOR_POOL * training / pool_epoch)) if pool_epoch else 0
    pooling = pool * pool_epoch
    share = recipe.warmup.epochs / recipe.refinement.epochs
    most = recipe.refinement.epochs * max(1.0, left / USUAL_SECONDS)  # beyond it no gain was seen (LOG.md)
    epochs = min((training - pooling - looks) / (steps * (costs.refinement_step + share * costs.warmup_step)), most)
    refinement, warmup = (max(1, int(BEGUN + number)) for number in (epochs, share * epochs))
    planned = [pooling + warmup * steps * costs.warmup_step, refinement * steps * costs.refinement_step + looks]
    limits = [training * seconds / sum(planned) for seconds in planned]
    expected = before + sum(map(min, planned, limits)) + first_look
    affordable, tested = affordable_images(left - expected, first_look) - bank, FEW_TEST
    if affordable > FEW_TEST:
        tested = min(test, affordable)
        expected += (bank + tested) * an_image
    expected += max(0.0, min((ATLAS + REPORT / 2) * first_look, left - expected))  # given up where no time is left
    return Plan(warmup, refinement, limits[0], limits[1], pool, tested, expected)


def measure(model: str, images: ImageSet, recipe: RefineRecipe, run: Run) -> Costs:
    """By steps of the very run that is to come, on an encoder that is thrown away; from then on with the number of
    threads that was fastest: several may wait for another process.
    """
    image, backbone = seconds_an_image(load_backbone(model), images, run), load_backbone(model)
    recipe = resolve(recipe, backbone)
    refiner = prepare(backbone, recipe, run)
    with closing(train_loader(images, view_specs(recipe), recipe, run)) as loader:
        warmup, refinement = refine_phases(refiner, recipe, loader, run, PATIENCE).values()
        batches = pooled_epochs(recipe) * loader.steps_per_epoch
    if warmup.alone < warmup.seconds:
        torch.set_num_threads(1)
    pool_step = min(warmup.before, warmup.before_alone) / max(1, batches)
    least = [min(phase.seconds, phase.alone) for phase in (warmup, refinement)]
    costs: Costs = from_rank_0(Costs(least[0], least[1], image, pool_step))
    return costs


def seconds_an_image(backbone: Backbone, images: ImageSet, run: Run) -> float:
    """For the features of one image at every block, in float32 as the comparison computes them: the least of a few
    times, since other processes only make it longer. Finds the best number of threads by the way.
    """
    rows, run, taken = range(min(PROBE_IMAGES, len(images))), replace(run, precision="fp32"), list[float]()
    pace = pace_of(None if is_distributed() else 0.0, run.device)  # processes that share images take equal turns
    while pace.looking or len(taken) < PROBES:
        began = monotonic()
        extract_features(backbone, images, run=run, indices=rows)
        taken.append(monotonic() - began)
        pace.note(taken[-1])
    return min(taken) / len(rows)
