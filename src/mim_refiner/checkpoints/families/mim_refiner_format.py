"""Released MIM-Refiner checkpoints (layout of github.com/ml-jku/MIM-Refiner): {"state_dict": ...}, pre- or post-norm.

The position table is a buffer [1, rows, columns, width] without an entry for the class token; at other resolutions it
is resized bicubically without antialiasing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_vit import is_encoder_name, vit_family
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.types import BackboneInfo

_RENAMED = {"cls_token": "cls_tokens.tokens", "pos_embed": "pos_embed.embed"}
_KEYS = KeyMap(
    [*((source, timm) for timm, source in _RENAMED.items()), ("embed_norm.{p}", "norm_pre.{p}")],
    same=lambda name: is_encoder_name(name) and name not in _RENAMED and not name.startswith("norm_pre."),
)


def matches(view: View) -> bool:
    return {"pos_embed.embed", "cls_tokens.tokens", "blocks.0.attn.qkv.weight"} <= view.tensors.keys()


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    table = tensors["pos_embed"]
    if table.ndim != 4:
        raise CheckpointError(
            f"{view.where}: pos_embed.embed has shape {list(table.shape)}, not [1, rows, columns, width]; "
            "save the encoder with the published code again"
        )
    patch, post_norm = tensors[PROJECTION].shape[2:], "norm_pre.weight" in tensors
    tensors["pos_embed"] = table.flatten(1, 2)
    return {
        "final_norm": not post_norm,
        "known_heads": (view.config or {}).get("num_heads", 0),  # of our exports; a bare file does not tell
        "known_size": (table.shape[1] * patch[0], table.shape[2] * patch[1]),
        **({"architecture": "vit_postnorm"} if post_norm else {}),
    }


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """The state dict of a released file; InputError for an encoder that the format cannot hold.

    The format keeps no entry of the table for the class token: one that is there is added to the token, which gives
    the same tokens.
    """
    tensors = dict(state)
    rows, columns = (side // patch for side, patch in zip(info.image_size, info.patch_size, strict=True))
    table, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if table is None or token is None or info.num_prefix_tokens != 1:
        raise InputError(
            "the MIM-Refiner format holds encoders with a class token, a position table and no registers only; "
            "choose --format timm"
        )
    if not {"norm.weight", "fc_norm.weight", "norm_pre.weight"} & tensors.keys():
        raise InputError("the MIM-Refiner format has no encoders without final norm; choose --format timm")
    if table.shape[1] == rows * columns + 1:
        tensors["cls_token"], table = token + table[:, :1], table[:, 1:]
    tensors["pos_embed"] = table.reshape(1, rows, columns, -1)
    return _KEYS.from_timm(tensors)


FAMILY = vit_family("mim_refiner", matches, keys=_KEYS, prepare=_prepare, to_source=to_source)
