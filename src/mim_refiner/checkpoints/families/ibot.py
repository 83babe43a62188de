"""Files of iBOT and DINO (arXiv 2111.07832, 2104.14294; layouts of github.com/bytedance/ibot, facebookresearch/dino).

Training checkpoints {"student": ..., "teacher": ...}, and iBOT's extracted teacher, a plain ViT alone under
"state_dict". The teacher (a running average) is the one that the authors evaluate. Position tables are resized with
DINO's offset of 0.1.
"""

from __future__ import annotations

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import VIT_NAMES, has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family

HEADS = {192: 3, 384: 6}


def matches(view: View) -> bool:
    """A ViT with class token called student or teacher, or alone in the file under "state_dict" without classifier."""
    names = view.tensors
    if view.contents.config is not None or not has_plain_vit(names) or "cls_token" not in names:
        return False
    if {"student", "teacher"} & {*view.section.split("."), *view.prefix.split(".")}:
        return True
    bare = view.alone and not view.contents.facts
    return bare and all(VIT_NAMES.knows(name) for name in names) and "reg_token" not in names


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, str | None]:
    """A training file in which no encoder has a mask token is DINO's, not iBOT's."""
    sections = view.contents.sections
    masks = set(sections) == {"state_dict"} or any(
        name.endswith(("masked_embed", "mask_token")) for names in sections.values() for name in names
    )
    return {"family": None if masks else "dino"}


FAMILY = vit_family("ibot", matches, prepare=_prepare, final_norm=True, position_rule="dino", heads=HEADS)
