"""Fine-tuning on 1 % and 10 % of the labels as published, by the size of the encoder.

ViT-L, H and 2B: the configurations of github.com/ml-jku/MIM-Refiner (finetune_1p, finetune_10p) for refined encoders;
ViT-B, which they lack: Semi-ViT's supervised stage (arXiv 2208.05688, github.com/amazon-science/semi-vit). Rates are
for 256 images a step. What "minimal augmentation" holds there is not in the repository: taken as crop and flip.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mim_refiner.errors import InputError
from mim_refiner.evaluation.finetune import RECIPES, FinetuneSettings

_PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}
_MINIMAL = {**_PLAIN, "randaugment": ""}
_MIXED = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}
_B = {"epochs": 100, "batch_size": 512, "layer_decay": 0.65, "weight_decay": 0.05}
_IJEPA = {"epochs": 50, "batch_size": 512, "layer_decay": 0.75, "lr": 3e-5}
_SEMIVIT = {"epochs": 50, "batch_size": 256, "layer_decay": 0.75, "lr": 1e-3, "weight_decay": 0.05, "drop_path": 0.2}

# (1 %, 10 %); the rest as in FinetuneSettings: warm-up of 5 epochs, label smoothing 0.1
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_b": ({**_B, "lr": 5e-5, **_PLAIN}, {**_B, "lr": 2.5e-4, **_MIXED, "drop_path": 0.1}),
    "vit_l": ({**_IJEPA, "weight_decay": 0.05, **_MINIMAL}, {**_IJEPA, "weight_decay": 0.05, **_PLAIN}),
    "vit_h": ({**_IJEPA, "weight_decay": 0.4, **_MINIMAL}, {**_SEMIVIT, **_MIXED}),
    "vit_2b": ({**_IJEPA, "weight_decay": 0.4, **_MINIMAL}, {**_SEMIVIT, **_MIXED, "frozen_share": 0.25}),
}
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280, "vit_2b": 2560}  # from which on a row is meant
MOST = (0.02, 0.2)  # share of the labels that the row of 1 %, of 10 % is used for


def row_of(recipe: str, width: int) -> str | None:
    """Name of the row for an encoder of ``width``; None for MAE's recipe. InputError where nothing is published."""
    if recipe == "mae":
        return None
    if recipe != "published":
        return recipe
    if width < WIDTHS["vit_b"]:
        raise InputError(
            f"finetune.recipe=published: nothing is published for an encoder of width {width} (ViT-B has "
            f"{WIDTHS['vit_b']}); choose {RECIPES[2]}, another row, or mae, whose values --set changes"
        )
    return max((name for name in WIDTHS if WIDTHS[name] <= width), key=WIDTHS.__getitem__)


def published(
    settings: FinetuneSettings, share: float, width: int, given: Collection[str]
) -> tuple[FinetuneSettings, str]:
    """``settings`` with the published values for a ``share`` of the labels, and what they are called.

    ``given``: names of settings that the user has set, which stay. More labels than published: as they are.
    """
    row = row_of(settings.recipe, width)
    number = next((place for place, most in enumerate(MOST) if share <= most), None)
    if row is None or number is None:
        return settings, "mae"
    changes = {key: value for key, value in ROWS[row][number].items() if key not in given}
    return settings.model_copy(update=changes), f"{row} {('1', '10')[number]} %"
