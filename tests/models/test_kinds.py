"""Every kind of encoder: equal to timm, any size where it allows it, sub-ranges of blocks, and refinement steps."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

from mim_refiner.core.layer_decay import layer_decay_scales
from mim_refiner.core.optim import adamw, parameter_groups
from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.positions import resize_absolute, resize_relative
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.refine import forward_backward

STAGES: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2), "window_size": 2}
BEIT: dict[str, Any] = {"patch_size": 8, "img_size": 32}
# timm name, arguments, sizes of a global and a local view
BY_BLOCK = [
    ("vit_postnorm", {"patch_size": 8, "img_size": 32}, 32, 16),
    ("vit_variant", {"patch_size": 8, "img_size": 32, "patch_padding": 2, "block_heads": (2, 2, 3)}, 32, 16),
    ("vit_capi", {"patch_size": 8, "img_size": 32, "reg_tokens": 4}, 32, 16),
    ("beit_base_patch16_224", BEIT, 32, 16),
    ("beit_base_patch16_224", BEIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, 32, 24),
    ("beit_base_patch16_224", BEIT | {"use_rel_pos_bias": False, "use_abs_pos_emb": True}, 32, 24),
    ("eva02_tiny_patch14_224", {"img_size": 56}, 56, 28),
]
BY_STAGE = [
    ("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}, 224, 224),
    ("convnextv2_atto", {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}, 64, 32),
    ("swin_tiny_patch4_window7_224", STAGES | {"img_size": 64}, 64, 32),
    ("swinv2_tiny_window8_256", STAGES | {"img_size": 64}, 64, 32),
]


def make(name: str, arguments: dict[str, Any]) -> Backbone:
    staged = {"depths", "stages"} & arguments.keys()
    small = {} if staged else {"embed_dim": 24, "depth": 3, "num_heads": 2}
    model = timm.create_model(name, num_classes=0, **small | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model).eval()


@pytest.mark.parametrize(("name", "arguments", "size", "local"), BY_BLOCK)
def test_equal_to_timm_and_to_itself_in_parts(name: str, arguments: dict[str, Any], size: int, local: int) -> None:
    backbone = make(name, arguments)
    images = torch.randn(2, 3, size, size)
    expected = backbone.model.forward_features(images)
    [last] = backbone.forward_blocks(images, [-1], norm=True)
    torch.testing.assert_close(last.patches, expected[:, backbone.info.num_prefix_tokens :], rtol=0, atol=1e-5)
    patch = backbone.info.patch_size[0]
    for shape in ((size, size), (local, local), (2 * patch, 4 * patch)):
        images = torch.randn(2, 3, *shape)
        grid = backbone.grid_of(tuple(images.shape[-2:]))
        with torch.no_grad():
            tokens, _ = backbone.run_blocks(backbone.embed(images), 0, 1, grid=grid)
        tokens, outputs = backbone.run_blocks(tokens, 1, 3, (2,), grid=grid)
        [whole] = backbone.forward_blocks(images, [2])
        torch.testing.assert_close(backbone.split(outputs[2]).patches, whole.patches, rtol=0, atol=1e-5)
        if shape[0] == shape[1]:  # the grid of square images needs no telling
            again, _ = backbone.run_blocks(backbone.embed(images), 0, 3)
            torch.testing.assert_close(again, tokens, rtol=0, atol=1e-5)
    if not backbone.is_plain_vit:
        with pytest.raises(InputError, match="are no square image; pass the grid"):
            backbone.run_blocks(backbone.embed(torch.randn(1, 3, patch, 2 * patch)), 0, 1)


@pytest.mark.parametrize(("name", "arguments", "size", "local"), BY_BLOCK + BY_STAGE)
def test_two_steps_of_refinement(name: str, arguments: dict[str, Any], size: int, local: int) -> None:
    backbone = make(name, arguments)
    depth = backbone.info.depth
    by_block = backbone.runner is not None
    refiner = Refiner(
        backbone, [depth - 2, depth - 1], HeadConfig(16, 16, 8, 32), pooling="mean", frozen_blocks=int(by_block)
    )
    refiner.unfreeze_encoder()
    scales = layer_decay_scales(backbone.model, 0.5)
    assert set(scales.values()) <= {0.5**k for k in range(8)}
    assert min(scales.values()) < 0.5
    groups = parameter_groups(backbone.model.named_parameters(), weight_decay=0.05, scales=scales)
    optimizer = adamw(groups + parameter_groups(refiner.heads.named_parameters(), weight_decay=0.0), (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["lr_scale"]
    before = {key: value.clone() for key, value in backbone.model.named_parameters()}
    for step in range(2):
        views = [torch.randn(2, 3, side, side) for side in (size, size, local)]
        optimizer.zero_grad()
        output = forward_backward(refiner, views, torch.arange(2) + 2 * step, None, Run())
        optimizer.step()
        assert torch.isfinite(output.loss)
    for key, parameter in backbone.model.named_parameters():
        frozen = key.partition(".")[0] in ("pos_embed", "head", "fc_norm") or key.endswith("attn.freqs")
        frozen |= by_block and (not key.startswith(("blocks.", "norm.")) or key.startswith("blocks.0."))
        assert torch.equal(parameter, before[key]) == frozen, key


def test_an_encoder_of_fixed_size_says_so() -> None:
    backbone = make(*BY_STAGE[0][:2])
    with pytest.raises(InputError, match="takes images of 224x224 pixels only, got 96x96"):
        backbone.forward_blocks(torch.randn(1, 3, 96, 96))


def test_another_size_of_a_beit_is_reached_without_warnings() -> None:
    """timm's own interpolation of relative tables warns once in a process."""
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 1}
    backbone = Backbone.wrap(timm.create_model("beit_base_patch16_224", num_classes=0, **arguments))
    torch.set_warn_always(True)
    try:
        backbone.set_image_size((24, 16))
    finally:
        torch.set_warn_always(False)
    assert backbone.model.blocks[0].attn.relative_position_bias_table.shape[0] == 5 * 3 + 3


@pytest.mark.filterwarnings("ignore::UserWarning")  # of timm's own interpolation
@pytest.mark.parametrize(("old", "new"), [((4, 4), (2, 2)), ((4, 4), (7, 3)), ((3, 5), (5, 5)), ((2, 3), (9, 8))])
def test_relative_tables_as_timm_resizes_them(old: tuple[int, int], new: tuple[int, int]) -> None:
    entries = [(2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 for grid in (old, new)]
    table = torch.randn(entries[0], 4, requires_grad=True)
    expected = resize_rel_pos_bias_table(table.detach(), new, (entries[1], 4), old_window_size=old)
    got = resize_relative(table, old, new, rule="timm")
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=2e-5)
    got.sum().backward()
    assert table.grad is not None


def absolute_slowly(table: Tensor, old: tuple[int, int], new: tuple[int, int], offset: float) -> Tensor:
    """Bicubic interpolation (a = -0.75, border repeated) entry by entry."""

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

    grid = table.double().reshape(*old, -1)
    result = torch.zeros(*new, grid.shape[2], dtype=torch.float64)
    scale = [before / (after + offset) for before, after in zip(old, new, strict=True)]
    for row in range(new[0]):
        for column in range(new[1]):
            y, x = (row + 0.5) * scale[0] - 0.5, (column + 0.5) * scale[1] - 0.5
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    at = (int(y // 1) + dy, int(x // 1) + dx)
                    near = [min(max(place, 0), side - 1) for place, side in zip(at, old, strict=True)]
                    result[row, column] += weight(y - at[0]) * weight(x - at[1]) * grid[near[0], near[1]]
    return result.reshape(1, -1, grid.shape[2]).float()


@pytest.mark.parametrize(("rule", "offset"), [("bicubic", 0.0), ("hf", 0.0), ("dino", 0.1)])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (2, 3)), ((3, 4), (5, 7))])
def test_absolute_tables_by_each_rule(rule: str, offset: float, old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + old[0] * old[1], 3)
    got = resize_absolute(table, old, new, num_prefix=1, rule=rule)
    assert torch.equal(got[:, :1], table[:, :1])
    torch.testing.assert_close(got[:, 1:], absolute_slowly(table[:, 1:], old, new, offset), rtol=0, atol=1e-4)
    assert resize_absolute(table, old, old, num_prefix=1, rule=rule) is table


def test_unknown_rule() -> None:
    with pytest.raises(InputError, match="position rule 'nearest' is unknown; use timm, flexi, bicubic"):
        Backbone.wrap(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0), position_rule="nearest")
