"""DINOv2's own files (Oquab et al., arXiv 2304.07193; layout of github.com/facebookresearch/dinov2).

Hub files with and without registers, and training files {"teacher": ...} whose blocks may lie in chunks. The table
counts the class token and not the registers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family


def matches(view: View) -> bool:
    """A ViT with class token and registers, a mask token of two dimensions, or blocks in chunks."""
    names = view.tensors
    if view.contents.config is not None or not has_plain_vit(names) or "cls_token" not in names:
        return False
    mask, chunked = (
        names.get("mask_token"),
        any(name.split(".")[2].isdigit() for name in names if name[:7] == "blocks."),
    )
    return "register_tokens" in names or chunked or (mask is not None and mask.ndim == 2)


def free_registers(tensors: dict[str, Tensor]) -> None:
    """Registers have no positions, as in no table of timm that counts the class token: its entry goes to that token."""
    if {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        table = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
        tensors["pos_embed"] = table[:, 1:]


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    free_registers(tensors)
    return {"position_rule": "timm" if "reg_token" in tensors else "dino"}  # as the authors' hub has it


FAMILY = vit_family("dinov2", matches, prepare=_prepare, final_norm=True, heads={384: 6})
