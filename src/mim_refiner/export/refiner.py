"""Write an encoder in the format of the published MIM-Refiner checkpoints: {"state_dict": ...}, pre- or post-norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner.checkpoints.families.renamed import to_mim_refiner
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.export.writing import Format, Pairs, every_block
from mim_refiner.files import errors_as
from mim_refiner.models.backbone import Backbone

_FILE = "model.th"  # the published files' ending


def _write(backbone: Backbone, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    extras = [name for name in ("ls1.gamma", "attn.q_norm.weight") if f"blocks.0.{name}" in backbone.model.state_dict()]
    if extras:
        raise InputError(f"--format refiner: the format has no {extras[0]} in its blocks; use --format timm or onnx")
    state = to_mim_refiner(backbone.model.state_dict(), backbone.info)
    torch.save({"state_dict": {name: tensor.detach().clone() for name, tensor in state.items()}}, folder / _FILE)
    return {"file": _FILE, "num_heads": backbone.info.num_heads}


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: dict[str, Any]) -> Pairs:
    """Every block's tokens, as this package's reader of the format gives them (it equals the published code)."""
    problem = "--format refiner: the format does not hold this encoder"
    with errors_as(InputError, problem, "choose timm", CheckpointError):
        again = load_backbone(folder, num_heads=backbone.info.num_heads)
    again.use_math_attention()
    return zip(every_block(backbone, images), every_block(again, images), strict=True)


# the published code's norms have eps 1e-6, which moves an encoder of another eps by a few 1e-6
REFINER = Format("refiner", 1e-5, "mim-refiner", "every block and the final tokens", _write, _pairs)
