"""Files of iBOT and DINO (arXiv 2111.07832, 2104.14294; layouts of github.com/bytedance/ibot, facebookresearch/dino).

Training checkpoints {"student": ..., "teacher": ...}, and iBOT's extracted teacher, a plain ViT alone under
"state_dict". The teacher (a running average) is the one that the authors evaluate. Position tables are resized with
DINO's offset of 0.1.
"""

from __future__ import annotations

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import TIMM_NAMES, has_plain_vit, infer_structure
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

_DROPPED = {
    "masked_embed": "mask token, used only in training",
    "mask_token": "mask token, used only in training",
    "head.": "projection head of the self-distillation",
}


def matches(view: View) -> bool:
    """A ViT with class token called student or teacher, or alone in the file under "state_dict" without classifier."""
    names = view.tensors
    if view.contents.config is not None or not has_plain_vit(names) or "cls_token" not in names:
        return False
    if {"student", "teacher"} & {*view.section.split("."), *view.prefix.split(".")}:
        return True
    alone = set(view.contents.sections) == {"state_dict"} and not view.prefix
    return alone and set(names) == set(TIMM_NAMES.to_timm(names).origin) and "reg_token" not in names


def convert(view: View, wishes: Wishes) -> Converted:
    mapped = TIMM_NAMES.to_timm(view.tensors)
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=True)
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, _DROPPED),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        family=None if _masks(view) else "dino",
        position_rule="dino",
        notes=vit.notes,
    )


def _masks(view: View) -> bool:
    """False for a training file in which no encoder has a mask token: that is DINO's, not iBOT's."""
    sections = view.contents.sections
    return set(sections) == {"state_dict"} or any(
        name.endswith(("masked_embed", "mask_token")) for names in sections.values() for name in names
    )


FAMILY = Family("ibot", PROJECTION, matches, convert)
