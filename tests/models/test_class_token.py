"""The last block for the class token alone: values and gradients of the whole block, for every kind it is used on."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mim_refiner.models.backbone import Backbone
from mim_refiner.models.runners import class_token_after
from mim_refiner.models.stochastic import draw_by_row

VIT: dict[str, Any] = {"patch_size": 8, "img_size": 32}
KINDS = [
    ("vit_tiny_patch16_224", VIT),
    ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2, "init_values": 0.3, "drop_path_rate": 0.5}),
    ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
    ("vit_tiny_patch16_224", VIT | {"qkv_bias": False}),
    ("vit_postnorm", VIT | {"drop_path_rate": 0.5}),
    ("beit_base_patch16_224", VIT),
    ("beit_base_patch16_224", VIT | {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ("beit_base_patch16_224", VIT | {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": None}),
    ("eva02_tiny_patch14_224", {"img_size": 56}),
    ("eva_giant_patch14_224", {"img_size": 56, "mlp_ratio": 2.0}),
]


def make(name: str, options: dict[str, Any]) -> Backbone:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **{"embed_dim": 24, "depth": 3, "num_heads": 2} | options)
    draw_by_row(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model).double().train()


def run(backbone: Backbone, images: Tensor, alone: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Class token after the last block and the final norm, the gradients of its square, and that of the images."""
    torch.manual_seed(5)
    backbone.zero_grad()
    images = images.clone().requires_grad_()
    tokens, outputs = backbone.run_blocks(backbone.embed(images), 0, 3, (2,), class_token_last=alone)
    assert (tokens.shape[1] == 1) == alone
    token = backbone.split(backbone.final_norm(outputs[2])).pooled("cls")
    (token * torch.linspace(-1, 1, token.numel(), dtype=token.dtype).view_as(token)).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    assert images.grad is not None
    return token.detach(), gradients, images.grad


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_values_and_gradients_are_those_of_the_whole_block(name: str, options: dict[str, Any]) -> None:
    backbone = make(name, options)
    images = torch.randn(3, 3, *(options["img_size"],) * 2, dtype=torch.float64)
    value, gradients, at_images = run(backbone, images, alone=True)
    expected, theirs, theirs_at_images = run(backbone, images, alone=False)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_images, theirs_at_images, rtol=1e-11, atol=1e-12)
    assert gradients.keys() == theirs.keys()
    for key, gradient in theirs.items():
        scale = max(1e-2, float(gradient.abs().max()))  # that of a bias of the keys is nothing but rounding
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-11, atol=1e-11 * scale, msg=key)


def test_dropout_of_the_attention_keeps_the_mean() -> None:
    backbone = make("vit_tiny_patch16_224", VIT | {"attn_drop_rate": 0.5})
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    block = backbone.model.blocks[2]
    tokens, _ = backbone.eval().run_blocks(backbone.embed(images), 0, 2)
    many = tokens.expand(4000, -1, -1)
    normed = block.norm1(many)
    steady = block.attn(normed[:1])[:, 0]
    block.attn.train()
    dropped = block.attn(normed)[:, 0]
    alone = class_token_after(block, many)
    assert alone is not None
    from mim_refiner.models.runners import _attended

    own = _attended(block.attn, normed)[:, 0]
    assert (own.mean(0) - steady).abs().max() < 0.05
    torch.testing.assert_close(own.std(0), dropped.std(0), rtol=0.1, atol=0.01)


def test_other_kinds_run_whole() -> None:
    backbone = Backbone.wrap(
        timm.create_model("vit_capi", num_classes=0, embed_dim=24, depth=2, num_heads=2, **VIT, reg_tokens=4)
    )
    tokens, _ = backbone.run_blocks(backbone.embed(torch.randn(1, 3, 32, 32)), 0, 2, class_token_last=True)
    assert tokens.shape[1] == 20
