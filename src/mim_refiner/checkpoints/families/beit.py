"""Files of BEiT (Bao et al., arXiv 2106.08254; layout of github.com/microsoft/unilm, beit), pre-trained and fine-tuned.

Pre-trained: one table of relative positions for all blocks and a final norm; fine-tuned: a table per block and a norm
after pooling. The names are timm's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.plain_beit import BEIT_NAMES, infer_beit
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.types import BackboneInfo

BEIT_MEAN = BEIT_STD = (0.5, 0.5, 0.5)
INDEX = "relative_position_index"
DROPPED = {
    "lm_head.": "predicts visual tokens, used only in pre-training",
    "mask_token": "mask token, used only in pre-training",
    "cls_pt_layers.": "shallow head on the class token, used only in pre-training",
    "head.": "classifier",
}
_ALIKE = "fine-tuned files of BEiT and BEiT v2 are alike; v2 wants ImageNet's mean and std instead of 0.5"


def has_beit(view: View) -> bool:
    """Blocks with separate query and value biases under timm's (and the original) names, no config beside them."""
    return view.contents.config is None and {"blocks.0.attn.q_bias", "cls_token"} <= view.tensors.keys()


def convert_as(view: View, wishes: Wishes, name: str, *, imagenet: bool, notes: tuple[str, ...] = ()) -> Converted:
    """The conversion that BEiT, BEiT v2 and SimMIM share; ``name`` starts timm's architecture name."""
    mapped = BEIT_NAMES.to_timm(view.tensors)
    index = next((tensor for key, tensor in view.tensors.items() if key.endswith(INDEX)), None)
    beit = infer_beit(mapped.tensors, wishes, view.where, index=index, name=name)
    indices = {short: "computed from the grid" for short in mapped.rest if short.endswith(INDEX)}
    return Converted(
        beit.architecture,
        beit.arguments,
        beit.num_heads,
        **account(view, mapped, indices | DROPPED),
        mean=IMAGENET_MEAN if imagenet else BEIT_MEAN,
        std=IMAGENET_STD if imagenet else BEIT_STD,
        position_rule="bicubic",
        pooling="mean",
        notes=beit.notes + notes,
    )


def convert(view: View, wishes: Wishes) -> Converted:
    fine_tuned = "fc_norm.weight" in view.tensors
    return convert_as(view, wishes, "beit", imagenet=False, notes=(_ALIKE,) if fine_tuned else ())


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """The encoder's part of a state dict under "model"."""
    return BEIT_NAMES.from_timm(state)


FAMILY = Family("beit", PROJECTION, has_beit, convert, to_source)
