"""Formats of Hugging Face transformers (blocks as version 4 and 5 name them), with their configs and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes
from mim_refiner.checkpoints.families.beit import HALF, infer_beit
from mim_refiner.checkpoints.families.keymap import KeyMap, Template
from mim_refiner.checkpoints.families.mae import free_registers
from mim_refiner.checkpoints.families.plain_vit import make_family
from mim_refiner.errors import CheckpointError

ANCHOR = "embeddings.patch_embeddings.projection.weight"
NORM_EPS = 1e-12  # default of every transformers ViT; 4e-6 off in the features with timm's 1e-6

# Files (of every version) and state dicts in memory of version 4 | state dicts in memory of version 5.
_OLD, _NEW = "encoder.layer.{i}.", "layers.{i}."
_COMMON: list[tuple[Template, str]] = [
    ("embeddings.patch_embeddings.projection.{p}", "patch_embed.proj.{p}"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("layernorm.{p}", "norm.{p}"),
    *((f"{source}.{{p}}", f"blocks.{{i}}.{target}.{{p}}") for target, old, new in (
        ("norm1", "layernorm_before", "layernorm_before"),
        ("norm2", "layernorm_after", "layernorm_after"),
        ("attn.proj", "attention.output.dense", "attention.o_proj"),
        ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
        ("mlp.fc2", "output.dense", "mlp.fc2"),
    ) for source in (_OLD + old, _NEW + new)),
]  # fmt: skip
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


def has_query_bias_only(view: View) -> bool:
    """Whether the attention has BEiT's biases (query and value) and not the key's."""
    return any(name.endswith((".query.bias", ".q_proj.bias")) for name in view.tensors) and not any(
        name.endswith((".key.bias", ".k_proj.bias")) for name in view.tensors
    )


def is_kind(view: View, *model_types: str) -> bool:
    """Whether a config.json beside the weights says one of ``model_types``; True where there is none."""
    return view.config is None or view.model_type in model_types


def said(view: View, *_: Any, default_eps: float = NORM_EPS) -> dict[str, Any]:
    """What the configs beside a ViT say, for :func:`make_family`; CheckpointError for an activation that timm lacks."""
    config = view.config or {}
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{view.where}: its config says hidden_act '{activation}'; choose one with gelu")
    size, heads = config.get("image_size"), config.get("num_attention_heads")
    return {
        "known_heads": heads if isinstance(heads, int) else 0,
        "known_size": (size, size) if isinstance(size, int) else tuple(size) if size else None,
        "norm_eps": float(config.get("layer_norm_eps", default_eps)),
        **mean_and_std(view),
    }


def mean_and_std(view: View) -> dict[str, Any]:
    """Fields mean and std where preprocessor_config.json says them."""
    found: Mapping[str, Any] = (view.config or {}).get("preprocessor") or {}
    return {field: tuple(found[f"image_{field}"]) for field in ("mean", "std") if found.get(f"image_{field}")}


def _family(name: str, matches: Callable[[View], bool], keys: KeyMap = VIT_KEYS, **options: Any) -> Family:
    """``options`` as of :func:`make_family`."""
    given: dict[str, Any] = {"prepare": said, "position_rule": "hf"} | options
    return make_family(name, matches, to_timm=keys.to_timm, anchor=ANCHOR, **given)


# --- ViTMAE, and ViT and ViTMSN, which have the same encoder, encoder only or with decoder; I-JEPA, without class token


def _is_vitmae(view: View) -> bool:
    """A ViT with class token and all three biases; a config.json, if any, says vit_mae, vit or vit_msn."""
    known = is_kind(view, "vit_mae", "vit", "vit_msn") and "embeddings.cls_token" in view.tensors
    return known and not has_query_bias_only(view)


def _prepare_vitmae(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    is_mae = view.model_type == "vit_mae" or any(name.startswith("decoder.") for name in view.beside)
    return said(view) | {"family": None if is_mae else "hf_vit"}


VITMAE = _family("hf_vitmae", _is_vitmae, prepare=_prepare_vitmae, final_norm=True)
IJEPA = _family(
    "hf_ijepa",
    lambda view: is_kind(view, "ijepa") and "embeddings.cls_token" not in view.tensors,
    pooling="mean",
    final_norm=True,
)

# --- DINOv2, with and without registers (our exports of ViTs with layer scale or registers)

DINOV2_KEYS = KeyMap(
    [
        ("embeddings.register_tokens", "reg_token"),
        *((f"{_OLD}norm{n}.{{p}}", f"blocks.{{i}}.norm{n}.{{p}}") for n in (1, 2)),
        *((f"{_OLD}layer_scale{n}.lambda1", f"blocks.{{i}}.ls{n}.gamma") for n in (1, 2)),
        *((f"{_OLD}mlp.fc{n}.{{p}}", f"blocks.{{i}}.mlp.fc{n}.{{p}}") for n in (1, 2)),
        (_OLD + "mlp.weights_in.{p}", "blocks.{i}.mlp.fc1.{p}"),  # SwiGLU of the giant one
        (_OLD + "mlp.weights_out.{p}", "blocks.{i}.mlp.fc2.{p}"),
        *VIT_RULES,
    ]
)


def _prepare_dinov2(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    free_registers(tensors)
    return said(view, default_eps=1e-6) | {"position_rule": "timm" if "reg_token" in tensors else "hf"}


DINOV2 = _family(
    "hf_dinov2",
    lambda view: (
        is_kind(view, "dinov2", "dinov2_with_registers") and "encoder.layer.0.layer_scale1.lambda1" in view.tensors
    ),
    DINOV2_KEYS,
    prepare=_prepare_dinov2,
    final_norm=True,
)

# --- BEiT with relative tables shared or per block, or absolute positions; Data2VecVision, the first data2vec, has
# BEiT's architecture and names


def _prepare_beit(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    # A model that pools by the mean has its norm in the pooler, and none without pooler.
    mean_pooling = (view.config or {}).get("use_mean_pooling", True)
    has_norm = any(name.startswith(("norm.", "fc_norm.")) for name in tensors)
    without = ("norm", "fc_norm") if mean_pooling and not has_norm else ()
    return said(view) | {"without": without, "pooling": "mean" if mean_pooling else "cls"}


def _convert_beit(view: View, wishes: Wishes) -> Converted:
    outer = {short: name for short, name in view.beside.items() if short.startswith("layernorm.")}
    if outer and "layernorm.weight" not in view.tensors:  # in BeitForMaskedImageModeling it lies outside "beit."
        section = view.contents.sections[view.section]
        view = replace(
            view,
            tensors=view.tensors | {short: section[name] for short, name in outer.items()},
            names=view.names | outer,
        )
    found = _BEIT.convert(view, wishes)
    # transformers reads a relative table columns first, which matters where the image is no square.
    height, width = found.arguments["img_size"]
    relative = any(name.endswith("relative_position_bias_table") for name in found.tensors)
    return replace(found, position_rule="hf_transposed") if relative and height != width else found


_BEIT = _family(
    "hf_beit",
    lambda view: is_kind(view, "beit") and has_query_bias_only(view),
    BEIT_KEYS,
    infer=infer_beit,
    prepare=_prepare_beit,
    **HALF,
)
BEIT = replace(_BEIT, convert=_convert_beit)
DATA2VEC = replace(  # told by its config.json, else by the prefix of its task models
    BEIT,
    name="hf_data2vec_vision",
    matches=lambda view: (
        has_query_bias_only(view) and "data2vec-vision" in (view.model_type or view.prefix.replace("_", "-")).split(".")
    ),
)
