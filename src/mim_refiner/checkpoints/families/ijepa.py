"""Files of I-JEPA (Assran et al., arXiv 2301.08243; layout of github.com/facebookresearch/ijepa).

{"encoder": ..., "target_encoder": ..., "predictor": ...}; no class token. The target encoder (a running average) is
the one that the authors evaluate.
"""

from __future__ import annotations

from mim_refiner.checkpoints.families.base import View
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family


def matches(view: View) -> bool:
    """A ViT without class token that is called encoder or target encoder."""
    named = {"encoder", "target_encoder"} & set(view.section.split("."))
    return bool(named) and has_plain_vit(view.tensors) and "cls_token" not in view.tensors


FAMILY = vit_family("ijepa", matches, final_norm=True, pooling="mean", heads={192: 3, 384: 6})
