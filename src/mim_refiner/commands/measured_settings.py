"""Settings of a recipe that are measured on the encoder before it is refined: where heads go, and what they are.

What the run folder holds of it is used again, so that a run resumes with what it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from mim_refiner.analysis.atlas import place_heads
from mim_refiner.commands.inputs import known_by, normalize_by, train_loader
from mim_refiner.commands.survey import Samples
from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0, is_distributed
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import InputError
from mim_refiner.files import read_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import view_specs
from mim_refiner.training.resolve import check_guidance, head_blocks, own_pooling, resolve
from mim_refiner.training.state import refuse_other_recipe
from mim_refiner.training.sweep import choices_of, sweep_heads

PLACEMENT, SWEEP = "head_placement", "head_sweep"  # files of the run folder, entries of the summary
Record = dict[str, Any]


def head_block_settings(choice: str | None) -> list[str]:
    """The recipe override that ``--head-blocks`` stands for; InputError unless auto, last_third or block numbers."""
    if choice is None:
        return []
    if choice in ("auto", "last_third"):
        return [f"heads.blocks={choice}"]
    try:
        return [f"heads.blocks={[int(part) for part in choice.split(',')]}"]
    except ValueError:
        raise InputError(
            f"--head-blocks {choice!r}: give auto, last_third or block numbers such as 8,9,10,11"
        ) from None


def refuse_other_run(before: Path | None, asked: Mapping[str, Any], recipe: RefineRecipe, images: ImageSet) -> None:
    """As ``open_run`` will refuse, but before anything slow is done: what is measured is not settled yet."""
    if before is not None:
        known, free = known_by(asked, recipe, images), ("heads.blocks", "heads.pooling", "heads.temperature")
        decide_on_rank_0(lambda: refuse_other_recipe(before, known, but=(*free, "frozen_blocks")))


def settle(
    recipe: RefineRecipe,
    base: RefineRecipe,
    backbone: Backbone,
    images: tuple[ImageSet, ImageSet],  # to train on, to measure on
    run: Run,
    before: Path | None,
    plan: bool,
) -> tuple[RefineRecipe, dict[str, dict[str, Any]]]:
    """The recipe without "auto", and what was measured for it by the names of its files (nothing for a plan)."""
    check_guidance(recipe, images[0])
    if recipe.shard and not is_distributed():
        run.reporter.message("shard: one process holds all weights; start several (torchrun) to spread them")
    if recipe.normalization == "data":
        normalize_by(images[0], backbone)
    if plan:
        return resolve(recipe, backbone), {}
    placement = place_in_recipe(recipe, base, backbone, images[1], run, before)
    recipe = resolve(recipe, backbone)
    found = {PLACEMENT: placement, SWEEP: sweep_in_recipe(recipe, backbone, images[0], run, before)}
    return recipe, {name: record for name, record in found.items() if record is not None}


def place_in_recipe(
    recipe: RefineRecipe, base: RefineRecipe, backbone: Backbone, images: ImageSet, run: Run, out: Path | None
) -> Record | None:
    """Replace ``heads.blocks: auto`` of ``recipe`` by measured blocks; return the placement, None without "auto".

    By k-NN accuracy when ``images`` have labels, else by neighbour consistency. ``base`` is the recipe before any
    override: its blocks, those that this encoder has, are shown beside. ``out``: the run folder.
    """
    if recipe.heads.blocks != "auto":
        return None
    placement = _kept(out, PLACEMENT, lambda found: all(isinstance(block, int) for block in found["blocks"]))
    if placement is None:
        run.reporter.message("placing heads: measuring every block of the encoder")
        pooling = own_pooling(recipe.heads.measured_pooling, backbone.info)
        atlas, _ = Samples.of(images, None, run).atlas(backbone, "before", full=False)
        depth = backbone.info.depth
        usual = sorted({block % depth for block in head_blocks(base, depth) if -depth <= block < depth})
        # measured by all, who share the images; rounding may differ
        placement = from_rank_0(place_heads(atlas, pooling=pooling, recipe_blocks=usual))
    recipe.heads.blocks = placement["blocks"]
    run.reporter.message(placement["reason"])
    return placement


def sweep_in_recipe(
    recipe: RefineRecipe, backbone: Backbone, images: ImageSet, run: Run, out: Path | None
) -> Record | None:
    """Set ``heads.temperature`` and ``heads.pooling`` of the resolved ``recipe`` to the best of its sweep, if any."""
    if not recipe.sweep:
        return None
    record = _kept(out, SWEEP, lambda found: found["chosen"] in choices_of(recipe))
    if record is None:
        with closing(train_loader(images, view_specs(recipe), recipe, run)) as loader:
            record = from_rank_0(sweep_heads(recipe, backbone, loader, run))
    for name, value in record["chosen"].items():
        setattr(recipe.heads, name, value)
    run.reporter.message(record["reason"])
    return record


def _kept(out: Path | None, name: str, fits: Callable[[Record], bool]) -> Record | None:
    """What the run folder holds of an earlier start; None, to measure again, whatever is wrong with it."""

    def found() -> Record | None:
        try:
            record = read_json(out / f"{name}.json") if out else None
            return record if record and fits(record) else None
        except Exception:
            return None

    return decide_on_rank_0(found)
