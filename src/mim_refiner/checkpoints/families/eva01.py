"""Files of EVA-01 (Fang et al., arXiv 2211.07636; layout of github.com/baaivision/EVA, EVA-01).

BEiT's architecture with absolute positions, without layer scale; images are normalised as CLIP's.
"""

from __future__ import annotations

from dataclasses import replace

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import Converted, View, Wishes

_CODEBOOK = 8192  # entries, of BEiT's visual tokens; CLIP's features are narrower


def matches(view: View) -> bool:
    """BEiT's blocks with absolute positions only, and without layer scale or a head of the width of features.

    DeepSpeed, by which EVA-01 was trained, keeps the weights under "module".
    """
    names = view.tensors
    if not beit.has_beit(view) or "pos_embed" not in names or any("relative_position" in name for name in names):
        return False
    head = names.get("lm_head.weight")
    features = head is not None and head.shape[0] < _CODEBOOK and "module" in view.section.split(".")
    return features or "blocks.0.gamma_1" not in names


def convert(view: View, wishes: Wishes) -> Converted:
    facts = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}
    if view.contents.fact("imagenet_default_mean_and_std"):
        facts = {}
    return beit.convert_as(view, wishes, "beit", imagenet=True, **facts)


FAMILY = replace(beit.FAMILY, name="eva01", matches=matches, convert=convert)
