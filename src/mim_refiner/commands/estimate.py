"""What a refinement of a model on a set of images will need: coverage, memory, disk and time."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import numpy as np
import torch

from mim_refiner.checkpoints.load import inspect_checkpoint
from mim_refiner.core.device import resolve_precision
from mim_refiner.core.run import Run
from mim_refiner.data.doctor import Scan
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.refine import head_blocks
from mim_refiner.types import ImageSize, height_width

PROBE_SECONDS = 4.0
BACKWARD = 3.0  # forward and backward against forward alone


def check_model(
    model: str, backbone: Backbone, found: Scan, images: int, *, recipe: str | None, device: torch.device
) -> dict[str, Any]:
    """Say what the encoder ``backbone`` covers, how it fits the images, and what refining it would cost here.

    Time is measured by forward passes for some seconds and scaled to all views of both phases; a loaded machine gives
    a high figure. Raises RecipeError for an unknown ``recipe``.
    """
    report = inspect_checkpoint(model)
    info = backbone.info
    chosen = refine_recipe(recipe, image_size=max(info.image_size), images=images)
    run = Run(device, resolve_precision(chosen.precision, device))
    result: dict[str, Any] = {
        "source": model,
        "family": info.family,
        "architecture": info.architecture,
        "coverage": report.coverage,
        "licence": info.licence,
        "image_size": f"{info.image_size[0]}x{info.image_size[1]}",
        "recipe": chosen.name,
        "notes": [*report.notes, *_fit_notes(backbone, found, images, chosen)],
    }
    rate = forward_rate(backbone, run)
    result["forward_images_per_s"] = round(rate, 1)
    views = image_equivalents(chosen, info.image_size)
    warmup = chosen.warmup.epochs * images * views / rate
    refinement = chosen.refinement.epochs * images * views * BACKWARD / rate
    result["estimated_hours"] = round((warmup + refinement) / 3600, 2)
    result |= _space(backbone, chosen, images, device)
    return result


def image_equivalents(recipe: RefineRecipe, size: ImageSize) -> float:
    """How many full-size images the views of one image cost."""
    views = recipe.views
    whole = math.prod(height_width(size))
    areas = [math.prod(height_width(side)) / whole for side in (views.global_size or size, views.local_size or 0)]
    local = areas[1] if views.local_size else (3 / 7) ** 2 * areas[0]
    return 2 * areas[0] + views.num_local * local


def forward_rate(backbone: Backbone, run: Run) -> float:
    """Images a second of forward passes, measured for a few seconds after one to warm up."""
    info = backbone.info
    backbone.to(run.device)
    images = torch.zeros(32 if max(info.image_size) <= 64 else 4, info.in_chans, *info.image_size, device=run.device)

    def step() -> None:
        backbone.forward_blocks(images, [-1])
        if run.device.type != "cpu":
            torch.accelerator.synchronize()

    with torch.inference_mode(), run.autocast():
        step()
        started, done = time.perf_counter(), 0
        while done == 0 or (time.perf_counter() - started < PROBE_SECONDS and done < 20):
            step()
            done += 1
    return done * len(images) / (time.perf_counter() - started)


def _space(backbone: Backbone, recipe: RefineRecipe, images: int, device: torch.device) -> dict[str, Any]:
    """Memory of weights, gradients, optimizer and queues (activations come on top), and disk of the checkpoints."""
    heads, width = recipe.heads, backbone.info.embed_dim
    count = len(head_blocks(recipe, backbone.info.depth))
    per_head = (
        width * heads.projector_hidden + heads.projector_hidden**2 + heads.projector_hidden * heads.out_dim
        + heads.out_dim * heads.predictor_hidden + heads.predictor_hidden * heads.out_dim
    )  # fmt: skip
    encoder = sum(parameter.numel() for parameter in backbone.parameters())
    trained = encoder + count * per_head
    queues = count * heads.queue_size * heads.out_dim
    training_bytes = 4 * (4 * trained + encoder + queues)  # weights, gradients, two moments; the average; the queues
    checkpoint = 4 * (3 * trained + encoder + queues)
    result = {
        "training_memory_gb": round(training_bytes / 1e9, 2),
        "disk_gb": round((checkpoint * recipe.keep_checkpoints + 4 * encoder) / 1e9, 2),
    }
    if device.type == "cuda":
        result["device_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
    else:
        result["machine_memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return result


def _fit_notes(backbone: Backbone, found: Scan, images: int, recipe: RefineRecipe) -> list[str]:
    notes = []
    if len(found.sizes):
        shares = np.median((found.sizes / backbone.info.image_size[::-1]).min(axis=1))  # width to width
        if shares < 0.5:
            size = "x".join(map(str, backbone.info.image_size))
            notes.append(
                f"images are enlarged {1 / shares:.1f} times to {size} px: they show less than the encoder expects"
            )
    if images < recipe.batch_size:
        notes.append(f"batch_size {recipe.batch_size} is larger than the {images} images; set a smaller one")
    elif images < 10 * recipe.batch_size:
        notes.append(
            f"{images} images are {images // recipe.batch_size} steps an epoch; a smaller batch_size learns more"
        )
    return notes
