"""What the Hugging Face transformers formats share: names of blocks (version 4 and 5), configs, preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import base
from mim_refiner.checkpoints.families.base import Family, View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap, Template
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

ANCHOR = "embeddings.patch_embeddings.projection.weight"
NORM_EPS = 1e-12  # default of every transformers ViT; 4e-6 off in the features with timm's 1e-6

# Files (of every version) and state dicts in memory of version 4 | state dicts in memory of version 5.
_OLD, _NEW = "encoder.layer.{i}.", "layers.{i}."
_COMMON: list[tuple[Template, str]] = [
    ("embeddings.patch_embeddings.projection.{p}", "patch_embed.proj.{p}"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm.{p}", "norm.{p}"),
    (_OLD + "layernorm_before.{p}", "blocks.{i}.norm1.{p}"),
    (_NEW + "layernorm_before.{p}", "blocks.{i}.norm1.{p}"),
    (_OLD + "layernorm_after.{p}", "blocks.{i}.norm2.{p}"),
    (_NEW + "layernorm_after.{p}", "blocks.{i}.norm2.{p}"),
    (_OLD + "attention.output.dense.{p}", "blocks.{i}.attn.proj.{p}"),
    (_NEW + "attention.o_proj.{p}", "blocks.{i}.attn.proj.{p}"),
    (_OLD + "intermediate.dense.{p}", "blocks.{i}.mlp.fc1.{p}"),
    (_NEW + "mlp.fc1.{p}", "blocks.{i}.mlp.fc1.{p}"),
    (_OLD + "output.dense.{p}", "blocks.{i}.mlp.fc2.{p}"),
    (_NEW + "mlp.fc2.{p}", "blocks.{i}.mlp.fc2.{p}"),
]
_OLD_QKV = tuple(f"{_OLD}attention.attention.{name}." for name in ("query", "key", "value"))
_NEW_QKV = tuple(f"{_NEW}attention.{name}_proj." for name in "qkv")

VIT_RULES = [
    *_COMMON,
    *((tuple(name + "{p}" for name in qkv), "blocks.{i}.attn.qkv.{p}") for qkv in (_OLD_QKV, _NEW_QKV)),
]
VIT_KEYS = KeyMap(VIT_RULES)
_TABLE = "relative_position_bias.relative_position_bias_table"
BEIT_KEYS = KeyMap(
    [
        *_COMMON,
        (tuple(name + "weight" for name in _OLD_QKV), "blocks.{i}.attn.qkv.weight"),
        (tuple(name + "weight" for name in _NEW_QKV), "blocks.{i}.attn.qkv.weight"),
        *((qkv[0] + "bias", "blocks.{i}.attn.q_bias") for qkv in (_OLD_QKV, _NEW_QKV)),
        *((qkv[2] + "bias", "blocks.{i}.attn.v_bias") for qkv in (_OLD_QKV, _NEW_QKV)),
        *((f"{start}lambda_{n}", f"blocks.{{i}}.gamma_{n}") for n in (1, 2) for start in (_OLD, _NEW)),
        (f"{_OLD}attention.attention.{_TABLE}", "blocks.{i}.attn.relative_position_bias_table"),
        (f"{_NEW}{_TABLE}", "blocks.{i}.attn.relative_position_bias_table"),
        (f"encoder.{_TABLE}", "rel_pos_bias.relative_position_bias_table"),
        ("shared_position_bias.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"),
        ("pooler.layernorm.{p}", "fc_norm.{p}"),
    ]
)
DROPPED = base.DROPPED | {"pooler.dense.": "pooler of the classifier"}


def has_query_bias_only(view: View) -> bool:
    """Whether the attention has BEiT's biases (query and value) and not the key's."""
    return any(name.endswith((".query.bias", ".q_proj.bias")) for name in view.tensors) and not any(
        name.endswith((".key.bias", ".k_proj.bias")) for name in view.tensors
    )


def is_kind(view: View, model_type: str) -> bool:
    """Whether a config.json beside the weights says ``model_type``; True where there is none."""
    return view.contents.config is None or view.model_type == model_type


def facts(view: View) -> dict[str, Any]:
    """``known_heads`` and ``known_size`` of the config.json, empty without one."""
    config = view.contents.config
    if config is None:
        return {}
    size = config.get("image_size")
    heads = config.get("num_attention_heads")
    return {
        "known_heads": heads if isinstance(heads, int) else 0,
        "known_size": (size, size) if isinstance(size, int) else tuple(size) if size else None,
    }


def norm_eps(view: View, default: float = NORM_EPS) -> float:
    return float((view.contents.config or {}).get("layer_norm_eps", default))


def said(view: View, default_eps: float = NORM_EPS) -> dict[str, Any]:
    """What the configs beside a ViT say, for :func:`vit_family`; CheckpointError for an activation that timm lacks."""
    check_activation(view)
    return facts(view) | mean_and_std(view) | {"norm_eps": norm_eps(view, default_eps)}


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    return said(view)


def family(name: str, matches: Callable[[View], bool], **options: Any) -> Family:
    """A family of plain ViTs of transformers; ``options`` as of :func:`vit_family`."""
    given: dict[str, Any] = {"keys": VIT_KEYS, "prepare": _prepare, "position_rule": "hf"} | options
    return vit_family(name, matches, anchor=ANCHOR, dropped=DROPPED, final_norm=True, **given)


def mean_and_std(
    view: View, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> dict[str, Any]:
    """Fields mean and std: those of preprocessor_config.json, else the defaults given."""
    found: Mapping[str, Any] = (view.contents.config or {}).get("preprocessor") or {}
    return {"mean": tuple(found.get("image_mean") or mean), "std": tuple(found.get("image_std") or std)}


def check_activation(view: View) -> None:
    """CheckpointError for an activation that timm's blocks do not have."""
    activation = (view.contents.config or {}).get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"{view.where}: its config says hidden_act '{activation}'; choose one with gelu")
