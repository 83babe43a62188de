"""One file per source format. To add a format: write its file with a ``FAMILY`` and list it below."""

from __future__ import annotations

from mim_refiner.checkpoints.families import (
    beit,
    beit_kin,
    bird_mae,
    capi,
    crossmae,
    data2vec2,
    dbot,
    dinov2,
    hf_beit,
    hf_dinov2,
    hf_ijepa,
    hf_vitmae,
    ibot,
    ijepa,
    mae,
    mae_ct,
    mae_pytorch,
    mim_refiner_format,
    mmpretrain,
    multimae,
    prithvi,
    refused,
    scale_mae,
    swin,
    timm_format,
    tinymim,
    vitpose,
)
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes

# Asked in this order: the most specific first, timm's own names last.
FAMILIES: tuple[Family, ...] = (
    mim_refiner_format.FAMILY,
    data2vec2.FAMILY,
    capi.FAMILY,
    multimae.FAMILY,
    mmpretrain.BEIT,
    mmpretrain.VIT,
    swin.MM_FAMILY,
    swin.FAMILY,
    prithvi.FAMILY,
    mae_pytorch.FAMILY,
    vitpose.FAMILY,
    vitpose.HF,
    hf_beit.DATA2VEC,
    hf_beit.FAMILY,
    hf_dinov2.FAMILY,
    hf_ijepa.FAMILY,
    hf_vitmae.FAMILY,
    beit_kin.SIMMIM,
    beit_kin.CAE,
    beit_kin.EVA01,
    beit_kin.BEIT2,
    beit.FAMILY,
    ijepa.FAMILY,
    dinov2.FAMILY,
    bird_mae.FAMILY,
    mae_ct.FAMILY,
    ibot.FAMILY,
    crossmae.FAMILY,
    dbot.FAMILY,
    scale_mae.FAMILY,
    tinymim.FAMILY,
    mae.FAMILY,
    timm_format.FAMILY,
)
ASKED = (*refused.FAMILIES, *FAMILIES)  # with those that are refused by name
FAMILY_BY_NAME = {family.name: family for family in FAMILIES}

__all__ = ["ASKED", "FAMILIES", "FAMILY_BY_NAME", "Converted", "Family", "View", "Wishes"]
