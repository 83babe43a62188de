"""Files of CrossMAE (Fu et al., arXiv 2401.14391; layout of github.com/TonyLianLong/CrossMAE).

Its decoder reads a weighted sum of all blocks, so the encoder has no final norm and the file none of its tensors; where
the decoder reads the last block only, there is one. Features are pooled by the mean of the patch tokens.
"""

from __future__ import annotations

from torch import Tensor

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.vit import vit_family

_DROPPED = {
    "dec_norms.": "norms of the decoder's inputs",
    "wfm.": "weights of the sum over blocks that the decoder reads",
}


def matches(view: View) -> bool:
    """MAE's layout with a decoder that attends to the encoder's tokens."""
    crossing = any(name.startswith("decoder_blocks.") and ".cross_attn." in name for name in view.tensors)
    return view.contents.config is None and crossing and mae.has_decoder(view)


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, bool | None]:
    return {"final_norm": None if any(name.startswith("wfm.") for name in view.tensors) else True}


FAMILY = vit_family(
    "crossmae", matches, dropped=_DROPPED, prepare=_prepare, to_source=mae.to_source, pooling="mean", heads={384: 6}
)
