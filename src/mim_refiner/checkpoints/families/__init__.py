"""The source formats. To add one: write its ``Family``, and list it below."""

from __future__ import annotations

from mim_refiner.checkpoints.families import beit, described, hf, mae, mmpretrain, renamed
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes

# Asked in this order: the most specific first, timm's own names last.
FAMILIES: tuple[Family, ...] = (
    renamed.MIM_REFINER, renamed.DATA2VEC2, renamed.CAPI, renamed.MULTIMAE,
    mmpretrain.BEIT, mmpretrain.VIT, mmpretrain.MM_SWIN, mmpretrain.SWIN, renamed.PRITHVI, mae.MAE_PYTORCH,
    renamed.VITPOSE, renamed.HF_VITPOSE, hf.DATA2VEC, hf.BEIT, hf.DINOV2, hf.IJEPA, hf.VITMAE,
    beit.SIMMIM, beit.CAE, beit.EVA01, beit.BEIT2, beit.BEIT,
    mae.IJEPA, mae.DINOV2, mae.BIRD_MAE, mae.MAE_CT, mae.IBOT,
    mae.CROSSMAE, mae.DBOT, mae.SCALE_MAE, mae.TINYMIM, mae.MAE, described.TIMM,
)  # fmt: skip

__all__ = ["FAMILIES", "Converted", "Family", "View", "Wishes"]
