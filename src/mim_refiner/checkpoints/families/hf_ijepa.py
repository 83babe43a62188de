"""Hugging Face transformers: I-JEPA (no class token)."""

from __future__ import annotations

from mim_refiner.checkpoints.families import hf, hf_vitmae
from mim_refiner.checkpoints.families.base import View


def matches(view: View) -> bool:
    """A ViT without class token; a config.json, if any, says ijepa."""
    return hf.is_kind(view, "ijepa") and "embeddings.cls_token" not in view.tensors


FAMILY = hf.family("hf_ijepa", matches, to_source=hf_vitmae.to_source, pooling="mean")
