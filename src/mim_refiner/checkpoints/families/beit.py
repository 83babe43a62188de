"""Encoders of BEiT's architecture and (timm's) names, and timm's Beit read from its tensors.

Pre-trained files have one table of relative positions for all blocks and a final norm; fine-tuned ones a table in every
block and a norm after pooling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from mim_refiner.checkpoints.families.base import GUESS, Converted, Family, View, Wishes
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.mae import has_decoder
from mim_refiner.checkpoints.families.plain_vit import (
    Prepare,
    choose_heads,
    has_any,
    make_family,
    size_arguments,
    table_grid,
)
from mim_refiner.errors import CheckpointError
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD, SIZES
from mim_refiner.reporting import number_of

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_NAME = re.compile(
    r"blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(q_bias|v_bias|qkv\.weight|proj\.(weight|bias)"
    r"|relative_position_bias_table)|mlp\.fc[12]\.(weight|bias)|gamma_[12])"
    r"|patch_embed\.proj\.(weight|bias)|(norm|fc_norm)\.(weight|bias)|cls_token|pos_embed"
    r"|rel_pos_bias\.relative_position_bias_table"
)
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.0.attn.relative_position_bias_table"

BEIT_NAMES = KeyMap(same=lambda name: _NAME.fullmatch(name) is not None)


def infer_beit(
    tensors: dict[str, Tensor],
    wishes: Wishes,
    *,
    index: Tensor | None = None,
    known_heads: int = 0,
    known_size: tuple[int, int] | None = None,
    kind: str = "beit",
) -> Converted:
    """Structure of the Beit that ``tensors`` (timm names) belong to.

    ``index``: the file's relative_position_index, which tells a grid that is no square; ``known_heads`` and
    ``known_size`` come from a config. The number of heads is that of the relative table where there is one.
    Raises CheckpointError for a table whose grid nothing tells.
    """
    where = wishes.where
    sizes, patch = size_arguments(tensors, where)
    width, depth = sizes["embed_dim"], sizes["depth"]
    relative = tensors.get(SHARED_TABLE, tensors.get(OWN_TABLE))
    if relative is not None:
        told = (known_size, wishes.told_size, wishes.image_size)
        grid, grid_notes = _relative_grid(relative, index, patch, told, where)
    else:
        grid, _, grid_notes = table_grid(tensors.get("pos_embed"), 1, patch, sizes["in_chans"], known_size, wishes)
    fc_norm = "fc_norm.weight" in tensors
    heads, notes = choose_heads(width, depth, known_heads if relative is None else relative.shape[1], wishes)
    if relative is not None and heads != relative.shape[1]:
        raise CheckpointError(
            f"{where}: its position tables are for {number_of(relative.shape[1], 'heads')}; leave num_heads out"
        )
    arguments = sizes | {
        "img_size": (grid[0] * patch[0], grid[1] * patch[1]),
        "qkv_bias": has_any(tensors, "attn.q_bias"),
        # Only switches layer scale on; timm would drop None and take the name's own value.
        "init_values": 0.1 if has_any(tensors, "gamma_1") else 0.0,
        "use_abs_pos_emb": "pos_embed" in tensors,
        "use_rel_pos_bias": OWN_TABLE in tensors,
        "use_shared_rel_pos_bias": SHARED_TABLE in tensors,
        "use_fc_norm": fc_norm,
        "global_pool": "avg" if fc_norm else "token",
    }
    size = "large" if SIZES.get((width, depth, heads)) == "large" else "base"
    return Converted(f"{kind}_{size}_patch16_224", arguments, heads, tensors, notes=(*notes, *grid_notes))


def _relative_grid(
    table: Tensor, index: Tensor | None, patch: tuple[int, int], sizes: tuple[tuple[int, int] | None, ...], where: str
) -> tuple[tuple[int, int], list[str]]:
    """Grid of a table of (2 rows - 1)(2 columns - 1) + 3 entries, and what to remark; ``sizes`` are asked in order."""
    entries = table.shape[0] - 3
    named = [None if size is None else (size[0] // patch[0], size[1] // patch[1]) for size in sizes]
    for grid in (named[0], None if index is None else _grid_of_index(index), *named[1:]):
        if grid and (2 * grid[0] - 1) * (2 * grid[1] - 1) == entries:
            return grid, []
    side = math.isqrt(max(entries, 0))
    if side * side == entries and side % 2:
        rows = (side + 1) // 2
        size = f"{rows * patch[0]}x{rows * patch[1]} px"
        return (rows, rows), [f"{GUESS}images of {size} in training, a square; pass image_size= if not"]
    raise CheckpointError(f"{where}: a relative table of {table.shape[0]} entries has no square grid; pass image_size=")


def _grid_of_index(index: Tensor) -> tuple[int, int] | None:
    """Grid of a relative_position_index [1 + N, 1 + N]: the index falls by one along a row of patches."""
    if index.ndim != 2 or index.shape[0] < 2:
        return None
    from_first = index[1, 1].item() - index[1, 1:].to(torch.int64)
    columns = int((from_first == torch.arange(len(from_first))).to(torch.int64).cumprod(0).sum())
    return len(from_first) // columns, columns


def prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    """What a file of BEiT's architecture says; its own options say more of mean and std than the family."""
    index = next((tensor for key, tensor in view.tensors.items() if key.endswith("relative_position_index")), None)
    by_token = "head.weight" in view.tensors and "norm.weight" in tensors  # a classifier behind the final norm
    said: dict[str, Any] = {"index": index, "pooling": "cls" if by_token else "mean"}
    option = view.contents.fact("imagenet_default_mean_and_std")
    return said if option is None else said | (_IMAGENET if option else HALF)


# --- BEiT (Bao et al., arXiv 2106.08254; microsoft/unilm, beit)

_ALIKE = "fine-tuned files of BEiT and BEiT v2 are alike; v2 wants ImageNet's mean and std instead of 0.5"


def _prepare_beit(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    return {"notes": (_ALIKE,) if "fc_norm.weight" in tensors else ()} | prepare(view, tensors, wishes)


# --- BEiT v2 (arXiv 2208.06366; microsoft/unilm, beit2): pre-training files have a shallow head on the class token; its
# fine-tuned files are BEiT's. SimMIM with a ViT (arXiv 2111.09886; microsoft/SimMIM): a decoder of one layer. CAE
# (arXiv 2202.03026; lxtGH/CAE): absolute positions, twice, the encoder, which the authors fine-tune, and its running
# average; fine-tuned files are BEiT's. EVA-01 (arXiv 2211.07636; baaivision/EVA): absolute positions, no layer scale.

_CODEBOOK = 8192  # entries, of BEiT's visual tokens; the features of CLIP that EVA-01 predicts are narrower


def _family(name: str, is_it: Callable[[View], bool], prepare: Prepare = prepare, **facts: Any) -> Family:
    """With biases of query and value under timm's (the original) names; no config, nor a decoder (MSM-MAE has them)."""

    def matches(view: View) -> bool:
        plain = view.config is None and {"blocks.0.attn.q_bias", "cls_token"} <= view.tensors.keys()
        return plain and not has_decoder(view) and is_it(view)

    return make_family(
        name,
        matches,
        to_timm=BEIT_NAMES.to_timm,
        infer=infer_beit,
        prepare=prepare,
        **facts,
    )


def _is_eva01(view: View) -> bool:
    """Absolute positions only; no layer scale, or (under DeepSpeed's 'module') a head of the width of features."""
    names = view.tensors
    if "pos_embed" not in names or any("relative_position" in name for name in names):
        return False
    head = names.get("lm_head.weight")
    features = head is not None and head.shape[0] < _CODEBOOK and "module" in view.section.split(".")
    return features or "blocks.0.gamma_1" not in names


def _prepare_eva01(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    said = prepare(view, tensors, wishes)
    clip = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    return said if view.contents.fact("imagenet_default_mean_and_std") else said | clip


BEIT = _family("beit", lambda view: True, _prepare_beit, **HALF)
BEIT2 = _family("beit2", lambda view: any(name.startswith("cls_pt_layers.") for name in view.tensors), kind="beitv2")
SIMMIM = _family("simmim", lambda view: "encoder" in view.prefix.split(".") and "decoder.0.weight" in view.beside)
CAE = _family(
    "cae", lambda view: any(name.startswith("pretext_neck.") for name in view.beside), default_encoder=("encoder",)
)
EVA01 = _family("eva01", _is_eva01, _prepare_eva01)
