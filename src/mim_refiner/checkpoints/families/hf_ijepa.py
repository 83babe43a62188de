"""Hugging Face transformers: I-JEPA (no class token)."""

from __future__ import annotations

from mim_refiner.checkpoints.families import hf, hf_vitmae
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import infer_structure


def matches(view: View) -> bool:
    """A ViT without class token; a config.json, if any, says ijepa."""
    return hf.is_kind(view, "ijepa") and "embeddings.cls_token" not in view.tensors


def convert(view: View, wishes: Wishes) -> Converted:
    hf.check_activation(view)
    mapped = hf.VIT_KEYS.to_timm(view.tensors)
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=True, **hf.facts(view))
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, hf.DROPPED),
        **hf.mean_and_std(view),
        norm_eps=hf.norm_eps(view),
        position_rule="hf",
        pooling="mean",
        notes=vit.notes,
    )


FAMILY = Family("hf_ijepa", hf.ANCHOR, matches, convert, hf_vitmae.to_source)
