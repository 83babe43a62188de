"""One file per source format. To add a format: write its file with a ``FAMILY`` and list it below."""

from __future__ import annotations

from mim_refiner.checkpoints.families import (
    beit,
    beit2,
    capi,
    crossmae,
    data2vec2,
    dbot,
    hf_beit,
    hf_data2vec_vision,
    hf_dinov2,
    hf_ijepa,
    hf_vitmae,
    ibot,
    ijepa,
    mae,
    mim_refiner_format,
    simmim,
    timm_format,
)
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes

# Asked in this order: the most specific first, timm's own names last.
FAMILIES: tuple[Family, ...] = (
    mim_refiner_format.FAMILY,
    data2vec2.FAMILY,
    capi.FAMILY,
    hf_data2vec_vision.FAMILY,
    hf_beit.FAMILY,
    hf_dinov2.FAMILY,
    hf_ijepa.FAMILY,
    hf_vitmae.FAMILY,
    simmim.FAMILY,
    beit2.FAMILY,
    beit.FAMILY,
    ijepa.FAMILY,
    ibot.FAMILY,
    crossmae.FAMILY,
    dbot.FAMILY,
    mae.FAMILY,
    timm_format.FAMILY,
)
FAMILY_BY_NAME = {family.name: family for family in FAMILIES}

__all__ = ["FAMILIES", "FAMILY_BY_NAME", "Converted", "Family", "View", "Wishes"]
