"""Plain ViTs under names of their own, or with patches, tables or a padding that timm's has not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.families.base import GUESS, PROJECTION, Converted, View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import (
    PARTS,
    choose_heads,
    has_plain_vit,
    is_encoder_name,
    make_family,
    size_arguments,
)
from mim_refiner.errors import CheckpointError

# --- Released MIM-Refiner files (layout of github.com/ml-jku/MIM-Refiner): {"state_dict": ...}, pre- or post-norm.
# The position table is a buffer [1, rows, columns, width] without an entry for the class token; at other resolutions it
# is resized bicubically without antialiasing.

_RENAMED = {"cls_token": "cls_tokens.tokens", "pos_embed": "pos_embed.embed"}
REFINER_KEYS = KeyMap(
    [*((source, timm) for timm, source in _RENAMED.items()), ("embed_norm.{p}", "norm_pre.{p}")],
    same=lambda name: is_encoder_name(name) and name not in _RENAMED and not name.startswith("norm_pre."),
)


def _prepare_refiner(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table = tensors["pos_embed"]
    if table.ndim != 4:
        raise CheckpointError(f"{view.where}: pos_embed.embed is {list(table.shape)}, not 4-d; save it again")
    patch, post_norm = tensors[PROJECTION].shape[2:], "norm_pre.weight" in tensors
    tensors["pos_embed"] = table.flatten(1, 2)
    return {
        "final_norm": not post_norm,
        "known_heads": (view.config or {}).get("num_heads", 0),  # of our exports; a bare file does not tell
        "known_size": (table.shape[1] * patch[0], table.shape[2] * patch[1]),
        **({"architecture": "vit_postnorm"} if post_norm else {}),
    }


MIM_REFINER = make_family(
    "mim_refiner",
    lambda view: {"pos_embed.embed", "cls_tokens.tokens", "blocks.0.attn.qkv.weight"} <= view.tensors.keys(),
    to_timm=REFINER_KEYS.to_timm,
    prepare=_prepare_refiner,
)

# --- data2vec 2.0 (Baevski et al., arXiv 2212.07525; layout of fairseq examples/data2vec), images only.
# Post-norm blocks, a norm after the embedding, none at the end. Pre-training files hold the student and, as a nested
# dictionary ``_ema``, its running average; the authors fine-tune the student, and so it is the default.

_D2V = "modality_encoders.IMAGE."
DATA2VEC2_KEYS = KeyMap(
    [
        (f"{_D2V}local_encoder.proj.{{p}}", "patch_embed.proj.{p}"),
        (f"{_D2V}extra_tokens", "cls_token"),
        (f"{_D2V}fixed_positional_encoder.positions", "pos_embed"),
        (f"{_D2V}context_encoder.norm.{{p}}", "norm_pre.{p}"),
    ],
    same=lambda name: name.startswith("blocks.") and is_encoder_name(name),
)
DATA2VEC2 = make_family(
    "data2vec2",
    lambda view: view.config is None and "blocks.0.attn.qkv.weight" in view.tensors,
    to_timm=DATA2VEC2_KEYS.to_timm,
    anchor=f"{_D2V}local_encoder.proj.weight",
    dropped={
        f"{_D2V}decoder.": "decoder, used only for reconstruction",
        f"{_D2V}alibi": "bias of the attention, unused for images",
        "fc_norm.": "norm of the classifier",
    },
    arguments={"no_embed_class": True},
    final_norm=False,
    architecture="vit_postnorm",
    default_encoder=("model", "student"),
)

# --- MultiMAE (Bachmann et al., arXiv 2204.01678; layout of github.com/EPFL-VILAB/MultiMAE): images alone.
# Every modality has its own patch projection and table; the class token, called global, has no position and stands
# last, which the attention does not notice. No final norm; features are pooled by the mean.

_RGB = "input_adapters.rgb."
_MULTIMAE_KEYS = KeyMap(
    [
        (f"{_RGB}proj.{{p}}", "patch_embed.proj.{p}"),
        (f"{_RGB}pos_emb", "pos_embed"),
        ("global_tokens", "cls_token"),
        *(("encoder.{i}." + part, "blocks.{i}." + part) for part in PARTS),
    ]
)


def _prepare_multimae(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table, weight, tokens = (tensors[name] for name in ("pos_embed", PROJECTION, "cls_token"))
    tensors["pos_embed"] = table.flatten(2).transpose(1, 2)
    if tokens.shape[1] > 1:
        tensors["cls_token"], tensors["reg_token"] = tokens[:, :1], tokens[:, 1:]
    return {"known_size": tuple(side * patch for side, patch in zip(table.shape[2:], weight.shape[2:], strict=True))}


MULTIMAE = make_family(
    "multimae",
    lambda view: {"global_tokens", "encoder.0.attn.qkv.weight"} <= view.tensors.keys(),
    to_timm=_MULTIMAE_KEYS.to_timm,
    anchor=f"{_RGB}proj.weight",
    dropped={"input_adapters.": "another modality", "output_adapters.": "decoder, used only in pre-training"},
    prepare=_prepare_multimae,
    final_norm=False,
    pooling="mean",
)

# --- Prithvi and Prithvi-EO-2.0 (arXiv 2310.18660, 2412.02732; layouts of huggingface.co/ibm-nasa-geospatial): MAE
# with 3-d patches of one date, over one or several dates; loaded for one date, as the authors' code
# does with num_frames=1: the positions of the first. Their mean and std are of reflectance x 10000 in 16-bit files.

_BANDS = {  # mean and std of the six bands: version 1, version 2
    1: ((775.2290211032589, 1080.992780391705, 1228.5855250417867, 2497.2022620507532, 2204.2139147975554,
         1610.8324823273745), (1281.526139861424, 1270.0297974547493, 1399.4802505642526, 1368.3446143747644,
         1291.6764008585435, 1154.505683480695)),
    2: ((1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0), (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0)),
}  # fmt: skip
_FULL_SCALE = 65535  # of 16-bit images, whose pixels count from 0 to 1


def _prepare_prithvi(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    tensors[PROJECTION] = weight = tensors[PROJECTION].squeeze(2)
    table = tensors["pos_embed"]
    length = _entries_of_a_date(table[0, 1:], view.where)
    dates = (table.shape[1] - 1) // length
    tensors["pos_embed"] = table[:, : 1 + length]
    second = "encoder" in view.prefix.split(".")
    config = (view.config or {}).get("pretrained_cfg") or {}
    version = 1 if not second or (weight.shape[0] == 768 and "temporal_embed_enc.scale" not in view.tensors) else 2
    mean, std = (config.get(key) or values for key, values in zip(("mean", "std"), _BANDS[version], strict=True))
    note = f"the positions of one date out of {dates}, as the authors' model with num_frames=1" if dates > 1 else None
    return {
        "norm_eps": 1e-5 if second else 1e-6,
        "mean": tuple(value / _FULL_SCALE for value in mean),
        "std": tuple(value / _FULL_SCALE for value in std),
        "notes": (note,) if note else (),
    }


def _entries_of_a_date(patches: Tensor, where: str) -> int:
    """Entries of the first date in a table [dates x patches, width] of the authors' fixed sines and cosines.

    The last quarter of the channels encodes the date. A table that does not show dates is one of square grids.
    """
    total, dim = patches.shape
    if dim < 16:
        raise CheckpointError(f"{where}: its table of positions has too few channels ({dim}); download it again")
    date = patches[:, dim - dim // 16 * 4 :]
    same = int((date == date[0]).all(dim=1).to(torch.int64).cumprod(0).sum())
    squares = (total // dates for dates in range(1, total + 1) if total % dates == 0)
    return same if 1 < same < total and total % same == 0 else next(n for n in squares if math.isqrt(n) ** 2 == n)


PRITHVI = make_family(
    "prithvi",
    # patches are three-dimensional and one date deep
    lambda view: (
        "cls_token" in view.tensors and has_plain_vit(view.tensors) and view.tensors[PROJECTION].shape[2:-2] == (1,)
    ),
    dropped={
        "temporal_embed_enc.": "weight of the date, which an image has not",
        "location_embed_enc.": "weight of the place, which an image has not",
    },
    prepare=_prepare_prithvi,
    final_norm=True,
    position_rule="corners",
    heads={192: 3},
)

# --- ViTPose (Xu et al., arXiv 2204.12484; layout of github.com/ViTAE-Transformer/ViTPose): fine-tuned MAE.
# Those of its authors and of transformers. No class token, but its entry in the table, which is added to all. The
# patch projection pads the image by 2 pixels.

_PADDING = 2


def _is_hf_vitpose(view: View) -> bool:
    names = {"encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.layernorm_before.weight", "layernorm.weight"}
    known = view.config is None or str(view.model_type).startswith("vitpose")
    return known and names <= view.tensors.keys() and "embeddings.cls_token" not in view.tensors


def _prepare_hf_vitpose(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    eps = view.contents.fact("layer_norm_eps")
    return hf.mean_and_std(view) | _prepare_vitpose(view, tensors, wishes) | {"norm_eps": eps or hf.NORM_EPS}


def _prepare_vitpose(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table, patch = tensors["pos_embed"], tensors[PROJECTION].shape[2:]
    if min(patch) <= 2 * _PADDING:
        raise CheckpointError(
            f"{view.where}: a ViTPose with patches of {patch[0]}x{patch[1]} pixels, whose padding by {_PADDING} pixels "
            "makes another grid than its table has; give one with patches of 16, as published"
        )
    tensors["pos_embed"] = table[:, 1:] + table[:, :1]
    said: dict[str, Any] = {"arguments": {"patch_padding": _PADDING}}
    unit = math.isqrt((table.shape[1] - 1) // 12)
    if wishes.image_size is None and wishes.told_size is None and 12 * unit**2 == table.shape[1] - 1:
        size = (4 * unit * patch[0], 3 * unit * patch[1])
        note = (
            f"{GUESS}images of {size[0]}x{size[1]}, the 4:3 of the authors' persons; pass image_size= if yours differ"
        )
        said |= {"known_size": size, "notes": (note,)}
    return said


_VITPOSE: dict[str, Any] = {"final_norm": True, "architecture": "vit_variant", "heads": {384: 12}}
VITPOSE = make_family(
    "vitpose",
    lambda view: (
        {"last_norm.weight", "pos_embed"} <= view.tensors.keys()
        and "cls_token" not in view.tensors
        and has_plain_vit(view.tensors)
    ),
    to_timm=KeyMap([("last_norm.{p}", "norm.{p}")], same=is_encoder_name).to_timm,
    prepare=_prepare_vitpose,
    **_VITPOSE,
)
HF_VITPOSE = make_family(
    "hf_vitpose",
    _is_hf_vitpose,
    to_timm=hf.DINOV2_KEYS.to_timm,  # its MLP is named as DINOv2's
    anchor=hf.ANCHOR,
    prepare=_prepare_hf_vitpose,
    **_VITPOSE,
)

# --- CAPI (Darcet et al., arXiv 2502.08769; layout of github.com/facebookresearch/capi): no class token; registers
# first; rotary positions with frequencies in every block; RMSNorm; no biases; separate projections for query, key and
# value, which are joined here; a final norm without parameters.

_BLOCK = "encoder.blocks.{i}."
_ATTENTION = f"{_BLOCK}residual1.fn."
CAPI_KEYS = KeyMap(
    [
        ("patch_embed.{p}", "patch_embed.proj.{p}"),
        ("registers", "reg_token"),
        *((f"{_BLOCK}residual{n}.norm.weight", f"blocks.{{i}}.norm{n}.weight") for n in (1, 2)),
        (tuple(f"{_ATTENTION}{name}_proj.weight" for name in "qkv"), "blocks.{i}.attn.qkv.weight"),
        (f"{_ATTENTION}proj.weight", "blocks.{i}.attn.proj.weight"),
        (f"{_ATTENTION}rope.freqs", "blocks.{i}.attn.freqs"),
        *((f"{_BLOCK}residual2.fn.fc{n}.weight", f"blocks.{{i}}.mlp.fc{n}.weight") for n in (1, 2)),
    ]
)


def _infer_capi(tensors: dict[str, Tensor], wishes: Wishes) -> Converted:
    # Positions are relative to the image, so the file has no size: 224 px with patches of 14.
    sizes, patch = size_arguments(tensors, wishes.where)
    registers = tensors["reg_token"].shape[1]
    if patch[0] != patch[1] or registers % 4:
        raise CheckpointError(f"{wishes.where}: CAPI has square patches and 4, 8, ... registers; download it again")
    width, per_head = sizes["embed_dim"], tensors["blocks.0.attn.freqs"].shape[1]
    heads, notes = choose_heads(width, sizes["depth"], width // per_head, wishes)
    arguments = sizes | {"img_size": wishes.image_size or 16 * patch[0], "reg_tokens": registers}
    return Converted("vit_capi", arguments, heads, tensors, notes=tuple(notes))


CAPI = make_family(
    "capi",
    lambda view: {"registers", "encoder.blocks.0.residual1.fn.rope.freqs"} <= view.tensors.keys(),
    to_timm=CAPI_KEYS.to_timm,
    infer=_infer_capi,
    anchor="patch_embed.weight",
    pooling="mean",
    position_rule="timm",
)
