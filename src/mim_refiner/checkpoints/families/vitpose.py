"""Files of ViTPose (Xu et al., arXiv 2204.12484; layout of github.com/ViTAE-Transformer/ViTPose): fine-tuned MAE.

Those of its authors and of transformers. No class token, but its entry in the table, which is added to all. The patch
projection pads the image by 2 pixels.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import GUESS, PROJECTION, View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit, is_encoder_name
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.errors import CheckpointError

PADDING = 2
KEYS = KeyMap([("last_norm.{p}", "norm.{p}")], same=is_encoder_name)
_HF_MLP = "encoder.layer.{i}.mlp.fc"
HF_KEYS = KeyMap([*hf.VIT_RULES, *((f"{_HF_MLP}{n}.{{p}}", f"blocks.{{i}}.mlp.fc{n}.{{p}}") for n in (1, 2))])


def matches(view: View) -> bool:
    names = view.tensors
    return has_plain_vit(names) and {"last_norm.weight", "pos_embed"} <= names.keys() and "cls_token" not in names


def matches_hf(view: View) -> bool:
    names = {"encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.layernorm_before.weight", "layernorm.weight"}
    known = view.config is None or str(view.model_type).startswith("vitpose")
    return known and names <= view.tensors.keys() and "embeddings.cls_token" not in view.tensors


def _prepare_hf(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    eps = view.contents.fact("layer_norm_eps")
    return hf.mean_and_std(view) | _prepare(view, tensors, wishes) | {"norm_eps": eps or hf.NORM_EPS}


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table, patch = tensors["pos_embed"], tensors[PROJECTION].shape[2:]
    if min(patch) <= 2 * PADDING:
        raise CheckpointError(
            f"{view.where}: a ViTPose with patches of {patch[0]}x{patch[1]} pixels, whose padding by {PADDING} pixels "
            "makes another grid than its table has; give one with patches of 16, as published"
        )
    tensors["pos_embed"] = table[:, 1:] + table[:, :1]
    said: dict[str, Any] = {"arguments": {"patch_padding": PADDING}}
    unit = math.isqrt((table.shape[1] - 1) // 12)
    if wishes.image_size is None and wishes.told_size is None and 12 * unit**2 == table.shape[1] - 1:
        size = (4 * unit * patch[0], 3 * unit * patch[1])
        note = (
            f"{GUESS}images of {size[0]}x{size[1]}, the 4:3 of the authors' persons; pass image_size= if yours differ"
        )
        said |= {"known_size": size, "notes": (note,)}
    return said


_FACTS: dict[str, Any] = {"final_norm": True, "architecture": "vit_variant", "heads": {384: 12}}
FAMILY = vit_family("vitpose", matches, keys=KEYS, prepare=_prepare, **_FACTS)
HF = vit_family(
    "hf_vitpose", matches_hf, keys=HF_KEYS, anchor=hf.ANCHOR, dropped=hf.DROPPED, prepare=_prepare_hf, **_FACTS
)
