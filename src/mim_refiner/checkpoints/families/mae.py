"""Files of masked autoencoders (He et al., arXiv 2111.06377; layout of github.com/facebookresearch/mae).

Published encoder-only files and fine-tuned ones {"model": ...}, files with decoder, linear probes, and training
checkpoints with optimiser and options. The encoder's names are timm's. The same layout have MAE-Lite, RETFound,
SSL4EO-S12 (13 bands), SatMAE for RGB, AudioMAE and MSM-MAE (one channel, no square; biases of query and value only).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import TIMM_NAMES, has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.types import BackboneInfo


def has_decoder(view: View) -> bool:
    """Whether a reconstructing decoder with a mask token lies beside a plain ViT."""
    names = view.tensors
    decoder = any(name.startswith(("decoder_blocks.", "decoder_embed.", "decoder_pos_embed")) for name in names)
    return has_plain_vit(names) and any(name.startswith("mask_token") for name in names) and decoder


def matches(view: View) -> bool:
    """A plain ViT that comes with MAE's decoder, or alone under "model" and with a class token, as published files are.

    A ViT under "model" with a classifier of one layer but without ``fc_norm`` is not MAE's (DeiT's files look so).
    """
    names = view.tensors
    if view.contents.config is not None or not has_plain_vit(names):
        return False
    plain = "cls_token" in names and "reg_token" not in names and "blocks.0.ls1.gamma" not in names
    published = view.section == "model" and plain
    return has_decoder(view) or (published and ("head.weight" not in names or "fc_norm.weight" in names))


def prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, bool | None]:
    """Every file has the final norm or that after pooling; one without either is incomplete."""
    return {"final_norm": None if "fc_norm.weight" in tensors else True}


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """The state dict under "model" of a published encoder-only file."""
    return TIMM_NAMES.from_timm(state)


FAMILY = vit_family("mae", matches, prepare=prepare, to_source=to_source)
