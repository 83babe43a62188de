"""Hugging Face transformers: DINOv2, with and without registers (our exports of ViTs with layer scale or registers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.dinov2 import free_registers
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.types import BackboneInfo

_BLOCK = "encoder.layer.{i}."
_KEYS = KeyMap(
    [
        ("embeddings.patch_embeddings.projection.{p}", "patch_embed.proj.{p}"),
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.register_tokens", "reg_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("layernorm.{p}", "norm.{p}"),
        (_BLOCK + "norm1.{p}", "blocks.{i}.norm1.{p}"),
        (_BLOCK + "norm2.{p}", "blocks.{i}.norm2.{p}"),
        (
            tuple(f"{_BLOCK}attention.attention.{name}.{{p}}" for name in ("query", "key", "value")),
            "blocks.{i}.attn.qkv.{p}",
        ),
        (_BLOCK + "attention.output.dense.{p}", "blocks.{i}.attn.proj.{p}"),
        (_BLOCK + "layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
        (_BLOCK + "layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
        (_BLOCK + "mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}"),
        (_BLOCK + "mlp.fc2.{p}", "blocks.{i}.mlp.fc2.{p}"),
        (_BLOCK + "mlp.weights_in.{p}", "blocks.{i}.mlp.fc1.{p}"),  # SwiGLU of the giant one
        (_BLOCK + "mlp.weights_out.{p}", "blocks.{i}.mlp.fc2.{p}"),
    ]
)
_TYPES = ("dinov2", "dinov2_with_registers")


def matches(view: View) -> bool:
    """Layer scale under DINOv2's name; a config.json, if any, says dinov2."""
    known = view.contents.config is None or view.model_type in _TYPES
    return known and "encoder.layer.0.layer_scale1.lambda1" in view.tensors


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    free_registers(tensors)
    return hf.said(view, 1e-6) | {"position_rule": "timm" if "reg_token" in tensors else "hf"}


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """State dict of a Dinov2Model or Dinov2WithRegistersModel file; the table of ``state`` counts the class token."""
    mask = torch.zeros(1, info.embed_dim)  # the model has it and does not use it
    return {**_KEYS.from_timm(state), "embeddings.mask_token": mask}


FAMILY = hf.family("hf_dinov2", matches, keys=_KEYS, prepare=_prepare, to_source=to_source)
