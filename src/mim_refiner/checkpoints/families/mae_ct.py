"""Files of MAE-CT and its MAEs (Lehner et al., arXiv 2304.10520; layout of github.com/ml-jku/MAE-CT).

{"state_dict": ..., "ctor_kwargs": ...}: the encoder alone, under timm's names, without positions of the class token.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family


def matches(view: View) -> bool:
    """A plain ViT alone under "state_dict", with its constructor's arguments beside it or positions of patches only."""
    names = view.tensors
    if not view.alone or not has_plain_vit(names) or not {"cls_token", "pos_embed"} <= names.keys():
        return False
    entries = names["pos_embed"].shape[1]
    free = math.isqrt(entries) ** 2 == entries and math.isqrt(entries - 1) ** 2 != entries - 1
    return free or any(path.startswith("ctor_kwargs.") for path in view.contents.facts)


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    return {"final_norm": True, "known_heads": view.contents.fact("attention_heads") or 0}


FAMILY = vit_family("mae_ct", matches, prepare=_prepare)
