"""What a refinement of a model on a set of images will need: coverage, memory, disk and time."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_refiner.checkpoints.load import inspect_checkpoint
from mim_refiner.commands.comparison import Measured
from mim_refiner.commands.inputs import split_images, train_loader
from mim_refiner.commands.plan import with_cost
from mim_refiner.commands.refine import measure_on, prepare
from mim_refiner.core.device import resolve_precision
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.doctor import Scan
from mim_refiner.errors import MimRefinerError
from mim_refiner.files import name_of
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.refine import resolve, view_specs


def check_model(
    model: Any, backbone: Backbone, data: Any, found: Scan, *, recipe: str | None, device: torch.device
) -> dict[str, Any]:
    """Say what the encoder ``backbone`` covers, how it fits the images, and what refining it would cost here.

    What ``refine --plan`` says of the same; a loaded machine gives a high time. Raises RecipeError for an unknown
    ``recipe``.
    """
    report = inspect_checkpoint(model) if isinstance(model, str | Path) else None
    info = backbone.info
    choose = partial(refine_recipe, recipe, image_size=max(info.image_size))
    chosen, count, problem, cost = choose(images=len(found.rows)), len(found.rows), {}, {}
    try:
        share, channels = chosen.hold_out, info.in_chans
        images, held_out = split_images(data, share, Reporter(), seed=0, channels=channels, exclude=None)
        chosen, count = choose(images=len(images)), len(images)
        run = Run(device, resolve_precision(chosen.precision, device))
        if chosen.batch_size <= count:
            cost = _cost(backbone, images, measure_on(images, held_out, None, None, run), chosen, run)
    except MimRefinerError as error:  # what a run would end with
        problem = {"problem": str(error)}
    return {
        "source": name_of(model),
        "family": info.family,
        "architecture": info.architecture,
        "coverage": info.coverage,
        "licence": info.licence,
        "image_size": f"{info.image_size[0]}x{info.image_size[1]}",
        "recipe": chosen.name,
        "notes": [*(report.notes if report else ()), *_fit_notes(backbone, found, count, chosen)],
        **cost,
        **problem,
    }


def _cost(backbone: Backbone, images: ImageSet, on: Measured, recipe: RefineRecipe, run: Run) -> dict[str, Any]:
    """What a run on these images takes, and the disk that its checkpoints do."""
    recipe = resolve(recipe, backbone)
    refiner = prepare(backbone, recipe, run)
    loader = train_loader(images, view_specs(recipe), recipe, run)
    fitted, cost = with_cost(recipe, refiner, loader, None, run, on)
    encoder, needs = sum(parameter.nbytes for parameter in backbone.parameters()), cost.picked.needs
    return {
        "estimated_hours": round(cost.hours, 2),
        "training_memory_gb": round(cost.picked.peak / 1e9, 2),
        "free_memory_gb": round(cost.free / 1e9, 2) if cost.free < math.inf else None,
        "micro_batch": fitted.micro_batch,
        "disk_gb": round(((needs.state - needs.gradients) * recipe.keep_checkpoints + encoder) / 1e9, 2),
        "advice": cost.advice,
    }


def _fit_notes(backbone: Backbone, found: Scan, images: int, recipe: RefineRecipe) -> list[str]:
    notes, size = [], backbone.info.image_size
    share = np.median((found.sizes / size[::-1]).min(axis=1)) if len(found.sizes) else 1.0  # width to width
    if share < 0.5:
        enlarged = f"images are enlarged {1 / share:.1f} times to {size[0]}x{size[1]} px"
        notes.append(f"{enlarged}: they show less than the encoder expects")
    if images < recipe.batch_size:
        notes.append(f"batch_size {recipe.batch_size} is larger than the {images} images; set a smaller one")
    elif images < 10 * recipe.batch_size:
        steps = images // recipe.batch_size
        notes.append(f"{images} images are {steps} steps an epoch; a smaller batch_size learns more")
    return notes
