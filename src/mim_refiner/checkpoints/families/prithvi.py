"""Files of Prithvi and Prithvi-EO-2.0 (arXiv 2310.18660, 2412.02732; layouts of huggingface.co/ibm-nasa-geospatial).

MAE with 3-d patches of one date, over one or several dates; loaded for one date, as the authors' code does with
num_frames=1: the positions of the first. Their mean and std are of reflectance x 10000 in 16-bit files.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, View, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.errors import CheckpointError

_DROPPED = {
    "temporal_embed_enc.": "weight of the date, which an image has not",
    "location_embed_enc.": "weight of the place, which an image has not",
}
_BANDS = {  # mean and std of the six bands: version 1, version 2
    1: ((775.2290211032589, 1080.992780391705, 1228.5855250417867, 2497.2022620507532, 2204.2139147975554,
         1610.8324823273745), (1281.526139861424, 1270.0297974547493, 1399.4802505642526, 1368.3446143747644,
         1291.6764008585435, 1154.505683480695)),
    2: ((1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0), (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0)),
}  # fmt: skip
_FULL_SCALE = 65535  # of 16-bit images, whose pixels count from 0 to 1


def matches(view: View) -> bool:
    """A ViT with class token whose patches are three-dimensional and one date deep."""
    names = view.tensors
    return (
        has_plain_vit(names)
        and "cls_token" in names
        and names[PROJECTION].ndim == 5
        and names[PROJECTION].shape[2] == 1
    )


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
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
        "final_norm": True,
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
        raise CheckpointError(
            f"{where}: its table of positions has {dim} channels, Prithvi's at least 16; download it again"
        )
    date = patches[:, dim - dim // 16 * 4 :]
    same = int((date == date[0]).all(dim=1).to(torch.int64).cumprod(0).sum())
    squares = (total // dates for dates in range(1, total + 1) if total % dates == 0)
    length = same if 1 < same < total and total % same == 0 else next(n for n in squares if math.isqrt(n) ** 2 == n)
    return length


FAMILY = vit_family("prithvi", matches, dropped=_DROPPED, prepare=_prepare, position_rule="corners", heads={192: 3})
