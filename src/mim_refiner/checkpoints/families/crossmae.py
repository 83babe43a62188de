"""Files of CrossMAE (Fu et al., arXiv 2401.14391; layout of github.com/TonyLianLong/CrossMAE).

Its decoder reads a weighted sum of all blocks, so the encoder has no final norm and the file none of its tensors.
Features are pooled by the mean of the patch tokens.
"""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import Converted, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import TIMM_NAMES, infer_structure
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

_DROPPED = mae.DECODER | {
    "dec_norms.": "norms of the decoder's inputs",
    "wfm.": "weights of the sum over blocks that the decoder reads",
}


def matches(view: View) -> bool:
    """MAE's layout with a decoder that attends to the encoder's tokens."""
    crossing = any(name.startswith("decoder_blocks.") and ".cross_attn." in name for name in view.tensors)
    return view.contents.config is None and crossing and mae.has_decoder(view)


def convert(view: View, wishes: Wishes) -> Converted:
    """As MAE's, but the final norm exists only where the decoder does not read the sum over blocks."""
    mapped = TIMM_NAMES.to_timm(view.tensors)
    sums_blocks = any(name.startswith("wfm.") for name in view.tensors)
    final_norm = None if sums_blocks else True
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=final_norm)
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, _DROPPED),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        position_rule="bicubic",
        pooling="mean",
        notes=vit.notes,
    )


FAMILY = replace(mae.FAMILY, name="crossmae", matches=matches, convert=convert)
