"""Files of SimMIM with a ViT (Xie et al., arXiv 2111.09886; layout of github.com/microsoft/SimMIM).

A BEiT architecture under "encoder." beside a decoder of one layer.
"""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import Converted, View, Wishes


def matches(view: View) -> bool:
    """BEiT's blocks as the encoder of a model whose decoder is a single layer."""
    return beit.has_beit(view) and "encoder" in view.prefix.split(".") and "decoder.0.weight" in view.beside


def convert(view: View, wishes: Wishes) -> Converted:
    return beit.convert_as(view, wishes, "beit", imagenet=True)


FAMILY = replace(beit.FAMILY, name="simmim", matches=matches, convert=convert)
