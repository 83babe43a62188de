"""What a recipe says of its heads, for a given encoder and images: their blocks, what each has of its own, guidance."""

from __future__ import annotations

from typing import cast

from mim_refiner.core.guidance import Guide, known_labels
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import DataError, InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import number_of
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.types import BackboneInfo, Pooling


def head_blocks(recipe: RefineRecipe, depth: int) -> list[int]:
    """The blocks with a head; the last third for "last_third", and for "auto" as long as nothing was measured."""
    blocks = recipe.heads.blocks
    return list(range(depth - max(1, depth // 3), depth)) if isinstance(blocks, str) else blocks


def order_heads(recipe: RefineRecipe, blocks: list[int]) -> list[int]:
    """``blocks`` [K] sorted, and with them what the recipe says of each head; InputError where the numbers differ."""
    heads, order = recipe.heads, sorted(range(len(blocks)), key=blocks.__getitem__)
    for name in ("temperature", "pooling"):
        values = getattr(heads, name)
        if isinstance(values, list):
            if len(values) != len(set(blocks)) or len(blocks) != len(set(blocks)):
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


def resolve_pooling(recipe: RefineRecipe, info: BackboneInfo) -> None:
    """Replace every "auto"; raises InputError for a sweep of poolings that the encoder does not have."""
    if "cls" in recipe.sweep.poolings and not info.has_cls:
        raise InputError("sweep.poolings: this encoder has no class token, so there is no choice; leave it out")
    asked = recipe.heads.pooling
    if isinstance(asked, str):
        recipe.heads.pooling = resolved_pooling(asked, info)
    else:
        recipe.heads.pooling = [resolved_pooling(each, info) for each in asked]


def resolved_pooling(pooling: str, info: BackboneInfo) -> Pooling:
    """What "auto" stands for; else ``pooling`` itself."""
    return ("cls" if info.has_cls else "mean") if pooling == "auto" else cast(Pooling, pooling)


def check_guidance(recipe: RefineRecipe, images: ImageSet) -> None:
    """Raise DataError for guidance by labels that there are not, InputError where no neighbours are taken."""
    if recipe.guidance != "none" and not recipe.heads.swap_positive:
        raise InputError(
            f"guidance={recipe.guidance} chooses among neighbours, and heads.swap_positive=false takes none; leave one "
            "of them out"
        )
    if recipe.guidance != "none" and images.telling_labels is None:
        labels, needs = ("labels of one class", "several") if images.labels is not None else ("no labels", "some")
        why = "" if images.labels is not None else f" ({images.source.no_labels})"
        raise DataError(
            f"{images.source.counted}: {labels}{why}, and guidance={recipe.guidance} needs {needs}; give labelled "
            "images, or leave guidance out"
        )


def guide_heads(refiner: Refiner, images: ImageSet, recipe: RefineRecipe, run: Run) -> None:
    """Let every head look up with the labels that the recipe uses, if it does."""
    check_guidance(recipe, images)
    if recipe.guidance == "none" or images.labels is None:
        return
    labels = known_labels(images.labels, recipe.guidance_share, run.seed).to(run.device)
    for block in refiner.blocks:
        refiner.head(block).queue.guide = Guide(labels, restrict=recipe.guidance == "restrict")
