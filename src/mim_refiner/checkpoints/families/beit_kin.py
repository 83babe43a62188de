"""Encoders of BEiT's architecture and names that BEiT's own files are told from by what lies in or beside them.

BEiT v2 (arXiv 2208.06366; microsoft/unilm, beit2): pre-training files have a shallow head on the class token; its
fine-tuned files are BEiT's. SimMIM with a ViT (arXiv 2111.09886; microsoft/SimMIM): a decoder of one layer. CAE (arXiv
2202.03026; lxtGH/CAE): absolute positions, twice, the encoder, which the authors fine-tune, and its running average;
fine-tuned files are BEiT's. EVA-01 (arXiv 2211.07636; baaivision/EVA): absolute positions, without layer scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mim_refiner.checkpoints.families import beit
from mim_refiner.checkpoints.families.base import Converted, Family, View, Wishes

_CODEBOOK = 8192  # entries, of BEiT's visual tokens; the features of CLIP that EVA-01 predicts are narrower


def _family(name: str, is_it: Callable[[View], bool], *, kind: str = "beit", **facts: Any) -> Family:
    """A family of ImageNet's mean and std, unless ``facts`` or the file's options say others."""

    def convert(view: View, wishes: Wishes) -> Converted:
        said = {} if view.contents.fact("imagenet_default_mean_and_std") else facts
        return beit.convert_as(view, wishes, kind, imagenet=True, **said)

    return replace(beit.FAMILY, name=name, matches=lambda view: beit.has_beit(view) and is_it(view), convert=convert)


def _is_simmim(view: View) -> bool:
    return "encoder" in view.prefix.split(".") and "decoder.0.weight" in view.beside


def _is_eva01(view: View) -> bool:
    """Absolute positions only, and no layer scale or a head of the width of features.

    DeepSpeed, by which EVA-01 was trained, keeps the weights under "module".
    """
    names = view.tensors
    if "pos_embed" not in names or any("relative_position" in name for name in names):
        return False
    head = names.get("lm_head.weight")
    features = head is not None and head.shape[0] < _CODEBOOK and "module" in view.section.split(".")
    return features or "blocks.0.gamma_1" not in names


BEIT2 = _family("beit2", lambda view: any(name.startswith("cls_pt_layers.") for name in view.tensors), kind="beitv2")
SIMMIM = _family("simmim", _is_simmim)
CAE = replace(
    _family("cae", lambda view: any(name.startswith("pretext_neck.") for name in view.beside)),
    default_encoder=("encoder",),
)
EVA01 = _family("eva01", _is_eva01, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD)
