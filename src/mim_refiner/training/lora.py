"""The recipe's adapters on an encoder."""

from __future__ import annotations

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.lora import add_lora
from mim_refiner.training.recipe import RefineRecipe


def adapt(backbone: Backbone, recipe: RefineRecipe) -> None:
    """Add the recipe's adapters, if any; raises InputError where they cannot be."""
    if recipe.adapter == "none":
        return
    if recipe.shard or recipe.compile:
        raise InputError("adapter=lora goes neither with shard nor with compile; set shard=false and compile=false")
    lora = recipe.lora
    add_lora(backbone, lora.targets, lora.rank, lora.alpha, recipe.frozen_blocks)
