"""Plain ViTs that learnt from a teacher of their own kind: DINO, iBOT, DINOv2 and I-JEPA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import VIT_NAMES, has_plain_vit, is_bare_vit, make_family

# --- iBOT and DINO (arXiv 2111.07832, 2104.14294; github.com/bytedance/ibot, facebookresearch/dino): training
# checkpoints {"student": ..., "teacher": ...}, and iBOT's extracted teacher, a plain ViT alone under "state_dict". The
# teacher (a running average) is the one that the authors evaluate. Tables are resized with DINO's offset of 0.1.


def _is_ibot(view: View) -> bool:
    """A ViT with class token called student or teacher, or alone in the file under "state_dict" without classifier."""
    names = view.tensors
    if not is_bare_vit(view) or "cls_token" not in names:
        return False
    if {"student", "teacher"} & {*view.section.split("."), *view.prefix.split(".")}:
        return True
    bare = view.alone and not view.contents.facts
    return bare and all(VIT_NAMES.knows(name) for name in names) and "reg_token" not in names


def _prepare_ibot(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, str | None]:
    """A training file in which no encoder has a mask token is DINO's, not iBOT's."""
    sections = view.contents.sections
    masks = set(sections) == {"state_dict"} or any(
        name.endswith(("masked_embed", "mask_token")) for names in sections.values() for name in names
    )
    return {"family": None if masks else "dino"}


_HEADS = {192: 3, 384: 6}
IBOT = make_family("ibot", _is_ibot, prepare=_prepare_ibot, final_norm=True, position_rule="dino", heads=_HEADS)

# --- DINOv2's own files (Oquab et al., arXiv 2304.07193; github.com/facebookresearch/dinov2): hub files with and
# without registers, and training files {"teacher": ...} whose blocks may lie in chunks. The table counts the class
# token and not the registers.


def _is_dinov2(view: View) -> bool:
    """A ViT with class token and registers, a mask token of two dimensions, or blocks in chunks."""
    names = view.tensors
    if not is_bare_vit(view) or "cls_token" not in names:
        return False
    mask, chunked = names.get("mask_token"), any(n.split(".")[2].isdigit() for n in names if n[:7] == "blocks.")
    return "register_tokens" in names or chunked or (mask is not None and mask.ndim == 2)


def free_registers(tensors: dict[str, Tensor]) -> None:
    """Registers have no positions, as in no table of timm that counts the class token: its entry goes to that token."""
    if {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        table = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
        tensors["pos_embed"] = table[:, 1:]


def _prepare_dinov2(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    free_registers(tensors)
    return {"position_rule": "timm" if "reg_token" in tensors else "dino"}  # as the authors' hub has it


DINOV2 = make_family("dinov2", _is_dinov2, prepare=_prepare_dinov2, final_norm=True, heads={384: 6})

# --- I-JEPA (Assran et al., arXiv 2301.08243; github.com/facebookresearch/ijepa): {"encoder": ..., "target_encoder":
# ..., "predictor": ...}; no class token. The target encoder (a running average) is the one that the authors evaluate.


IJEPA = make_family(
    "ijepa",
    lambda view: (
        not {"encoder", "target_encoder"}.isdisjoint(view.section.split("."))
        and has_plain_vit(view.tensors)
        and "cls_token" not in view.tensors
    ),
    final_norm=True,
    pooling="mean",
    heads=_HEADS,
)
