"""Encoders that are asked through timm's forward_intermediates: size, other sizes and exports as timm has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import InputError
from mim_refiner.export.huggingface import HUGGING_FACE
from mim_refiner.export.timm import export_timm
from mim_refiner.export.writing import CheckImages, write_export

_BLOCKS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_STAGES = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "img_size": 32}
_HIERA = {"embed_dim": 16, "num_heads": 1, "stages": [1, 1, 1, 1], "img_size": [64, 64]}
# name -> (timm's name, arguments, size of the file, other size, whether timm itself loads at the other)
KINDS: dict[str, tuple[str, dict[str, Any], tuple[int, int], tuple[int, int], bool]] = {
    "hiera": ("hiera_tiny_224", _HIERA, (64, 64), (32, 96), False),
    "swin": ("swin_tiny_patch4_window7_224", _STAGES, (32, 32), (32, 48), True),
    "convnextv2": ("convnextv2_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, (224, 224), (64, 96), False),
    "cait": ("cait_xxs24_224", _BLOCKS | {"img_size": 64}, (64, 64), (32, 96), False),
    "xcit": ("xcit_nano_12_p16_224", _BLOCKS | {"img_size": 64}, (64, 64), (32, 96), True),
    "aimv2": ("aimv2_large_patch14_224", _BLOCKS | {"img_size": 28}, (28, 28), (28, 42), True),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, tuple[int, int], tuple[int, int], bool]:
    name, arguments, size, other, by_timm = KINDS[request.param]
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    model = timm.create_model(name, num_classes=0, **given)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_for_hf(model, tmp_path / "folder", model_args=arguments)
    return tmp_path / "folder", size, other, by_timm


def stages_of_timm(folder: Path, images: Tensor, **arguments: Any) -> list[Tensor]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
    with torch.inference_mode():
        return model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")


def assert_stages(backbone: Any, images: Tensor, expected: list[Tensor]) -> None:
    with torch.inference_mode():
        outputs = backbone.forward_blocks(images)
    assert len(outputs) == len(expected)
    for output, stage in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.patches, stage.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)


def test_size_other_size_and_export(kind: tuple[Path, tuple[int, int], tuple[int, int], bool], tmp_path: Path) -> None:
    folder, size, other, by_timm = kind
    backbone = load_backbone(folder)
    assert backbone.info.image_size == inspect_checkpoint(folder).image_size == size
    assert (backbone.info.has_cls, backbone.info.num_prefix_tokens, backbone.info.pooling) == (False, 0, "mean")
    assert_stages(backbone, torch.ones(1, 3, *size), stages_of_timm(folder, torch.ones(1, 3, *size)))
    resized, images = load_backbone(folder, image_size=other), torch.randn(2, 3, *other)
    assert resized.info.image_size == other
    if by_timm:
        assert_stages(resized, images, stages_of_timm(folder, images, img_size=other))
    facts = export_timm(resized, tmp_path / "export", images=CheckImages(images, "noise"))
    assert facts["max_abs_difference"] == 0.0
    again = load_backbone(tmp_path / "export")
    assert (again.info.image_size, again.info.pooling) == (other, "mean")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), resized.parameters(), strict=True))
    with pytest.raises(InputError, match=r"--format hf: [^\x1b]* use --format timm or onnx"):
        write_export(HUGGING_FACE, backbone, tmp_path / "hf", images=CheckImages(torch.zeros(1, 3, *size), "zeros"))


@pytest.mark.parametrize("name", ["vit_small_r26_s32_224", "flexivit_small", "samvit_base_patch16"])
def test_vits_with_a_stem_or_tables_of_their_own(tmp_path: Path, name: str) -> None:
    """Hybrids count patches of the image, FlexiViT resizes as timm loads it, SAM's tables stay as they are."""
    sam = {"window_size": 2, "global_attn_indexes": [1]} if name.startswith("sam") else {}
    arguments = {**_BLOCKS, "img_size": 64, **sam}
    model = timm.create_model(name, num_classes=0, **arguments)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_for_hf(model, tmp_path, model_args=arguments)
    backbone, images = load_backbone(tmp_path), torch.randn(1, 3, 64, 64)
    assert backbone.info.patch_size == ((32, 32) if "s32" in name else (16, 16))
    assert_stages(backbone, images, stages_of_timm(tmp_path, images))
    if sam:
        with pytest.raises(InputError, match=r"samvit_base_patch16 has positions \(pos_embed\).*leave image_size out"):
            load_backbone(tmp_path, image_size=(96, 64))
        assert "leave image_size out" in inspect_checkpoint(tmp_path, image_size=(96, 64)).problem
        return
    images = torch.randn(1, 3, 96, 64)
    resized = load_backbone(tmp_path, image_size=(96, 64))
    assert_stages(resized, images, stages_of_timm(tmp_path, images, img_size=(96, 64)))
    export_timm(resized, tmp_path / "export", images=CheckImages(images, "noise"))
    assert_stages(load_backbone(tmp_path / "export"), images, stages_of_timm(tmp_path, images, img_size=(96, 64)))


def test_a_size_that_cannot_be_built_is_said(tmp_path: Path) -> None:
    model = timm.create_model("hiera_tiny_224", num_classes=0, embed_dim=16, stages=(1, 1, 1, 1), img_size=(64, 64))
    folder = tmp_path / "folder"
    save_for_hf(model, folder, model_args={"embed_dim": 16, "stages": [1, 1, 1, 1], "img_size": [64, 64]})
    with pytest.raises(InputError, match="image size 40x64 is not a multiple of the patch size 32x32"):
        load_backbone(folder, image_size=(40, 64))
    assert json.loads((folder / "config.json").read_text())["architecture"] == "hiera_tiny_224"


def _swin() -> Any:
    arguments = {"embed_dim": 16, "depths": (2, 2, 1), "num_heads": (2, 4, 8), "window_size": 6, "img_size": 96}
    model = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def _original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def name(key: str) -> str:
        return re.sub(r"layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)

    return {name(key): tensor for key, tensor in state.items()}


def _mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of mmpretrain; the neighbours of a patch as [channel, row, column] instead of [column, row, channel]."""
    rules = [
        ("layers.", "stages."), ("patch_embed.proj", "patch_embed.projection"), (".attn.", ".attn.w_msa."),
        (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
    ]  # fmt: skip
    renamed = {}
    for key, tensor in _original(state).items():
        if ".downsample." in key:
            tensor = tensor.unflatten(-1, (2, 2, -1)).movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
        for old, new in rules:
            key = key.replace(old, new)
        renamed["norm2." + key.removeprefix("norm.") if key.startswith("norm.") else key] = tensor
    return {f"backbone.{key}": tensor for key, tensor in renamed.items()} | {
        "backbone.mask_token": torch.zeros(1, 1, 16)
    }


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        (lambda state: {"model": {f"encoder.{k}": t for k, t in _original(state).items()}}, "swin"),
        (lambda state: {"model": _original(state) | {"head.weight": torch.zeros(3, 64)}}, "swin"),
        (lambda state: state, "swin"),
        (lambda state: {"state_dict": _mmpretrain(state)}, "mmpretrain_swin"),
    ],
    ids=["simmim", "swin", "timm", "mmpretrain"],
)
def test_files_of_swin_without_config(tmp_path: Path, layout: Any, family: str) -> None:
    model = _swin()
    torch.save(layout(model.state_dict()), tmp_path / "swin.pth")
    backbone = load_backbone(tmp_path / "swin.pth", image_size=96)
    assert (backbone.info.family, backbone.info.coverage, backbone.info.pooling) == (family, 1.0, "mean")
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert_stages(backbone, images, model.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW"))
    assert inspect_checkpoint(tmp_path / "swin.pth").family == family
