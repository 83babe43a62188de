"""Hugging Face transformers: ViTMAE, and ViT and ViTMSN, which have the same encoder. Encoder only or with decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.types import BackboneInfo


def matches(view: View) -> bool:
    """A ViT with class token and all three biases; a config.json, if any, says vit_mae, vit or vit_msn."""
    known = any(hf.is_kind(view, kind) for kind in ("vit_mae", "vit", "vit_msn"))
    return known and "embeddings.cls_token" in view.tensors and not hf.has_query_bias_only(view)


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    is_mae = view.model_type == "vit_mae" or any(name.startswith("decoder.") for name in view.beside)
    return hf.said(view) | {"family": None if is_mae else "hf_vit"}


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """State dict of a ViTMAEModel file (no prefix)."""
    return hf.VIT_KEYS.from_timm(state)


FAMILY = hf.family("hf_vitmae", matches, prepare=_prepare, to_source=to_source)
