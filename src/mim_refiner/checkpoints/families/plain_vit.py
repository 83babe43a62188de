"""Read the structure of a plain timm ViT from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import Wishes
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import BASE_ARCHITECTURE, standard_name

_BLOCK_PARTS = (
    r"norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.[qk]_norm\.(weight|bias)"
    r"|mlp\.fc[12]\.(weight|bias)|ls[12]\.gamma"
)
_ENCODER_NAME = re.compile(
    rf"blocks\.\d+\.({_BLOCK_PARTS})|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|norm_pre)\.(weight|bias)"
    r"|cls_token|reg_token|pos_embed"
)

# Width alone tells the number of heads only for the standard sizes.
_HEADS_BY_WIDTH_AND_DEPTH = {
    (192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16, (2560, 24): 32,
}  # fmt: skip


def is_encoder_name(name: str) -> bool:
    """Whether a plain timm ViT has a tensor of this name."""
    return _ENCODER_NAME.fullmatch(name) is not None


def has_plain_vit(names: Collection[str]) -> bool:
    """Whether ``names`` hold a patch embedding and blocks with nothing in them that a plain timm ViT has not."""
    in_blocks = [name for name in names if name.startswith("blocks.")]
    return (
        "patch_embed.proj.weight" in names
        and any(name.endswith(".attn.qkv.weight") for name in in_blocks)
        and all(is_encoder_name(name) for name in in_blocks)
    )


@dataclass(frozen=True)
class PlainViT:
    """Structure of a plain ViT: timm name, constructor arguments for it, heads (0 = unknown), remarks."""

    architecture: str
    arguments: dict[str, Any]
    num_heads: int
    notes: tuple[str, ...]


def infer_structure(tensors: Mapping[str, Tensor], wishes: Wishes, where: str, *, needs_norm: bool = False) -> PlainViT:
    """Read the structure of the plain ViT that ``tensors`` belong to.

    ``needs_norm``: the family always has a final norm, so a file without it is incomplete.

    Raises CheckpointError (naming ``where``) for shapes that no ViT has and for a position table whose grid is not
    told by its length.
    """
    projection = tensors["patch_embed.proj.weight"]
    if projection.ndim != 4:
        raise CheckpointError(
            f"{where}: patch_embed.proj.weight has shape {list(projection.shape)}, a ViT's has four "
            "dimensions [width, channels, patch, patch]; convert it first"
        )
    width, in_chans, patch_h, patch_w = projection.shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    pre_norm, fc_norm = "norm_pre.weight" in tensors, "fc_norm.weight" in tensors
    registers = tensors.get("reg_token")
    num_registers = 0 if registers is None else registers.shape[1]
    class_token = "cls_token" in tensors or _table_counts_a_class_token(tensors)
    grid, prefix_in_table = _grid(
        tensors.get("pos_embed"), int(class_token) + num_registers, (patch_h, patch_w), wishes, where
    )
    arguments: dict[str, Any] = {
        "img_size": (grid[0] * patch_h, grid[1] * patch_w),
        "patch_size": patch_h if patch_h == patch_w else (patch_h, patch_w),
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": _mlp_ratio(tensors, width),
        "qkv_bias": _any(tensors, "attn.qkv.bias"),
        "qk_norm": _any(tensors, "attn.q_norm.weight"),
        "class_token": class_token,
        "reg_tokens": num_registers,
        "no_embed_class": prefix_in_table == 0,
        "pre_norm": pre_norm,
        "final_norm": needs_norm or fc_norm or "norm.weight" in tensors or "norm.bias" in tensors,
        "fc_norm": fc_norm,
        "global_pool": "avg" if fc_norm or not class_token else "token",
    }
    if _any(tensors, "ls1.gamma"):
        arguments["init_values"] = 1e-5  # only switches layer scale on; the weights replace the value
    heads = _heads(tensors, width, depth, wishes)
    notes = []
    if heads and width % heads:
        raise CheckpointError(f"{where}: num_heads={heads} does not divide the encoder's width {width}; pass a divisor")
    if heads and wishes.num_heads is None:
        notes.append(f"{heads} attention heads, as the standard ViT of this size; pass num_heads= if yours differs")
    if not arguments["final_norm"]:
        notes.append("the file has no final norm, so the encoder has none")
    name = standard_name(width, depth, heads, (patch_h, patch_w)) or BASE_ARCHITECTURE
    return PlainViT(name, arguments, heads, tuple(notes))


def _heads(tensors: Mapping[str, Tensor], width: int, depth: int, wishes: Wishes) -> int:
    from_norm = next((width // t.shape[0] for n, t in tensors.items() if n.endswith("attn.q_norm.weight")), 0)
    return wishes.num_heads or from_norm or _HEADS_BY_WIDTH_AND_DEPTH.get((width, depth), 0)


def _grid(
    table: Tensor | None, num_prefix: int, patch: tuple[int, int], wishes: Wishes, where: str
) -> tuple[tuple[int, int], int]:
    """Grid (rows, columns) of the position table, and how many prefix tokens have an entry in it."""
    wished = None if wishes.image_size is None else (wishes.image_size[0] // patch[0], wishes.image_size[1] // patch[1])
    if table is None:
        return wished or (224 // patch[0], 224 // patch[1]), 0
    length = table.shape[1]
    for prefix in (num_prefix, 0):
        side = math.isqrt(max(length - prefix, 0))
        if side and side * side == length - prefix:
            return (side, side), prefix
    for prefix in (num_prefix, 0):
        if wished is not None and wished[0] * wished[1] == length - prefix:
            return wished, prefix
    raise CheckpointError(
        f"{where}: the position table has {length} entries, no square grid; pass its image_size=(height, width)"
    )


def _table_counts_a_class_token(tensors: Mapping[str, Tensor]) -> bool:
    """True for a table of rows * rows + 1 entries: then a file without ``cls_token`` is incomplete, not another ViT."""
    length = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    return length > 1 and math.isqrt(length) ** 2 != length and math.isqrt(length - 1) ** 2 == length - 1


def _mlp_ratio(tensors: Mapping[str, Tensor], width: int) -> float:
    hidden = next((t.shape[0] for n, t in tensors.items() if n.endswith("mlp.fc1.weight")), 4 * width)
    return hidden / width


def _any(tensors: Mapping[str, Tensor], ending: str) -> bool:
    return any(name.endswith(ending) for name in tensors)
