"""``refine --plan`` and ``--memory-budget``: what the run at hand will need and cost, before it starts."""

from __future__ import annotations

import math
from typing import Any

from mim_refiner.analysis.forecast import refinement_forecast
from mim_refiner.commands.comparison import Measured
from mim_refiner.core.collectives import agree, world_size
from mim_refiner.core.device import free_memory, process_bytes
from mim_refiner.core.run import Run
from mim_refiner.core.sharding import processes_on_node
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.estimate import Estimate, machine_is_busy, refine_phases
from mim_refiner.training.graphed import uses_graph
from mim_refiner.training.memory import RESERVE, Planner, format_bytes, parse_budget, shards_of
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.traffic import Traffic
from mim_refiner.training.view_pool import pool_bytes

# Bytes that the comparison and the report take at the end, on top since glibc keeps what the steps freed: 0.04 GB after
# trainings that held 1.3 GB or more, 0.12 to 0.2 GB after smaller ones (docs/scale.md); near the most, for all.
MEASURING = 175_000_000


def with_cost(
    recipe: RefineRecipe, refiner: Refiner, loader: TrainLoader, budget: str | None, run: Run, on: Measured
) -> tuple[RefineRecipe, Estimate]:
    """The recipe as it fits into the budget (None: what is free), and what it costs; says what was picked.

    ``on``: images in memory beside those to train on. Raises InputError where nothing fits, or where steps that are to
    be CUDA graphs cannot.
    """
    process = process_of(loader, run)
    if run.device.type == "cpu":
        process += on.bytes_beside(loader.images) + MEASURING
    pool = pool_bytes(recipe, refiner, loader.steps_per_epoch * recipe.batch_size)
    free, batch = available_memory(budget, run), recipe.batch_size // world_size()
    cached = recipe.micro_batch is not None and recipe.micro_batch < batch
    # a GPU's memory is for the one run: there graphs are kept without a budget too
    keeps = cached and recipe.kept_graphs == "auto" and run.device.type == "cuda"
    planner = Planner(refiner, recipe, run, process, pool)
    picked = planner.as_asked(free if keeps else 0.0)
    settings: dict[str, Any] = {"kept_graphs": recipe.graphs}
    fitted = budget is not None or picked.peak > free * (1 - RESERVE)
    if fitted:
        limit = "free memory" if (budget or "auto").strip().lower() == "auto" else "--memory-budget"
        picked = planner.fitting(free, limit)
    if fitted or keeps:
        settings = picked.settings
        words = ", ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
        run.reporter.message(f"memory: {format_bytes(picked.peak)} expected; {words} ({picked.words})")
    chosen = recipe.model_copy(update=settings)
    uses_graph(chosen, refiner, run)
    phases = refine_phases(refiner, chosen, loader, run)
    return chosen, Estimate(len(loader.images), loader.batch_size, phases, picked, free, machine_is_busy(loader, run))


def process_of(loader: TrainLoader, run: Run) -> int:
    """Bytes beside a step: of the images, and on a CPU of Python with its libraries. On a GPU the allocator's count."""
    return loader.held_bytes(run.device) + (process_bytes() if run.device.type == "cpu" else 0)


def plan(recipe: RefineRecipe, refiner: Refiner, cost: Estimate, run: Run, views_are_cut: str) -> dict[str, Any]:
    """The cost of the run: hours and memory by part, and what processes send each other."""
    picked = cost.picked
    result: dict[str, Any] = {
        "views_are_cut": views_are_cut,
        "setting": {**picked.settings, "peak": format_bytes(picked.peak), "why": picked.words},
        "cuda_graph": uses_graph(recipe, refiner, run),
    }
    if world_size() > 1:
        sent = traffic_of(recipe, refiner, run).sent()
        result["sent_a_step_and_process"] = {name: format_bytes(value) for name, value in sent.items()}
    told = cost.record()
    if refinement := told["phases"].get("refinement"):
        told["forecast"] = refinement_forecast(refinement["steps"] * recipe.batch_size)["reason"]
    return {"plan": result | told}


def available_memory(budget: str | None, run: Run) -> float:
    """Bytes for each process (None: what is free, or inf where nobody knows): what the fullest device has, for all."""
    if budget is None and free_memory(run.device) == math.inf:
        return math.inf
    found = parse_budget(budget or "auto", run.device)
    if run.device.type == "cpu" and (budget or "auto").strip().lower() == "auto":
        found = found / processes_on_node() + process_bytes()  # which is there already, and part of what is planned
    return agree(found, largest=False)


def traffic_of(recipe: RefineRecipe, refiner: Refiner, run: Run) -> Traffic:
    """What processes send each other in a step of the refinement."""
    backbone, shapes = refiner.backbone, recipe.views.shapes
    blocks, stop = getattr(backbone.model, "blocks", ()), refiner.blocks[-1] + 1
    still = {*refiner.fixed_parameters(), *(own for block in blocks[stop:] for own in block.parameters())}
    trained = {*backbone.parameters(), *refiner.heads.parameters()} - still
    return Traffic(
        processes=world_size(),
        shards=shards_of(recipe),
        images=recipe.batch_size // world_size(),
        views=sum(count for _, count in shapes),
        view_sizes=len(shapes),
        heads=len(refiner.blocks),
        out_dim=recipe.heads.out_dim,
        block_bytes=sum(parameter.nbytes for parameter in blocks[0].parameters()) if blocks else 0,
        frozen_blocks=recipe.frozen_blocks,
        trained_blocks=stop - recipe.frozen_blocks,
        trained_bytes=sum(parameter.nbytes for parameter in trained),
        micro_batch=recipe.micro_batch,
        checkpointing=recipe.checkpointing,
        bf16=run.precision == "bf16",
    )
