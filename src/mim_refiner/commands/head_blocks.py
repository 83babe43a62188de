"""``--head-blocks auto``: measure the encoder before it is refined, and put the heads where the rule says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mim_refiner.analysis.placement import place_heads
from mim_refiner.commands.survey import atlas_of, choose_samples
from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import InputError
from mim_refiner.files import read_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import head_blocks

FILE = "head_placement.json"
NAMED = ("auto", "last_third")


def head_block_settings(choice: str | None) -> list[str]:
    """The recipe override that ``--head-blocks`` stands for; InputError unless auto, last_third or block numbers."""
    if choice is None:
        return []
    if choice in NAMED:
        return [f"heads.blocks={choice}"]
    try:
        return [f"heads.blocks={[int(part) for part in choice.split(',')]}"]
    except ValueError:
        raise InputError(
            f"--head-blocks {choice!r}: give auto, last_third or block numbers such as 8,9,10,11"
        ) from None


def place_in_recipe(
    recipe: RefineRecipe,
    base: RefineRecipe,
    backbone: Backbone,
    images: ImageSet,
    run: Run,
    out: Path | None,
) -> dict[str, Any] | None:
    """Replace ``heads.blocks: auto`` of ``recipe`` by measured blocks; return the placement, None without "auto".

    By k-NN accuracy when ``images`` have labels, else by neighbour consistency. ``base`` is the recipe
    before any override: its blocks are shown beside. A placement in the run folder ``out`` is used again, so that a
    run resumes with the heads it began with.
    """
    if recipe.heads.blocks != "auto":
        return None
    placement = decide_on_rank_0(lambda: _kept(out))
    if placement is None:
        run.reporter.message("placing heads: measuring every block of the encoder")
        pooling = recipe.heads.pooling
        if pooling == "auto":
            pooling = "cls" if backbone.info.has_cls else "mean"
        atlas, _ = atlas_of(
            backbone, choose_samples(images, None, seed=run.seed), run, name="before", probe=False, both=False
        )
        placed = place_heads(atlas, pooling=pooling, recipe_blocks=_blocks_of(base, backbone.info.depth))
        placement = from_rank_0(placed)  # measured by all, who share the images; rounding may differ
    recipe.heads.blocks = placement["blocks"]
    run.reporter.message(placement["reason"])
    return placement


def _blocks_of(recipe: RefineRecipe, depth: int) -> list[int]:
    """The recipe's own blocks as numbers from 0, those that this encoder has."""
    return sorted({block % depth for block in head_blocks(recipe, depth) if -depth <= block < depth})


def _kept(out: Path | None) -> dict[str, Any] | None:
    try:
        found = read_json(out / FILE) if out else None
        return found if found and all(isinstance(block, int) for block in found["blocks"]) else None
    except Exception:  # measured again, whatever is wrong with it
        return None
