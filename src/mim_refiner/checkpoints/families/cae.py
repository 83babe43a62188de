"""Pre-training files of CAE (Chen et al., arXiv 2202.03026; layout of github.com/lxtGH/CAE).

BEiT's architecture with absolute positions, twice: the encoder, which the authors fine-tune, and its running average.
Its fine-tuned files are BEiT's.
"""

from __future__ import annotations

from dataclasses import replace

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import Converted, View, Wishes


def matches(view: View) -> bool:
    return beit.has_beit(view) and any(name.startswith("pretext_neck.") for name in view.beside)


def convert(view: View, wishes: Wishes) -> Converted:
    return beit.convert_as(view, wishes, "beit", imagenet=True)


FAMILY = replace(beit.FAMILY, name="cae", matches=matches, convert=convert, default_encoder=("encoder",))
