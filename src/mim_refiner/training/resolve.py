"""Resolve a recipe: what its "auto", None and lists become with a given encoder and given images."""

from __future__ import annotations

from typing import Any

from mim_refiner.core.layer_decay import negligible_blocks
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import DataError, InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.positions import check_image_size
from mim_refiner.reporting import number_of
from mim_refiner.training.recipe import RefineRecipe, Views
from mim_refiner.types import BackboneInfo, ImageSize, height_width, side_or_pair

START_SHARE = 0.1  # of the START in an average that is worth having


def resolve(recipe: RefineRecipe, backbone: Backbone) -> RefineRecipe:
    """Replace every "auto" by what the encoder gives; raises InputError for sizes that do not fit its patches."""
    info = backbone.info
    recipe = recipe.model_copy(deep=True)
    blocks = head_blocks(recipe, info.depth)
    wrong = [block for block in blocks if not -info.depth <= block < info.depth]
    if wrong:
        raise InputError(
            f"heads.blocks: block {wrong[0]} is out of range; the encoder has blocks 0 to {info.depth - 1}"
        )
    recipe.heads.blocks = _order_heads(recipe, [block % info.depth for block in blocks])
    if recipe.freeze_below:
        still = negligible_blocks(info.depth, recipe.refinement.layer_decay, recipe.freeze_below)
        recipe.frozen_blocks = max(recipe.frozen_blocks, min(still, recipe.heads.blocks[0]))
    if "cls" in recipe.sweep.poolings and not info.has_cls:
        raise InputError("sweep.poolings: this encoder has no class token, so there is no choice; leave it out")
    asked, each_own = recipe.heads.pooling, isinstance(recipe.heads.pooling, list)
    recipe.heads.pooling = [own_pooling(each, info) for each in asked] if each_own else own_pooling(str(asked), info)
    if recipe.views.global_size is None:
        recipe.views.global_size = side_or_pair(info.image_size)
    if recipe.views.local_size is None:
        recipe.views.local_size = local_size(recipe.views, info.patch_size)
    for size, _ in recipe.views.shapes:
        check_image_size(height_width(size), info.patch_size)
    return recipe


def head_blocks(recipe: RefineRecipe, depth: int) -> list[int]:
    """The blocks with a head; the last third for "last_third", and for "auto" as long as nothing was measured."""
    return last_third(depth) if isinstance(recipe.heads.blocks, str) else recipe.heads.blocks


def last_third(depth: int) -> list[int]:
    """The paper's choice: 8 of 24 blocks."""
    return list(range(depth - max(1, depth // 3), depth))


def own_pooling(asked: str, info: BackboneInfo) -> Any:
    """What "auto" stands for; else what is asked."""
    return ("cls" if info.has_cls else "mean") if asked == "auto" else asked


def _order_heads(recipe: RefineRecipe, blocks: list[int]) -> list[int]:
    """``blocks`` [K] sorted, and with them what the recipe says of each head; InputError where the numbers differ."""
    heads, order = recipe.heads, sorted(range(len(blocks)), key=blocks.__getitem__)
    for name in ("temperature", "pooling"):
        values = getattr(heads, name)
        if not isinstance(values, list):
            continue
        if not len(values) == len(blocks) == len(set(blocks)):
            many = f"{number_of(len(values), 'values')} for {number_of(len(set(blocks)), 'heads')}"
            raise InputError(
                f"heads.{name} has {many} (heads.blocks {blocks}); "
                "give one value for all, or one for each block in the order of heads.blocks"
            )
        if getattr(recipe.sweep, f"{name}s"):
            raise InputError(
                f"sweep.{name}s chooses one {name} for all heads, and heads.{name} has one for each; "
                "leave one of them out"
            )
        setattr(heads, name, [values[place] for place in order])
    return sorted(set(blocks))


def local_size(views: Views, patch_size: tuple[int, int]) -> ImageSize:
    """Three sevenths of the global size (96 of 224 px) in whole patches; the shorter axis whole where crops span it."""
    assert views.global_size is not None
    sides = height_width(views.global_size)
    height, width = (max(1, round(side * 3 / 7 / patch)) * patch for side, patch in zip(sides, patch_size, strict=True))
    if views.crop_axes == "longer":
        height, width = (height, sides[1]) if sides[0] > sides[1] else (sides[0], width)
    return side_or_pair((height, width))


def start_share(recipe: RefineRecipe, steps_per_epoch: int) -> float:
    """How much of the average after the refinement is still the encoder of the START."""
    return float(recipe.ema_decay ** (recipe.refinement.epochs * steps_per_epoch))


def choose_weights(recipe: RefineRecipe, steps_per_epoch: int) -> RefineRecipe:
    """Replace the "auto" of ``export_weights``: the average where the run is long enough for it, else the raw ones."""
    if recipe.export_weights != "auto":
        return recipe
    long_enough = start_share(recipe, steps_per_epoch) <= START_SHARE
    return recipe.model_copy(update={"export_weights": "ema" if long_enough else "model"})


def check_guidance(recipe: RefineRecipe, images: ImageSet) -> None:
    """Raise DataError for guidance by labels that there are not, InputError where no neighbours are taken."""
    if recipe.guidance == "none":
        return
    if not recipe.heads.swap_positive:
        raise InputError(
            f"guidance={recipe.guidance} chooses among neighbours, and heads.swap_positive=false takes none; leave one "
            "of them out"
        )
    if images.telling_labels is None:
        labels, needs = ("labels of one class", "several") if images.labels is not None else ("no labels", "some")
        why = "" if images.labels is not None else f" ({images.source.no_labels})"
        raise DataError(
            f"{images.source.counted}: {labels}{why}, and guidance={recipe.guidance} needs {needs}; give labelled "
            "images, or leave guidance out"
        )
