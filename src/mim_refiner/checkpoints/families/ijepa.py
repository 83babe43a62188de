"""Files of I-JEPA (Assran et al., arXiv 2301.08243; layout of github.com/facebookresearch/ijepa).

{"encoder": ..., "target_encoder": ..., "predictor": ...}; no class token. The target encoder (a running average) is
the one that the authors evaluate.
"""

from __future__ import annotations

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import TIMM_NAMES, has_plain_vit, infer_structure
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD


def matches(view: View) -> bool:
    """A ViT without class token that is called encoder or target encoder."""
    named = {"encoder", "target_encoder"} & set(view.section.split("."))
    return bool(named) and has_plain_vit(view.tensors) and "cls_token" not in view.tensors


def convert(view: View, wishes: Wishes) -> Converted:
    mapped = TIMM_NAMES.to_timm(view.tensors)
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=True)
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, {"mask_token": "mask token of the predictor"}),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        position_rule="bicubic",
        pooling="mean",
        notes=vit.notes,
    )


FAMILY = Family("ijepa", PROJECTION, matches, convert)
