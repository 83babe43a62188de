"""Pre-training files of TinyMIM (Ren et al., arXiv 2301.01296; layout of github.com/OliverRensu/TinyMIM).

MAE's layout without decoder. The last block has other heads than the rest, for it imitates relations of a larger
teacher; what comes after its attention was never trained. Told by the model's name among the file's options.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families import mae
from mim_refiner.checkpoints.families.base import View, Wishes
from mim_refiner.checkpoints.families.plain_vit import count_blocks, has_plain_vit
from mim_refiner.checkpoints.families.vit import vit_family
from mim_refiner.errors import InputError

_HEADS = {"tiny": (6, 12), "small": (6, 12), "base": (12, 16)}  # size -> heads of all blocks, of the last
_NOTE = "the last block has {} heads, the others {}; only its attention was trained, so take an earlier block"


def matches(view: View) -> bool:
    named = str(view.contents.fact("model")).startswith("tinymim")
    return named and view.contents.config is None and has_plain_vit(view.tensors) and not mae.has_decoder(view)


def _prepare(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    model = str(view.contents.fact("model"))
    heads, last = next((heads for size, heads in _HEADS.items() if size in model), (wishes.num_heads, wishes.num_heads))
    if heads is None or last is None:
        raise InputError(f"{view.where}: the heads of the TinyMIM model '{model}' are unknown; pass num_heads=")
    blocks = (heads,) * (count_blocks(tensors) - 1) + (last,)
    arguments = {"block_heads": blocks}
    return {"known_heads": heads, "arguments": arguments, "notes": (_NOTE.format(last, heads),)}


FAMILY = vit_family("tinymim", matches, prepare=_prepare, final_norm=True, architecture="vit_variant")
