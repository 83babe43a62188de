"""Files of Bird-MAE (Rauch et al., arXiv 2504.12880; layouts of github.com/DBD-research-group/Bird-MAE and its hub).

MAE on spectrograms of one channel: the hub's files, with a norm after pooling beside the final one, which the authors'
forward pass leaves out; Lightning files with a decoder; and the file refined by MIM-Refiner's recipe.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import GUESS, PROJECTION, View, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family

_NORMS = {"norm.weight", "fc_norm.weight"}
_DROPPED = {"norm.": "unused: the pooled mean has a norm of its own"}
_NOTE = "the authors normalise log-mel values by (x + 7.2) / 8.86; compute mean and std of your images"
_SIZE = (512, 128)  # frames x mel bands of the published files


def matches(view: View) -> bool:
    """A ViT of one channel with both norms, or with Bird-MAE's names of the image size among its arguments."""
    names = view.tensors
    if not has_plain_vit(names) or "cls_token" not in names or names[PROJECTION].shape[1] != 1:
        return False
    return names.keys() >= _NORMS or view.contents.fact("img_size_x") is not None


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    if "fc_norm.weight" in tensors:
        for name in ("norm.weight", "norm.bias"):
            tensors.pop(name, None)
    size = (view.contents.fact("img_size_x"), view.contents.fact("img_size_y"))
    if all(isinstance(side, int) for side in size):
        return {"known_size": size}
    rows, columns = (side // patch for side, patch in zip(_SIZE, tensors[PROJECTION].shape[2:], strict=True))
    if tensors["pos_embed"].shape[1] != rows * columns + 1:
        return {}
    guess = f"{GUESS}spectrograms of {_SIZE[0]}x{_SIZE[1]}, as the authors' files; pass image_size= if yours differ"
    return {"known_size": _SIZE, "notes": (_NOTE, guess)}


FAMILY = vit_family("bird_mae", matches, dropped=_DROPPED, prepare=_prepare, pooling="mean", notes=(_NOTE,))
