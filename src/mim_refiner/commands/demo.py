"""``demo``: the whole story, offline, on images and weights that travel with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from time import monotonic
from typing import Any

from mim_refiner.commands.deadline import Box
from mim_refiner.commands.loggers import logged
from mim_refiner.commands.refine import refine_and_compare
from mim_refiner.commands.time_box import Plan, fit, measure
from mim_refiner.core.collectives import decide_on_rank_0, is_distributed
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.launch import join_processes
from mim_refiner.core.run import Run
from mim_refiner.core.threads import threads_kept
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError
from mim_refiner.report.numbers import duration
from mim_refiner.reporting import Reporter, listener, number_of
from mim_refiner.training.recipe import RefineRecipe, override
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.state import refuse_place

MINUTES = 4.0
LEAST_SHARE = 0.25
SMOKE_SETTINGS = ["warmup.epochs=1", "refinement.epochs=1", "warmup.warmup_epochs=0", "refinement.warmup_epochs=0"]


@logged
def demo(
    *,
    out: str = "demo-out",
    minutes: float = MINUTES,
    smoke: bool = False,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Refine the shipped masked autoencoder on the shipped CIFAR-10 subset and compare it with the full refinement.

    The machine is measured first, and what is done is fitted into ``minutes`` of it. ``out`` becomes a run folder as of
    ``refine``; its summary also has "full", the shipped full refinement. The same call on the same folder goes on with
    the plan made there. ``smoke``: a few steps on a few images, to see that everything runs. Raises MimRefinerError on
    bad input.
    """
    if not 0 < minutes <= 24 * 60:  # NaN neither
        raise InputError(f"--minutes {minutes}: give the demo some minutes, such as 4 (at most a day)")
    began, reporter = monotonic(), listener(reporter)
    box = Box(lambda: 60 * minutes - (monotonic() - began))
    with threads_kept(), as_file(files("mim_refiner") / "assets") as assets:
        data, test = str(assets / "cifar10_train.parquet"), str(assets / "cifar10_test.parquet")
        if smoke:
            data, test = f"{data}[:512]", f"{test}[:256]"
        images, count = ImageSet(open_source(data)), len(open_source(test))
        run = Run(join_processes(pick_device(device), reporter), seed=seed)
        decide_on_rank_0(lambda: refuse_place(out))
        begun = Path(out).expanduser() / "recipe.yaml"  # of a run to go on with
        recorded = decide_on_rank_0(lambda: str(begun) if begun.is_file() else None)
        recipe = refine_recipe(recorded or "demo", image_size=32)
        if is_distributed():  # a view pool belongs to one process
            recipe = override(recipe, ["view_pool=0"])
        run = replace(run, precision=resolve_precision(recipe.precision, run.device))
        made = json.loads((assets / "weights.json").read_text())

        settings: list[str] = []
        if recorded:
            reporter.message(f"going on with the plan of {recorded}")
        else:
            reporter.message("timing a few steps on this machine")
            costs = measure(str(assets / "mae"), images, recipe, run)
            least = LEAST_SHARE * 60 * minutes  # where the timing alone took the time
            plan = fit(max(box.seconds_left(), least), costs, recipe, images=len(images), bank=len(images), test=count)
            settings = [*plan.settings(), *(SMOKE_SETTINGS if smoke else [])]
            lines = plan_lines(plan, override(recipe, settings), len(images), made["refined"]["draws"])
            for line in ["smoke: an epoch of both phases, a few images"] if smoke else lines:
                reporter.message(line)
        summary = refine_and_compare(
            data=data,
            model=str(assets / "mae"),
            out=out,
            recipe=recorded or "demo",
            eval_data=data,
            eval_test=test,
            settings=settings,
            device=device,
            seed=seed,
            overwrite=False,
            reporter=reporter,
            others={"full": str(assets / "refined")},
            box=None if is_distributed() else box,
        )
    reporter.message(f"block curves: {Path(out) / 'block_curves.png'}; the encoder for timm: {Path(out) / 'export'}")
    return summary


def plan_lines(plan: Plan, recipe: RefineRecipe, images: int, full_draws: int) -> list[str]:
    """What the demo is about to do, how long it takes, and how far that is from the full recipe."""
    steps = (recipe.warmup.epochs + recipe.refinement.epochs) * (images // recipe.batch_size)
    draws = steps * recipe.batch_size
    warmup = number_of(recipe.warmup.epochs, "epochs")
    return [
        f"plan: about {duration(plan.seconds)} from here on: {warmup} of head warm-up and "
        f"{recipe.refinement.epochs} of refinement on {images:,} images (the first {recipe.frozen_blocks} blocks stay "
        f"frozen), then three encoders compared on {plan.test_images:,} test images, or as many as time is left for",
        f"both phases of the live run draw {draws:,} images, {draws / full_draws:.1%} of the {full_draws:,} of the "
        "shipped full refinement; --minutes gives it more",
    ]
