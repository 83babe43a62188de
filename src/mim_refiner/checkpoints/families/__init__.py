"""The source formats. To add one: write its ``Family``, and list it below."""

from __future__ import annotations

from mim_refiner.checkpoints.families import (
    beit,
    capi,
    distilled,
    hf,
    mae,
    mim_refiner_format,
    mmpretrain,
    refused,
    renamed,
    swin,
    timm_format,
)
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes

# Asked in this order: the most specific first, timm's own names last.
FAMILIES: tuple[Family, ...] = (
    mim_refiner_format.FAMILY, renamed.DATA2VEC2, capi.FAMILY, renamed.MULTIMAE,
    mmpretrain.BEIT, mmpretrain.VIT, swin.MM_FAMILY, swin.FAMILY, renamed.PRITHVI, mae.MAE_PYTORCH,
    renamed.VITPOSE, renamed.HF_VITPOSE, hf.DATA2VEC, hf.BEIT, hf.DINOV2, hf.IJEPA, hf.VITMAE,
    beit.SIMMIM, beit.CAE, beit.EVA01, beit.BEIT2, beit.BEIT,
    distilled.IJEPA, distilled.DINOV2, mae.BIRD_MAE, mae.MAE_CT, distilled.IBOT,
    mae.CROSSMAE, mae.DBOT, mae.SCALE_MAE, mae.TINYMIM, mae.MAE, timm_format.FAMILY,
)  # fmt: skip
ASKED = (*refused.FAMILIES, *FAMILIES)  # with those that are refused by name
FAMILY_BY_NAME = {family.name: family for family in FAMILIES}

__all__ = ["ASKED", "FAMILIES", "FAMILY_BY_NAME", "Converted", "Family", "View", "Wishes"]
