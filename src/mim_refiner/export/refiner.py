"""Write an encoder in the format of the published MIM-Refiner checkpoints: {"state_dict": ...}, pre- or post-norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.families.renamed import REFINER_KEYS
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.export.writing import Format, Pairs, every_block
from mim_refiner.files import errors_as
from mim_refiner.models.backbone import Backbone

_FILE = "model.th"  # the published files' ending


def _write(backbone: Backbone, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    info, state = backbone.info, dict(backbone.model.state_dict())
    if extra := next((name for name in ("ls1.gamma", "attn.q_norm.weight") if f"blocks.0.{name}" in state), None):
        raise InputError(f"--format refiner: the format has no {extra} in its blocks; use --format timm or onnx")
    if not {"pos_embed", "cls_token"} <= state.keys() or info.num_prefix_tokens != 1:
        raise InputError(
            "--format refiner: the format holds encoders with a class token, a position table and no registers only; "
            "choose --format timm"
        )
    if not {"norm.weight", "fc_norm.weight", "norm_pre.weight"} & state.keys():
        raise InputError("--format refiner: the format has no encoders without final norm; choose --format timm")
    rows, columns = backbone.grid_of(info.image_size)
    table = state["pos_embed"]
    if table.shape[1] == rows * columns + 1:  # the format's has no entry for the class token
        state["cls_token"], table = state["cls_token"] + table[:, :1], table[:, 1:]
    state["pos_embed"] = table.reshape(1, rows, columns, -1)
    tensors = {name: tensor.detach().clone() for name, tensor in REFINER_KEYS.from_timm(state).items()}
    torch.save({"state_dict": tensors}, folder / _FILE)
    return {"file": _FILE, "num_heads": info.num_heads}


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: dict[str, Any]) -> Pairs:
    """Every block's tokens, as this package's reader of the format gives them (it equals the published code)."""
    problem = "--format refiner: the format does not hold this encoder"
    with errors_as(InputError, problem, "choose timm", CheckpointError):
        again = load_backbone(folder, num_heads=backbone.info.num_heads)
    again.use_math_attention()
    return zip(every_block(backbone, images), every_block(again, images), strict=True)


# the published code's norms have eps 1e-6, which moves an encoder of another eps by a few 1e-6
REFINER = Format("refiner", 1e-5, "mim-refiner", "every block and the final tokens", _write, _pairs)
