"""Backbone: block outputs against timm's own, sub-ranges, gradients, resolutions, and every refusal."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.vit import architecture_name, vit_arguments

ARCH = "vit_w32_d4_h4_p8"


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """All parameters non-trivial, so that a swapped or skipped part shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.wrap(randomised(create_vit(ARCH, 32, reg_tokens=2)))


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
@pytest.mark.parametrize("norm", [False, True])
def test_blocks_equal_timm_intermediates(backbone: Backbone, size: tuple[int, int], norm: bool) -> None:
    images = torch.randn(2, 3, *size)
    expected = backbone.model.forward_intermediates(
        images, norm=norm, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    outputs = backbone.forward_blocks(images, norm=norm)
    assert len(outputs) == 4
    for output, (patches, prefix) in zip(outputs, expected, strict=True):
        assert output.cls is not None
        torch.testing.assert_close(output.cls, prefix[:, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(output.patches, patches, rtol=0, atol=1e-6)


def test_last_block_with_norm_is_the_models_output(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    [last] = backbone.forward_blocks(images, [-1], norm=True)
    torch.testing.assert_close(last.patches, backbone.model.forward_features(images)[:, 3:], rtol=0, atol=1e-6)


def test_order_repeats_and_negative_indices(backbone: Backbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    every = backbone.forward_blocks(images)
    for index, output in zip([3, 0, 2, 0], backbone.forward_blocks(images, [-1, 0, 2, -4]), strict=True):
        assert torch.equal(output.patches, every[index].patches)
    assert backbone.forward_blocks(images, []) == []


def test_blocks_after_the_deepest_do_not_run(backbone: Backbone) -> None:
    ran: list[int] = []
    for index, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    backbone.forward_blocks(torch.randn(1, 3, 32, 32), [1, 0])
    assert ran == [0, 1]


def test_sub_ranges_compose_and_gradients_stop_at_a_frozen_prefix(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, nothing = backbone.run_blocks(backbone.embed(images), 0, 2)
    assert nothing == {}
    tokens, outputs = backbone.run_blocks(tokens, 2, 4, (2, 3))
    assert sorted(outputs) == [2, 3]
    assert torch.equal(tokens, outputs[3])
    [expected] = backbone.forward_blocks(images, [3])
    assert torch.equal(backbone.split(outputs[3]).patches, expected.patches)
    outputs[3].square().mean().backward()
    with_gradient = {name.split(".")[1] for name, p in backbone.model.named_parameters() if p.grad is not None}
    assert with_gradient == {"2", "3"}


def test_recomputation_gives_the_same_gradients(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        backbone.set_checkpointing(recompute)
        backbone.zero_grad()
        backbone.forward_blocks(images, [2])[0].pooled("cls").square().sum().backward()
        gradients.append(backbone.model.blocks[0].attn.qkv.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_math_attention_computes_the_same(backbone: Backbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    before = backbone.forward_blocks(images, [-1])[0].patches
    backbone.use_math_attention()
    assert not any(getattr(module, "fused_attn", False) for module in backbone.modules())
    torch.testing.assert_close(backbone.forward_blocks(images, [-1])[0].patches, before, rtol=0, atol=1e-5)


def test_fixed_parameters(backbone: Backbone) -> None:
    names = {parameter: name for name, parameter in backbone.model.named_parameters()}
    assert [names[p] for p in backbone.fixed_parameters()] == ["pos_embed"]
    frozen = {names[p] for p in backbone.fixed_parameters(2)}
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"} <= frozen
    assert not any(name.startswith(("blocks.2", "blocks.3", "norm.")) for name in frozen)
    assert {name for name in names.values() if name.startswith("blocks.0.")} <= frozen


def test_norm_after_pooling_belongs_to_the_classifier() -> None:
    backbone = Backbone.wrap(randomised(create_vit(ARCH, 32, class_token=False, global_pool="avg", fc_norm=True)))
    images = torch.randn(1, 3, 32, 32)
    raw, normed = (backbone.forward_blocks(images, [-1], norm=norm)[0] for norm in (False, True))
    assert raw.cls is None
    assert torch.equal(raw.patches, normed.patches)
    names = {parameter: name for name, parameter in backbone.model.named_parameters()}
    assert {names[p] for p in backbone.fixed_parameters()} == {"pos_embed", "fc_norm.weight", "fc_norm.bias"}


def test_a_model_built_without_dynamic_sizes_is_switched() -> None:
    fixed = VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    expected = fixed.eval().forward_features(images)
    backbone = Backbone.wrap(fixed)
    torch.testing.assert_close(
        backbone.forward_blocks(images, [-1], norm=True)[0].cls, expected[:, 0], rtol=0, atol=1e-6
    )
    assert backbone.forward_blocks(torch.randn(1, 3, 16, 48), [-1])[0].patches.shape == (1, 12, 32)


def test_info_of_a_custom_and_of_a_registered_size() -> None:
    info = Backbone.wrap(create_vit(ARCH, (32, 16), in_chans=1), family="mae", licence="MIT").info
    assert info.architecture == "vit(dim=32,depth=4,heads=4,patch=8)"
    assert (info.embed_dim, info.depth, info.num_heads, info.patch_size) == (32, 4, 4, (8, 8))
    assert (info.image_size, info.in_chans, info.num_prefix_tokens, info.has_cls) == ((32, 16), 1, 1, True)
    assert (info.family, info.licence, len(info.mean), len(info.std)) == ("mae", "MIT", 1, 1)
    fitting = Backbone.wrap(create_vit(ARCH, 32, in_chans=2), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2)).info
    assert (len(fitting.mean), fitting.std) == (2, (0.1, 0.2))  # timm's records have three values for any images
    assert architecture_name(create_vit(info.architecture, 32)) == info.architecture
    with torch.device("meta"):
        assert architecture_name(create_vit("vit_base_patch16_224", 160)) == "vit_base_patch16_224"
        assert (
            architecture_name(create_vit("vit_tiny_patch16_224", embed_dim=384, num_heads=6)) == "vit_small_patch16_224"
        )


def test_arguments_read_back_rebuild_the_same_structure() -> None:
    model = create_vit(
        ARCH, (48, 32), reg_tokens=2, no_embed_class=True, init_values=0.1, qkv_bias=False, pre_norm=True
    )
    arguments = vit_arguments(model)
    rebuilt = create_vit("vit_tiny_patch16_224", **{k: v for k, v in arguments.items() if v is not None})
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert rebuilt.patch_embed.img_size == (48, 32)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "convnext_atto"])
def test_other_timm_models_through_intermediates(name: str) -> None:
    backbone = Backbone.wrap(timm.create_model(name, num_classes=0)).eval()
    images = torch.randn(1, 3, *backbone.info.image_size)
    first, last = backbone.forward_blocks(images, [0, -1], norm=True)
    assert last.patches.shape[2] == backbone.info.embed_dim
    assert (first.cls is not None) == backbone.info.has_cls
    expected = backbone.model.forward_features(images)
    if backbone.info.has_cls:
        torch.testing.assert_close(last.cls, expected[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(last.patches, expected[:, 1:], rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(last.patches, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    if backbone.runner is None:
        with pytest.raises(InputError, match="without frozen blocks"):
            backbone.run_blocks(images, 1, 2)


@pytest.mark.parametrize(
    ("images", "blocks", "message"),
    [
        (torch.zeros(1, 3, 32, 32), [4], r"block 4 is out of range: the encoder has blocks 0 to 3"),
        (torch.zeros(1, 3, 32, 32), [-5], r"block -5 is out of range"),
        (torch.zeros(1, 3, 30, 32), None, r"30x32 is not a multiple of the patch size 8x8; use for example 32x32"),
        (torch.zeros(1, 3, 0, 32), None, r"0x32 is not a multiple"),
        (torch.zeros(1, 1, 32, 32), None, r"shape \[B, 3, H, W\], got \[1, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), None, r"got \[3, 32, 32\]"),
    ],
)
def test_unusable_input(backbone: Backbone, images: torch.Tensor, blocks: list[int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backbone.forward_blocks(images, blocks)


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        (
            "vit_tiny_patch61_224",
            32,
            "unknown architecture 'vit_tiny_patch61_224'; did you mean 'vit_tiny_patch16_224'",
        ),
        ("vit_small", 32, "unknown architecture 'vit_small'; did you mean 'vit_small_patch16_224'"),
        ("resnet18", 32, "architecture 'resnet18' is no plain ViT of timm; take one, such as vit_small_patch16_224"),
        ("beit_base_patch16_224", 32, "architecture 'beit_base_patch16_224' is no plain ViT of timm"),
        ("swin_tiny_patch4_window7_224", None, "is no plain ViT of timm"),  # takes every argument of a ViT
        ("vitamin_small_224", None, "is no plain ViT of timm"),  # a VisionTransformer of convolutions
        ("vit_w30_d2_h4_p8", 32, "width 30 is not a multiple of 4 heads"),
        ("vit_w32_d0_h4_p8", 32, "at least 1"),
        (ARCH, 36, "36x36 is not a multiple of the patch size 8x8"),
    ],
)
def test_unusable_architecture(arch: str, size: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_vit(arch, size)


def test_a_model_without_intermediates_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no forward_intermediates"):
        Backbone.wrap(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks at every input
def test_compiled_blocks_give_the_same_tokens_and_keep_their_names():
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16))
    images = torch.randn(2, 3, 16, 16)
    names, before = list(backbone.state_dict()), backbone.forward_blocks(images, [-1])[0]
    backbone.compile_blocks()
    assert list(backbone.state_dict()) == names
    after = backbone.forward_blocks(images, [-1])[0]
    torch.testing.assert_close(after.patches, before.patches, rtol=1e-5, atol=1e-5)
    after.patches.sum().backward()
    assert backbone.model.blocks[0].mlp.fc1.weight.grad is not None
