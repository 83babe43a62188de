"""MAE and BEiT as mmpretrain and mmselfsup write them (layout of github.com/open-mmlab/mmpretrain)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.keymap import ZEROS, KeyMap, Template
from mim_refiner.checkpoints.families.plain_vit import make_family

ANCHOR = "patch_embed.projection.weight"
_LAYER = "layers.{i}."
_COMMON: list[tuple[Template, str]] = [
    ("patch_embed.projection.{p}", "patch_embed.proj.{p}"),
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    ("ln1.{p}", "norm.{p}"),
    ("norm1.{p}", "norm.{p}"),
    ("ln2.{p}", "fc_norm.{p}"),
    *((f"{_LAYER}{kind}{n}.{{p}}", f"blocks.{{i}}.norm{n}.{{p}}") for n in (1, 2) for kind in ("ln", "norm")),
    (f"{_LAYER}attn.proj.{{p}}", "blocks.{i}.attn.proj.{p}"),
    (f"{_LAYER}ffn.layers.0.0.{{p}}", "blocks.{i}.mlp.fc1.{p}"),
    (f"{_LAYER}ffn.layers.1.{{p}}", "blocks.{i}.mlp.fc2.{p}"),
    (f"{_LAYER}attn.qkv.{{p}}", "blocks.{i}.attn.qkv.{p}"),
]
_TABLE = "relative_position_bias_table"
VIT_KEYS = KeyMap(
    [
        *_COMMON,
        ((f"{_LAYER}attn.q_bias", ZEROS, f"{_LAYER}attn.v_bias"), "blocks.{i}.attn.qkv.bias"),
        (f"{_LAYER}attn.gamma1.weight", "blocks.{i}.ls1.gamma"),
        (f"{_LAYER}ffn.gamma2.weight", "blocks.{i}.ls2.gamma"),
    ]
)
BEIT_KEYS = KeyMap(
    [
        *_COMMON,
        *((f"{_LAYER}{name}", "blocks.{i}." + name) for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")),
        (f"{_LAYER}attn.{_TABLE}", "blocks.{i}.attn." + _TABLE),
        (f"rel_pos_bias.{_TABLE}", f"rel_pos_bias.{_TABLE}"),
    ]
)
_DROPPED = {"target_generator.": "makes the targets of the pre-training"}


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    return {"final_norm": None if "fc_norm.weight" in tensors else True, **_mean_and_std(view)}


def _mean_and_std(view: View) -> dict[str, Any]:
    """Those of the file, where it keeps them (0-255)."""
    section = view.contents.sections[view.section]
    found = {key: section.get(view.beside.get(f"data_preprocessor.{key}", "")) for key in ("mean", "std")}
    if any(tensor is None or not bool(tensor.any()) for tensor in found.values()):
        return {}
    return {key: tuple((tensor.flatten() / 255).tolist()) for key, tensor in found.items() if tensor is not None}


def _prepare_beit(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    """ImageNet's mean and std in pre-training, 0.5 in fine-tuning."""
    usual = beit.HALF if "fc_norm.weight" in tensors else {}
    return usual | beit.prepare(view, tensors, wishes) | _mean_and_std(view)


VIT = make_family(
    "mmpretrain",
    lambda view: "layers.0.attn.qkv.weight" in view.tensors,
    to_timm=VIT_KEYS.to_timm,
    anchor=ANCHOR,
    dropped=_DROPPED,
    prepare=_prepare,
    heads={192: 3, 384: 6},
)
BEIT = make_family(  # asked before VIT
    "mmpretrain_beit",
    lambda view: {"layers.0.attn.q_bias", "cls_token"} <= view.tensors.keys(),
    to_timm=BEIT_KEYS.to_timm,
    infer=beit.infer_beit,
    anchor=ANCHOR,
    dropped=_DROPPED,
    prepare=_prepare_beit,
)
