"""Files of MAE-pytorch (github.com/pengzhiliang/MAE-pytorch) and VideoMAE (arXiv 2203.12602, MCG-NJU/VideoMAE).

No class token; biases of query and value only; positions by the number of the patch, which the code computes and the
file has not. VideoMAE's patches span several frames: an image is taken for one such tubelet of equal frames.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, View, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.models.positions import sinusoid_table


def matches(view: View) -> bool:
    """A ViT without class token, with BEiT's biases, and without a table or with a decoder of this code beside it."""
    names = view.tensors
    if view.contents.config is not None or "cls_token" in names or "blocks.0.attn.q_bias" not in names:
        return False
    return has_plain_vit(names) and ("pos_embed" not in names or "encoder_to_decoder.weight" in view.beside)


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    notes, weight = [], tensors[PROJECTION]
    said: dict[str, Any] = {"final_norm": None if "fc_norm.weight" in tensors else True, "pooling": "mean"}
    if weight.ndim == 5:
        tensors[PROJECTION] = weight.sum(dim=2)
        said["family"] = "videomae"
        notes.append(
            f"an image stands for one tubelet of {weight.shape[2]} equal frames; the authors' videos have more"
        )
    if "pos_embed" not in tensors:
        height, width = wishes.image_size or (224, 224)
        count = (height // weight.shape[-2]) * (width // weight.shape[-1])
        tensors["pos_embed"] = sinusoid_table(count, weight.shape[0])
        said |= {"position_rule": "sinusoid", "known_size": (height, width)}
        notes.append(f"positions are computed for the image size, here {height}x{width}; image_size= sets it")
    return said | {"notes": tuple(notes)}


FAMILY = vit_family("mae_pytorch", matches, prepare=_prepare, heads={384: 6})
