from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from mim_refiner.core.layer_decay import layer_decay_scales, negligible_blocks
from mim_refiner.errors import InputError


def vit(depth: int, **options: object) -> nn.Module:
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(depth=depth, **{**settings, **options})


@pytest.mark.parametrize(
    ("case", "depth"), [("prenorm_depth6_decay065", 6), ("L16names_decay065", 24), ("H14names_decay065", 32)]
)
def test_golden_scale_of_every_parameter(golden_dir: Path, case: str, depth: int) -> None:
    reference = json.loads((golden_dir / "schedule" / "layerwise_lr_decay.json").read_text())[case]
    scales = layer_decay_scales(vit(depth), 0.65)
    ours = {name.replace("cls_tokens.tokens", "cls_token"): entry["lr_scale"] for name, entry in reference.items()}
    # the reference has no scale for the final norm (full rate), and its position table is no parameter
    expected = {name: 1.0 if scale is None else scale for name, scale in ours.items()}
    expected["pos_embed"] = expected["cls_token"]
    assert scales == expected


def test_covers_tokens_tail_and_extra_stem_parts() -> None:
    model = vit(2, num_classes=3, reg_tokens=2, pre_norm=True, global_pool="avg")
    scales = layer_decay_scales(model, 0.5)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert scales["reg_token"] == scales["norm_pre.weight"] == 0.5**3
    assert scales["blocks.0.mlp.fc1.weight"] == 0.5**2
    assert scales["blocks.1.norm1.bias"] == 0.5
    assert scales["fc_norm.weight"] == scales["head.weight"] == 1
    assert set(layer_decay_scales(model, 1.0).values()) == {1.0}


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InputError, match="above 0 and at most 1"):
        layer_decay_scales(vit(1), 1.5)
    with pytest.raises(InputError, match="Linear has none"):
        layer_decay_scales(nn.Linear(2, 2), 0.65)
    model = vit(1)
    model.register_parameter("adapter", nn.Parameter(torch.zeros(1)))
    with pytest.raises(InputError, match="'adapter'"):
        layer_decay_scales(model, 0.65)


def test_blocks_that_hardly_move() -> None:
    """ViT-L with decay 0.65: 0.65^17 = 6.6e-4 at block 7, 0.65^16 = 1.02e-3 at block 8."""
    assert negligible_blocks(24, 0.65, 1e-3) == 8
    assert negligible_blocks(24, 1.0, 1e-3) == 0
    assert negligible_blocks(12, 0.9, 1e-3) == 0
