"""Files of Scale-MAE (Reed et al., arXiv 2212.14532; layout of github.com/bair-climate-initiative/scale-mae).

MAE's encoder with a decoder of two resolutions. The authors' positions are those of the stored table at a ground
sampling distance of 1, and are computed anew for every image size.
"""

from __future__ import annotations

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import View
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family

_HEADS = ("fpn.", "fcn.", "fcn_high.", "fcn_low.")
_DROPPED = dict.fromkeys((*_HEADS, "pos_emb_projection."), "head of the decoder")
_NOTE = "positions of a ground sampling distance of 1; the authors scale them by that of the image"


def matches(view: View) -> bool:
    return (
        view.contents.config is None
        and has_plain_vit(view.tensors)
        and any(name.startswith(_HEADS) for name in view.tensors)
    )


FAMILY = vit_family("scale_mae", matches, dropped=_DROPPED, prepare=mae.prepare, position_rule="sincos", notes=(_NOTE,))
