"""Files of masked autoencoders (He et al., arXiv 2111.06377; layout of github.com/facebookresearch/mae).

Published encoder-only files and fine-tuned ones {"model": ...}, files with decoder, and training checkpoints with
optimiser and options. The encoder's names are timm's, so the key map is the identity both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_vit import TIMM_NAMES, has_plain_vit, infer_structure
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.types import BackboneInfo

DECODER = {
    "decoder_": "decoder, used only for reconstruction",
    "mask_token": "mask token, used only for reconstruction",
    "head.": "classifier",
}


def has_decoder(view: View) -> bool:
    """Whether a reconstructing decoder with a mask token lies beside a ViT with class token."""
    names = view.tensors
    decoder = any(name.startswith("decoder_blocks.") for name in names)
    return has_plain_vit(names) and "cls_token" in names and "mask_token" in names and decoder


def matches(view: View) -> bool:
    """A plain ViT with a class token that comes with MAE's decoder, or alone under "model" as the published files are.

    A ViT under "model" with a classifier but without ``fc_norm`` is not MAE's (DeiT's files look like that).
    """
    names = view.tensors
    if view.contents.config is not None or not has_plain_vit(names) or "cls_token" not in names:
        return False
    published = view.section == "model" and "reg_token" not in names and "blocks.0.ls1.gamma" not in names
    return has_decoder(view) or (published and ("head.weight" not in names or "fc_norm.weight" in names))


def convert(view: View, wishes: Wishes) -> Converted:
    """Keep the encoder, drop decoder, mask token and classifier; structure is read from names and shapes."""
    mapped = TIMM_NAMES.to_timm(view.tensors)
    fine_tuned = "fc_norm.weight" in mapped.tensors
    vit = infer_structure(mapped.tensors, wishes, view.where, final_norm=None if fine_tuned else True)
    return Converted(
        vit.architecture,
        vit.arguments,
        vit.num_heads,
        **account(view, mapped, DECODER),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        position_rule="bicubic",
        notes=vit.notes,
    )


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """The state dict under "model" of a published encoder-only file."""
    return TIMM_NAMES.from_timm(state)


FAMILY = Family("mae", PROJECTION, matches, convert, to_source)
