"""MAE, BEiT and Swin as mmpretrain and mmselfsup write them (github.com/open-mmlab/mmpretrain); Swin's other files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import GUESS, Converted, View, Wishes
from mim_refiner.checkpoints.families.keymap import ZEROS, KeyMap, Mapped, Template
from mim_refiner.checkpoints.families.plain_vit import make_family, projection_sizes
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import mlp_ratio

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


def _mean_and_std(view: View, *_: Any) -> dict[str, Any]:
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
    prepare=_mean_and_std,
    final_norm=True,
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

# --- Swin Transformers, as SimMIM trains them: files of github.com/microsoft/SimMIM, Swin-Transformer, and mmpretrain.
# timm has a stage's downsampling at its start, the others at the end of the stage before; mmpretrain joins the four
# neighbours of a patch in another order. timm's own names are read too.

_SWIN_NAME = re.compile(
    rf"layers\.\d+\.blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|attn\.{_TABLE}"
    r"|mlp\.fc[12]\.(weight|bias))|patch_embed\.(proj|norm)\.(weight|bias)|norm\.(weight|bias)"
    r"|layers\.\d+\.downsample\.(norm\.(weight|bias)|reduction\.weight)"
)
_MM_NAMES = (
    ("stages.", "layers."), ("patch_embed.projection", "patch_embed.proj"), (".attn.w_msa.", ".attn."),
    (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."),
)  # fmt: skip


def _is_swin(view: View) -> bool:
    """Swin's stages of blocks with a table of positions in each, without a config beside them."""
    return view.config is None and any(
        name.startswith(("layers.0.blocks.0.attn.", "stages.0.blocks.0.attn.w_msa.")) and name.endswith(_TABLE)
        for name in view.tensors
    )


def _swin_to_timm(tensors: Mapping[str, Tensor]) -> Mapped:
    last = max((int(name.split(".")[1]) for name in tensors if name.startswith("stages.")), default=0)  # mmpretrain's
    ends = any(name.endswith("s.0.downsample.reduction.weight") for name in tensors)  # not in timm's own names
    found, origin = {}, {}
    for name, tensor in tensors.items():
        target = name
        for old, new in _MM_NAMES if last else ():
            target = target.replace(old, new)
        target = re.sub(rf"^norm{last}\.", "norm.", target) if last else target
        if _SWIN_NAME.fullmatch(target) is None:
            continue
        if ".downsample." in target:
            target = re.sub(r"\d+", lambda number: str(int(number[0]) + ends), target)
            if last:  # four neighbours in the last dimension: [channel, row, column] to timm's [column, row, channel]
                tensor = tensor.unflatten(-1, (-1, 2, 2)).movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
        found[target], origin[name] = tensor, target
    return found, origin


def _infer_swin(tensors: dict[str, Tensor], wishes: Wishes) -> Converted:
    width, in_chans, patch = projection_sizes(tensors, wishes.where)
    tables = [t for name, t in sorted(tensors.items()) if name.endswith(f"blocks.0.attn.{_TABLE}")]
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    depths = [sum(f"layers.{n}.blocks.{k}.norm1.weight" in tensors for k in range(999)) for n in range(len(tables))]
    if (2 * window - 1) ** 2 != tables[0].shape[0] or not all(depths):
        raise CheckpointError(f"{wishes.where}: windows are no squares, or stages are missing; save the whole Swin")
    size = wishes.told_size or wishes.image_size
    guess = f"{GUESS}images of 192x192 px in training, as SimMIM's; pass image_size= if not"
    arguments = {
        "img_size": size or (192, 192), "patch_size": patch, "in_chans": in_chans, "embed_dim": width,
        "depths": tuple(depths), "num_heads": tuple(table.shape[1] for table in tables), "window_size": window,
        "mlp_ratio": mlp_ratio(tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0], width),
    }  # fmt: skip
    return Converted("swin_base_patch4_window7_224", arguments, -1, tensors, notes=() if size else (guess,))


_SWIN: dict[str, Any] = {
    "to_timm": _swin_to_timm,
    "infer": _infer_swin,
    "dropped": {f"norm{n}.": "norm of an earlier stage's output" for n in range(3)},
    "pooling": "mean",
    "position_rule": "timm",
}
SWIN = make_family("swin", _is_swin, **_SWIN)
MM_SWIN = make_family("mmpretrain_swin", _is_swin, anchor=ANCHOR, **_SWIN)
