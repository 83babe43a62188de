"""Swin Transformers, as SimMIM trains them: files of github.com/microsoft/SimMIM, Swin-Transformer, and mmpretrain.

timm has a stage's downsampling at its start, the others at the end of the stage before; mmpretrain joins the four
neighbours of a patch in another order. timm's own names are read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import GUESS, View, Wishes
from mim_refiner.checkpoints.families.keymap import Mapped
from mim_refiner.checkpoints.families.plain_vit import Structure, make_family, projection_sizes
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import mlp_ratio

_TABLE = "relative_position_bias_table"
_IN_BLOCKS = re.compile(
    rf"layers\.\d+\.blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.{_TABLE}"
    r"|mlp\.fc[12]\.(weight|bias))"
)
_ELSEWHERE = re.compile(
    r"patch_embed\.(proj|norm)\.(weight|bias)|norm\.(weight|bias)|layers\.\d+\.downsample\.(norm\.(weight|bias)|reduction\.weight)"
)
_MM_NAMES = (
    ("stages.", "layers."), ("patch_embed.projection", "patch_embed.proj"), (".attn.w_msa.", ".attn."),
    (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."),
)  # fmt: skip


def matches(view: View) -> bool:
    """Swin's stages of blocks with a table of positions in each, without a config beside them."""
    return view.config is None and any(
        name.startswith(("layers.0.blocks.0.attn.", "stages.0.blocks.0.attn.w_msa.")) and name.endswith(_TABLE)
        for name in view.tensors
    )


def _to_timm(tensors: Mapping[str, Tensor]) -> Mapped:
    last = max((int(name.split(".")[1]) for name in tensors if name.startswith("stages.")), default=0)
    ends = any(name.endswith("s.0.downsample.reduction.weight") for name in tensors)  # not in timm's own names
    origin = {name: target for name in tensors if (target := _target(name, last, int(ends))) is not None}
    found = {target: tensors[name] for name, target in origin.items()}
    for name in found if last else ():
        if ".downsample." in name:
            # the four neighbours in the last dimension: [channel, row, column] to timm's [column, row, channel]
            parts = found[name].unflatten(-1, (-1, 2, 2)).movedim((-3, -2, -1), (-1, -2, -3))
            found[name] = parts.flatten(-3)
    return Mapped(found, origin, tuple(name for name in tensors if name not in origin))


def _infer(tensors: dict[str, Tensor], wishes: Wishes, where: str) -> Structure:
    width, in_chans, patch = projection_sizes(tensors, where)
    tables = [t for name, t in sorted(tensors.items()) if name.endswith(f"blocks.0.attn.{_TABLE}")]
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    depths = [sum(f"layers.{n}.blocks.{k}.norm1.weight" in tensors for k in range(999)) for n in range(len(tables))]
    if (2 * window - 1) ** 2 != tables[0].shape[0] or not all(depths):
        raise CheckpointError(f"{where}: windows are no squares, or stages are missing; save the whole Swin")
    size = wishes.told_size or wishes.image_size
    guess = f"{GUESS}images of 192x192 px in training, as SimMIM's; pass image_size= if not"
    arguments = {
        "img_size": size or (192, 192), "patch_size": patch, "in_chans": in_chans, "embed_dim": width,
        "depths": tuple(depths), "num_heads": tuple(table.shape[1] for table in tables), "window_size": window,
        "mlp_ratio": mlp_ratio(tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0], width),
    }  # fmt: skip
    return Structure("swin_base_patch4_window7_224", arguments, -1, () if size else (guess,))


def _target(name: str, last: int, shift: int) -> str | None:
    """timm's name of a tensor, None for one that is not of the encoder; ``last``: mmpretrain's last stage, else 0."""
    for old, new in _MM_NAMES if last else ():
        name = name.replace(old, new)
    name = name.replace(f"norm{last}.", "norm.") if last and name.startswith(f"norm{last}.") else name
    if _IN_BLOCKS.fullmatch(name):
        return name
    if _ELSEWHERE.fullmatch(name) is None:
        return None
    return re.sub(r"layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + shift}.downsample", name)


_SHARED: dict[str, Any] = {
    "to_timm": _to_timm,
    "infer": _infer,
    "dropped": {f"norm{n}.": "norm of an earlier stage's output" for n in range(3)},
    "pooling": "mean",
    "position_rule": "timm",
}
FAMILY = make_family("swin", matches, **_SHARED)
MM_FAMILY = make_family("mmpretrain_swin", matches, anchor="patch_embed.projection.weight", **_SHARED)
