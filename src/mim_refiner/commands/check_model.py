"""What a refinement of a model on a set of images will need: coverage, memory, disk and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_refiner.checkpoints.load import inspect_checkpoint
from mim_refiner.commands.refine import refine
from mim_refiner.core.processes import started_as
from mim_refiner.data.doctor import Scan
from mim_refiner.errors import InputError, MimRefinerError
from mim_refiner.files import name_of
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.recipes import refine_recipe


def check_model(
    model: Any, backbone: Backbone, data: Any, found: Scan, *, recipe: str | None, device: torch.device
) -> dict[str, Any]:
    """Say what the encoder ``backbone`` covers, how it fits the images, and what refining it would cost here.

    What ``refine --plan`` says of the same; a loaded machine gives a high time. Raises RecipeError for an unknown
    ``recipe``.
    """
    report = inspect_checkpoint(model) if isinstance(model, str | Path) else None
    info, images = backbone.info, len(found.rows)
    chosen, cost = refine_recipe(recipe, image_size=max(info.image_size), images=images), dict[str, Any]()
    encoder = sum(parameter.nbytes for parameter in backbone.parameters())
    how: dict[str, Any] = {"recipe": recipe, "device": str(device), "reporter": Reporter()}
    try:
        if started_as().world_size > 1:  # a plan is made by all of them, doctor by the first alone
            raise InputError("doctor tells no cost in several processes; use refine --plan")
        plan = refine(data=data, model=backbone, out="", plan=True, **how)["plan"]
        images, sizes = plan["images"], plan["bytes"]
        chosen = refine_recipe(recipe, image_size=max(info.image_size), images=images)
        checkpoints = (sizes["state"] - sizes["gradients"]) * chosen.keep_checkpoints
        cost = {
            "estimated_hours": round(plan["hours"], 2),
            "training_memory_gb": round(sizes["peak"] / 1e9, 2),
            "free_memory_gb": None if sizes["free"] is None else round(sizes["free"] / 1e9, 2),
            "micro_batch": plan["setting"]["micro_batch"],
            "disk_gb": round((checkpoints + encoder) / 1e9, 2),
            "advice": plan["to_change"],
        }
    except MimRefinerError as error:  # what a run would end with
        cost = {"problem": str(error)}
    return {
        "source": name_of(model),
        "family": info.family,
        "architecture": info.architecture,
        "coverage": info.coverage,
        "licence": info.licence,
        "image_size": f"{info.image_size[0]}x{info.image_size[1]}",
        "recipe": chosen.name,
        "notes": [*(report.notes if report else ()), *_fit_notes(backbone, found, images, chosen)],
        **cost,
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
