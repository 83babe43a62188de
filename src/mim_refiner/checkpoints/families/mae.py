"""Files of masked autoencoders (He et al., arXiv 2111.06377; layout of github.com/facebookresearch/mae).

Published encoder-only files and fine-tuned ones {"model": ...}, files with decoder, and training checkpoints with
optimiser and options. The encoder's names are timm's, so the key map is the identity both ways.
"""

from __future__ import annotations

from mim_refiner.checkpoints.families.base import Converted, Family, Wishes
from mim_refiner.checkpoints.families.plain_vit import has_plain_vit, infer_structure, is_encoder_name
from mim_refiner.checkpoints.store import Contents, strip_wrappers
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD

NAME = "mae"

_DROPPED = {
    "decoder_": "decoder, used only for reconstruction",
    "mask_token": "mask token, used only for reconstruction",
    "head.": "classifier",
}


def find_section(contents: Contents) -> str | None:
    """A plain ViT with a class token that comes with MAE's decoder, or alone under "model" as the published files are.

    A ViT under "model" with a classifier but without ``fc_norm`` is not MAE's (DeiT's files look like that).
    """
    if contents.config is not None:
        return None
    for path in ("model", ""):
        names = {strip_wrappers(name) for name in contents.section(path)}
        if not has_plain_vit(names) or "cls_token" not in names:
            continue
        has_decoder = "mask_token" in names and any(name.startswith("decoder_blocks.") for name in names)
        published = path == "model" and "reg_token" not in names and "blocks.0.ls1.gamma" not in names
        if has_decoder or (published and ("head.weight" not in names or "fc_norm.weight" in names)):
            return path
    return None


def convert(contents: Contents, section: str, wishes: Wishes) -> Converted:
    """Keep the encoder, drop decoder, mask token and classifier; structure is read from names and shapes."""
    tensors = contents.section(section)
    names = {strip_wrappers(name): name for name in tensors}
    dropped = {
        name: reason for short, name in names.items() for prefix, reason in _DROPPED.items() if short.startswith(prefix)
    }
    encoder = {short: tensors[name] for short, name in names.items() if is_encoder_name(short)}
    vit = infer_structure(encoder, wishes, contents.source, needs_norm="fc_norm.weight" not in encoder)
    return Converted(
        architecture=vit.architecture,
        arguments=vit.arguments,
        num_heads=vit.num_heads,
        tensors=encoder,
        origin={short: names[short] for short in encoder},
        dropped=dropped,
        unplaced=tuple(name for short, name in names.items() if short not in encoder and name not in dropped),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        notes=(*vit.notes, "licence: that of the published MAE weights; weights trained by others carry their own"),
    )


FAMILY = Family(NAME, find_section, convert)
