"""Files of BEiT (Bao et al., arXiv 2106.08254; layout of github.com/microsoft/unilm, beit), pre-trained and fine-tuned.

Pre-trained: one table of relative positions for all blocks and a final norm; fine-tuned: a table per block and a norm
after pooling. The names are timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import DROPPED, PROJECTION, Converted, Family, View, Wishes, account
from mim_refiner.checkpoints.families.keymap import KeyMap
from mim_refiner.checkpoints.families.plain_beit import BEIT_NAMES, infer_beit
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD
from mim_refiner.types import BackboneInfo

BEIT_MEAN = BEIT_STD = (0.5, 0.5, 0.5)
INDEX = "relative_position_index"
_ALIKE = "fine-tuned files of BEiT and BEiT v2 are alike; v2 wants ImageNet's mean and std instead of 0.5"


def has_beit(view: View) -> bool:
    """Blocks with separate query and value biases under timm's (and the original) names, no config beside them.

    Not beside a decoder of MAE's (MSM-MAE has these biases).
    """
    names = view.tensors.keys()
    return view.contents.config is None and {"blocks.0.attn.q_bias", "cls_token"} <= names and not mae.has_decoder(view)


def convert_as(
    view: View,
    wishes: Wishes,
    name: str,
    *,
    imagenet: bool,
    keys: KeyMap = BEIT_NAMES,
    dropped: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
    **facts: Any,
) -> Converted:
    """The conversion that all families of BEiT's architecture share; ``name`` starts timm's architecture name.

    The file's own options say more of mean and std than ``imagenet``; ``facts`` are fields of :class:`Converted`.
    """
    mapped = keys.to_timm(view.tensors)
    index = next((tensor for key, tensor in view.tensors.items() if key.endswith(INDEX)), None)
    beit = infer_beit(mapped.tensors, wishes, view.where, index=index, name=name)
    option = view.contents.fact("imagenet_default_mean_and_std")
    imagenet = imagenet if option is None else bool(option)
    values = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if imagenet else {"mean": BEIT_MEAN, "std": BEIT_STD}
    by_token = "head.weight" in view.tensors and "norm.weight" in mapped.tensors  # a classifier behind the final norm
    return Converted(
        beit.architecture,
        beit.arguments,
        beit.num_heads,
        **account(view, mapped, {**(dropped or {}), **DROPPED}),
        **(
            {"position_rule": "bicubic", "pooling": "cls" if by_token else "mean", "notes": beit.notes + notes}
            | values
            | facts
        ),
    )


def convert(view: View, wishes: Wishes) -> Converted:
    fine_tuned = "fc_norm.weight" in view.tensors
    return convert_as(view, wishes, "beit", imagenet=False, notes=(_ALIKE,) if fine_tuned else ())


def to_source(state: Mapping[str, Tensor], info: BackboneInfo) -> dict[str, Tensor]:
    """The encoder's part of a state dict under "model"."""
    return BEIT_NAMES.from_timm(state)


FAMILY = Family("beit", PROJECTION, has_beit, convert, to_source)
