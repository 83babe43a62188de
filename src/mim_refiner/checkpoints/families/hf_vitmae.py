"""Hugging Face transformers: ViTMAE, and ViT, which has the same encoder. Encoder only or with decoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import infer_structure
from mim_refiner.types import BackboneInfo


def matches(view: View) -> bool:
    """A ViT with class token and all three biases; a config.json, if any, says vit_mae or vit."""
    known = hf.is_kind(view, "vit_mae") or hf.is_kind(view, "vit")
    return known and "embeddings.cls_token" in view.tensors and not hf.has_query_bias_only(view)


def convert(view: View, wishes: Wishes) -> Converted:
    hf.check_activation(view)
    mapped = hf.VIT_KEYS.to_timm(view.tensors)
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=True, **hf.facts(view))
    is_mae = view.model_type == "vit_mae" or any(name.startswith("decoder.") for name in view.outside)
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, hf.DROPPED),
        **hf.mean_and_std(view),
        family=None if is_mae else "hf_vit",
        norm_eps=hf.norm_eps(view),
        position_rule="hf",
        notes=vit.notes,
    )


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """State dict of a ViTMAEModel file (no prefix)."""
    return hf.VIT_KEYS.from_timm(state)


FAMILY = Family("hf_vitmae", hf.ANCHOR, matches, convert, to_source)
