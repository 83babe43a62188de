"""Pre-training files of BEiT v2 (Peng et al., arXiv 2208.06366; layout of github.com/microsoft/unilm, beit2).

Told from BEiT's by the shallow head on the class token; its fine-tuned files are BEiT's.
"""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import Converted, View, Wishes


def matches(view: View) -> bool:
    return beit.has_beit(view) and any(name.startswith("cls_pt_layers.") for name in view.tensors)


def convert(view: View, wishes: Wishes) -> Converted:
    return beit.convert_as(view, wishes, "beitv2", imagenet=True)


FAMILY = replace(beit.FAMILY, name="beit2", matches=matches, convert=convert)
