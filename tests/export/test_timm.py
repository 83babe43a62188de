"""The exported folder: timm and we load it with identical outputs; it is complete or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from mim_refiner import refine
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import InputError
from mim_refiner.export.timm import export_timm
from mim_refiner.export.writing import CheckImages
from mim_refiner.models.backbone import Backbone, create_vit

VARIANTS: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"global_pool": "avg"},
    {"pre_norm": True, "final_norm": False, "no_embed_class": True},
    {"in_chans": 1, "qkv_bias": False, "mlp_ratio": 2},
]


def make(image_size: int | tuple[int, int] = 32, **arguments: Any) -> Backbone:
    model = create_vit("vit_w32_d3_h4_p8", image_size, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model.eval(), family="mae", licence="CC-BY-NC-4.0", source="/home/someone/base.pth")


@pytest.mark.parametrize("arguments", VARIANTS)
def test_timm_reloads_with_identical_outputs(tmp_path: Path, arguments: dict[str, Any]) -> None:
    backbone = make((32, 48), **arguments)
    report = export_timm(backbone, tmp_path / "out")
    assert report["max_abs_difference"] <= 1e-6
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for size in ((32, 48), (16, 16)):
        images = torch.randn(2, backbone.info.in_chans, *size)
        with torch.inference_mode():
            assert torch.equal(reloaded(images), backbone.model(images))
    again = load_backbone(tmp_path / "out")
    images = torch.randn(1, backbone.info.in_chans, 48, 16)
    for ours, theirs in zip(again.forward_blocks(images), backbone.forward_blocks(images), strict=True):
        assert torch.equal(ours.patches, theirs.patches)
    expected = {**vars(backbone.info), "source": str(tmp_path / "out")}
    assert vars(again.info) == expected


def test_config_is_what_timm_reads_and_keeps_our_facts(tmp_path: Path) -> None:
    export_timm(make(), tmp_path / "out", facts={"block": -2, "pooling": "cls", "norm": False})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] | {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8} == config["model_args"]
    assert (config["num_classes"], config["num_features"]) == (0, 32)
    facts = config["mim_refiner"]
    assert facts | {"family": "mae", "base": "base.pth", "block": -2, "pooling": "cls", "norm": False} == facts
    parity = facts["parity"]
    assert parity["max_abs_difference"] <= parity["tolerance"] == 1e-6
    assert (parity["images"], parity["source"]) == (4, "CIFAR-10 test images embedded in mim-refiner")
    assert "| Verified | largest difference to the encoder 0 (values" in (tmp_path / "out" / "README.md").read_text()
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'out'}"))
    assert (data["input_size"], list(data["mean"])) == ((3, 32, 32), [0.485, 0.456, 0.406])


def test_a_standard_size_gets_its_own_name(tmp_path: Path) -> None:
    model = create_vit("vit_tiny_patch16_224", 32, embed_dim=384, num_heads=6)
    export_timm(Backbone.wrap(model), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "vit_small_patch16_224"


def test_other_architectures(tmp_path: Path) -> None:
    backbone = Backbone.wrap(timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=56))
    assert export_timm(backbone, tmp_path / "out")["max_abs_difference"] <= 1e-6
    again = load_backbone(tmp_path / "out")
    images = torch.randn(1, 3, 56, 56)
    [ours], [theirs] = backbone.eval().forward_blocks(images, [-1]), again.forward_blocks(images, [-1])
    assert torch.equal(ours.patches, theirs.patches)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_cnn_made_in_python(tmp_path: Path, name: str) -> None:
    backbone = load_backbone(timm.create_model(name))
    assert export_timm(backbone, tmp_path / "out")["max_abs_difference"] <= 1e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["global_pool"] == "avg"


def test_arguments_that_no_config_holds_are_refused_before_training(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((8, 32, 32, 3), dtype=np.uint8))
    model = timm.create_model("test_resnet", norm_layer=torch.nn.BatchNorm2d)
    with pytest.raises(InputError, match=r"config.json can hold .*; name it in plain values") as caught:
        refine(data=str(tmp_path / "images.npz"), model=model, out=str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_check_images_and_training_mode_are_left_alone(tmp_path: Path) -> None:
    backbone = make().train()
    images = CheckImages(torch.randn(3, 3, 16, 48), "drawn at random")
    before = torch.get_rng_state()
    report = export_timm(backbone, tmp_path / "out", images=images)
    assert report["max_abs_difference"] <= 1e-6
    assert report["checked"].endswith("of 3 images, drawn at random")
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_timm_would_rebuild_differently_is_refused(tmp_path: Path) -> None:
    backbone = make()
    backbone.model.blocks[1].mlp.act = torch.nn.ReLU()
    with pytest.raises(InputError, match="the model as timm loads it differs by"):
        export_timm(backbone, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    export_timm(make(), tmp_path / "out")
    second = make(class_token=False, global_pool="avg", fc_norm=False)
    export_timm(second, tmp_path / "out")
    assert not load_backbone(tmp_path / "out").info.has_cls
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_failed_export_keeps_the_earlier_one(tmp_path: Path) -> None:
    first = make()
    export_timm(first, tmp_path / "out")
    broken = make()
    broken.model.blocks[0].mlp.act = torch.nn.ReLU()
    with pytest.raises(InputError):
        export_timm(broken, tmp_path / "out")
    assert torch.equal(load_backbone(tmp_path / "out").model.cls_token, first.model.cls_token)


def test_unusable_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export_timm(make(), tmp_path / "file")
    with pytest.raises(InputError, match=r"holds other files \(file\)"):
        export_timm(make(), tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        export_timm(make(), tmp_path / "file" / "below")
    with pytest.raises(InputError, match="plain JSON"):
        export_timm(make(), tmp_path / "out", facts={"x": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("config.json", "model.safetensors"):  # a downloaded model has files of the same names
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(InputError, match=r"holds other files \(config.json, model.safetensors\)"):
        export_timm(make(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "{}"


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 9000, b"\xff"])
def test_a_damaged_config_in_a_run_folder_is_replaced(damage: bytes, tmp_path) -> None:
    model = create_vit("vit_w32_d3_h2_p8", image_size=16)
    encoder = Backbone.wrap(model, family="mae", architecture="vit_w32_d3_h2_p8", licence="none", source="test")
    for place in ("run/export", "elsewhere/export"):
        export_timm(encoder, tmp_path / place)
        (tmp_path / place / "config.json").write_bytes(damage)
    (tmp_path / "run" / "recipe.yaml").write_text("command: refine\n")
    export_timm(encoder, tmp_path / "run" / "export")
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    with pytest.raises(InputError, match="holds other files"):  # nothing tells that this one is ours
        export_timm(encoder, tmp_path / "elsewhere" / "export")
