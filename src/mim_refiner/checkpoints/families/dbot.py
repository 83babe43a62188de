"""Files of dBOT (Liu et al., arXiv 2209.03917; layout of github.com/liuxingbin/dbot): MAE's, predicting features.

An encoder-only file of dBOT cannot be told from MAE's and is taken for one; both load alike.
"""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import View


def matches(view: View) -> bool:
    """MAE's layout with dBOT's own last layer of the decoder."""
    return view.contents.config is None and mae.has_decoder(view) and "decoder_predp.weight" in view.tensors


FAMILY = replace(mae.FAMILY, name="dbot", matches=matches)
