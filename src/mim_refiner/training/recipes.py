"""Named recipes. Sources: MIM-Refiner, arXiv 2402.10093 (configurations of the public code), and our LOG.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mim_refiner.errors import RecipeError, did_you_mean
from mim_refiner.files import read_yaml, reading
from mim_refiner.settings import changed
from mim_refiner.training.recipe import (
    EncoderPhase,
    HeadPhase,
    Heads,
    Phase,
    PretrainRecipe,
    RefineRecipe,
    Views,
    override,
)

MIN_BATCHES = 4  # an epoch
MIN_QUEUE = 32  # entries, above the recipes' top_k

R = TypeVar("R", RefineRecipe, PretrainRecipe)


# Rows of the paper's table, as changes of the recipe that is for any encoder.
_LARGE: dict[str, Any] = {
    "views.global_size": 224, "views.local_size": 96, "heads.blocks": [*range(16, 24)], "heads.pooling": "cls",
}  # fmt: skip
_HUGE = _LARGE | {  # local crops of a multiple of 14
    "views.local_size": 98, "heads.blocks": [*range(20, 32)], "heads.temperature": 0.3, "batch_size": 512,
}  # fmt: skip
_TWO_BILLION = _HUGE | {"heads.blocks": [*range(16, 24)], "heads.temperature": 0.35, "frozen_blocks": 6}  # of 24 blocks
_SHORTER = {"refinement.epochs": 20}  # of 30


def _paper(name: str, changes: Mapping[str, Any], expected: str = "") -> RefineRecipe:
    """The paper's recipe for any encoder with some ``changes``, ``expected`` to give so much."""
    usual = RefineRecipe(
        name=name,
        expected=expected and f"k-NN accuracy {expected} (paper, ImageNet-1K)",
        batch_size=1024,
        views=Views(local_size=None),
        export_weights="auto",
    )
    return changed(usual, changes.items())


def tiny() -> RefineRecipe:
    """Images up to 64 px and small encoders: milder crops, small heads, a rate that moves every block (LOG.md)."""
    return RefineRecipe(
        name="tiny",
        expected="k-NN accuracy 42.5 -> 58.0, linear 48.6 -> 61.5 on CIFAR-10 with 20 epochs (LOG.md, 2026-11-25)",
        batch_size=256,
        views=Views(
            global_scale=(0.2, 1.0),
            local_size=16,
            local_scale=(0.1, 0.5),
            num_local=4,
            jitter_strength=0.8,
            blur_prob=(0.0, 0.0, 0.0),
            solarize_prob=(0.0, 0.0, 0.0),
        ),
        heads=Heads(projector_hidden=512, predictor_hidden=1024, out_dim=128, queue_size=16_384),
        warmup=HeadPhase(epochs=1, base_lr=1e-3, warmup_epochs=0.2),
        refinement=EncoderPhase(epochs=20, base_lr=2e-3, warmup_epochs=1, top_k=20, layer_decay=0.9),
        ema_decay=0.999,
    )


def demo() -> RefineRecipe:
    """``tiny`` for few CPU minutes and 3,000 images: the last third of 12 blocks learns, on a pool of views."""
    own = {"name": "demo", "precision": "fast", "knn_every": 0, "batch_size": 128, "heads.queue_size": 2048}
    own["expected"] = "k-NN accuracy +1.0 to +1.7 on CIFAR-10's test images, seeds 0 to 2 (LOG.md, 2026-11-28)"
    own |= {"frozen_blocks": 8, "view_pool": 3, "refinement.epochs": 6, "refinement.base_lr": 4e-3}
    own |= {"warmup.epochs": 4, "warmup.base_lr": 2e-3, "warmup.warmup_epochs": 0.5}
    return changed(tiny(), own.items())


REFINE_RECIPES: dict[str, Callable[[], RefineRecipe]] = {
    "mae_l16": lambda: _paper("mae_l16", _LARGE, "60.6 -> 81.5, linear 77.5 -> 82.8"),
    "dbot_l16": lambda: _paper("dbot_l16", _LARGE),
    "data2vec2_l16": lambda: _paper("data2vec2_l16", _LARGE | _SHORTER, "51.8 -> 81.0, linear 78.2 -> 83.5"),
    "crossmae_l16": lambda: _paper("crossmae_l16", _LARGE | {"heads.pooling": "mean"}),
    "mae_h14": lambda: _paper("mae_h14", _HUGE, "58.1 -> 82.3, linear 78.2 -> 83.7"),
    "dbot_h14": lambda: _paper("dbot_h14", _HUGE),
    "data2vec2_h14": lambda: _paper("data2vec2_h14", _HUGE | _SHORTER, "48.0 -> 82.3, linear 80.4 -> 84.7"),
    "mae_2b14": lambda: _paper("mae_2b14", _TWO_BILLION | _SHORTER, "67.1 -> 83.2, linear 79.7 -> 84.5"),
    "tiny": tiny,
    "demo": demo,
}


def mae() -> PretrainRecipe:
    """The MAE paper's pre-training (800 epochs, batch 4096)."""
    return PretrainRecipe(name="mae", batch_size=4096)


def tiny_mae() -> PretrainRecipe:
    """Small images and small encoders."""
    return PretrainRecipe(
        name="tiny_mae",
        batch_size=256,
        decoder_dim=64,
        decoder_depth=2,
        decoder_heads=2,
        training=Phase(epochs=100, base_lr=1.5e-3, warmup_epochs=5, end_lr=1e-6),
        knn_every=5,
    )


PRETRAIN_RECIPES: dict[str, Callable[[], PretrainRecipe]] = {"mae": mae, "tiny_mae": tiny_mae}


def refine_recipe(
    name_or_file: str | None, settings: Sequence[str] = (), *, image_size: int, images: int | None = None
) -> RefineRecipe:
    """A named recipe, a recipe file, or (None) ``tiny`` up to 64 px and above that the ViT-L/16 MAE recipe's values,
    with heads on the last third of the encoder, fitted to the number of ``images``; ``settings`` (key=value) laid over.
    """
    if name_or_file is not None:
        return _lookup(name_or_file, settings, REFINE_RECIPES, tiny())
    return override(fit_to_images(tiny() if image_size <= 64 else _paper("default", {}), images), settings)


def pretrain_recipe(
    name_or_file: str | None, settings: Sequence[str] = (), *, image_size: int, images: int | None = None
) -> PretrainRecipe:
    """As ``refine_recipe``, with ``tiny_mae`` up to 64 px and ``mae`` above for None."""
    if name_or_file is not None:
        return _lookup(name_or_file, settings, PRETRAIN_RECIPES, mae())
    return override(fit_to_images(tiny_mae() if image_size <= 64 else mae(), images), settings)


def fit_to_images(recipe: R, images: int | None) -> R:
    """``recipe`` for few images: at least four batches an epoch, and no queue larger than the data (powers of two)."""
    if images is None:
        return recipe
    fitted = recipe.model_copy(deep=True)
    fitted.batch_size = min(recipe.batch_size, max(2, _power_of_two(images // MIN_BATCHES)))
    if isinstance(fitted, RefineRecipe):
        fitted.heads.queue_size = min(fitted.heads.queue_size, max(MIN_QUEUE, _power_of_two(images)))
    return fitted


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)


RUN_FACTS = {  # what recipe.yaml of a run folder has besides
    "command", "data", "arch", "model", "model_sha256", "seed", "exclude", "data_fingerprint", "data_images",
}  # fmt: skip


def _lookup(name_or_file: str, settings: Sequence[str], recipes: dict[str, Callable[[], R]], base: R) -> R:
    if name_or_file in recipes:
        return override(recipes[name_or_file](), settings)
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml") and not os.path.exists(path):
        wrong = f"unknown recipe '{name_or_file}'{did_you_mean(name_or_file, recipes)}"
        for verb, others in (("refine", set(REFINE_RECIPES)), ("pretrain", set(PRETRAIN_RECIPES))):
            wrong = f"recipe '{name_or_file}' is for {verb}" if name_or_file in others else wrong
        raise RecipeError(f"{wrong}; use a YAML file or one of {', '.join(recipes)}")
    with reading(path, "give a recipe name, or a YAML file like recipe.yaml of any run folder", RecipeError):
        tree = read_yaml(path)
        if not isinstance(tree, dict):
            raise RecipeError(
                f"{path}: a recipe file is a mapping of keys to values; see recipe.yaml of any run folder"
            )
        if "command" in tree:  # a run folder's: its recipe, for other data or models
            tree = {key: value for key, value in tree.items() if key not in RUN_FACTS}
        name = tree.get("name")
        return override(
            recipes.get(name, lambda: base)() if isinstance(name, str) else base, settings, (str(path), tree)
        )
