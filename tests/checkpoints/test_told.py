"""What a file's own arguments and the config beside it tell of heads, image size and layer scale."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import CheckpointError, InputError

State = dict[str, Tensor]

ARGUMENTS: list[tuple[Any, int]] = [
    ({"model": "vit_tiny_patch16_224"}, 3),
    ({"model_name": "deit_tiny_patch16_224.fb_in1k"}, 3),
    ({"arch": "vit_tiny"}, 3),
    ({"model": "mae_vit_tiny_patch16"}, 0),  # MAE-Lite's has 12
    ({"model": "mae_vit_base_patch16"}, 0),  # another width
    ({"model": "resnet50"}, 0),
    ({"nhead": 12}, 12),
    ({"head_dim": 16}, 12),
    ({"head_dim": 16, "num_heads": 3}, 3),
    ('{"num_heads": 12, "input_size": 224}', 12),
    ("{not JSON", 0),
]


@pytest.mark.parametrize(("said", "heads"), ARGUMENTS)
def test_the_arguments_tell_the_heads(tmp_path: Path, said: Any, heads: int) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    torch.save({"model": model.state_dict(), "args": said}, tmp_path / "x.pth")
    if heads:
        assert load_backbone(tmp_path / "x.pth").info.num_heads == heads
    else:
        with pytest.raises(InputError, match="number of attention heads"):
            load_backbone(tmp_path / "x.pth")
    assert inspect_checkpoint(tmp_path / "x.pth").num_heads == heads


@pytest.mark.parametrize(("name", "heads"), [("vit_small_patch16", 6), ("vit_small", 0)])
def test_names_of_small_encoders(tmp_path: Path, name: str, heads: int) -> None:
    model = timm.create_model("vit_small_patch16_224", img_size=32, depth=1, num_classes=0)
    torch.save({"model": model.state_dict(), "args": {"arch": name}}, tmp_path / "x.pth")
    assert inspect_checkpoint(tmp_path / "x.pth").num_heads == heads


@pytest.mark.parametrize(
    "said",
    [{"image_size": {"height": 16, "width": 64}}, {"imgH": 16, "imgW": 64}, {"data": {"input_size": [16, 64]}},
     '{"img_size": {"h": 16, "w": 64}}'],
)  # fmt: skip
def test_the_arguments_tell_the_size(tmp_path: Path, vit_state: State, said: Any) -> None:
    state = vit_state | {"pos_embed": vit_state["pos_embed"][:, :1].repeat(1, 17, 1)}  # 2 x 8, or 4 x 4
    torch.save({"model": state, "args": said}, tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth", num_heads=4).info.image_size == (16, 64)


def test_overlapping_patches_are_named(tmp_path: Path, vit_state: State) -> None:
    state = vit_state | {"pos_embed": torch.zeros(1, 1 + 5 * 9, 32)}
    torch.save({"model": state, "args": {"target_length": 56, "num_mel_bins": 32}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"45 positions are .* overlapping patches \(56x32 px, every 6 px\)"):
        load_backbone(tmp_path / "x.pth", num_heads=4)


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "eva_giant_patch14_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3"]
)
def test_a_timm_folder_without_layer_scale(tmp_path: Path, name: str) -> None:
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 28, "patch_size": 14}
    zero = {} if name.startswith("eva") or "dinov3" in name else {"init_values": 0.0}
    model = timm.create_model(name, num_classes=0, **arguments, **zero)
    for block in model.blocks if "dinov3" in name else ():  # the name always gives it
        block.gamma_1 = block.gamma_2 = None
    config = {"architecture": name, "model_args": arguments | {"init_values": None}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    held = load_backbone(tmp_path).model.state_dict()
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())


def test_video_encoders_programs_and_quantised_files_are_named(tmp_path: Path) -> None:
    name = "embeddings.patch_embeddings.projection.weight"
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("x/archive_format", "pt2")
        archive.writestr("x/models/model.json", "{}")
    files: dict[str, Any] = {
        "bare.pth": {name: torch.ones(8, 3, 2, 4, 4), "encoder.layer.0.output.dense.weight": torch.ones(8, 8)},
        "whole.pth": {f"videomae.{name}": torch.ones(8, 3, 2, 4, 4), "mask_token": torch.ones(1)},
    }
    for file, state in files.items():
        torch.save(state, tmp_path / file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of its new quantisation
        torch.save({"a.weight": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, tmp_path / "q.pth")
    messages = {
        "bare.pth": "video encoder of transformers", "whole.pth": "video encoder of transformers",
        "x.pt2": r"program of torch\.export", "q.pth": "quantised by torch",
    }  # fmt: skip
    for file, message in messages.items():
        for read in (load_backbone, inspect_checkpoint):
            with pytest.raises(CheckpointError, match=message):
                read(tmp_path / file)
