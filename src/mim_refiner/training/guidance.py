"""The recipe's guidance by labels, in the queues of all heads."""

from __future__ import annotations

from mim_refiner.core.guidance import Guide, known_labels
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import DataError, InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.recipe import RefineRecipe


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
