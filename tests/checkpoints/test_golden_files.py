"""MAE and timm files made by those projects' own code: every block within 1e-5, every tensor accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim_refiner.checkpoints import inspect_checkpoint, load_backbone

CASES = [  # file, expected outputs, family
    ("mae_pretrain.pth", "mae", "mae"),
    ("mae_pretrain_full.pth", "mae", "mae"),
    ("mae_training_checkpoint-0.pth", "mae", "mae"),
    ("timm_vit_mae.pth", "timm_vit_mae", "timm"),
    ("timm_vit_mae.safetensors", "timm_vit_mae", "timm"),
    ("timm_vit_mae.safetensors", "timm_vit_mae_48x16", "timm"),
    ("timm_vit_layerscale_reg2.safetensors", "timm_vit_layerscale_reg2", "timm"),
    ("timm_vit_nocls_gap.safetensors", "timm_vit_nocls_gap", "timm"),
    ("timm_vit_prenorm_nofinalnorm.safetensors", "timm_vit_prenorm_nofinalnorm", "timm"),
]


@pytest.fixture(scope="module")
def checkpoints(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "checkpoints"


@pytest.mark.parametrize(("file", "expected", "family"), CASES)
def test_every_block_and_the_final_norm(checkpoints: Path, file: str, expected: str, family: str) -> None:
    backbone = load_backbone(checkpoints / file, num_heads=4)
    info = backbone.info
    assert (info.family, info.coverage, info.image_size) == (family, 1.0, (32, 32))
    wanted = load_file(checkpoints / f"{expected}_expected.safetensors")
    with torch.inference_mode():
        outputs = {f"block{i}": block for i, block in enumerate(backbone.forward_blocks(wanted["images"]))}
        [outputs["final"]] = backbone.forward_blocks(wanted["images"], [-1], norm=True)
    compared = 0
    for name, output in outputs.items():
        if name in wanted:
            tokens = wanted[name]
            torch.testing.assert_close(output.patches, tokens[:, info.num_prefix_tokens :], rtol=0, atol=1e-5)
            assert (output.cls is not None) == info.has_cls
            if output.cls is not None:
                torch.testing.assert_close(output.cls, tokens[:, 0], rtol=0, atol=1e-5)
            compared += 1
    assert compared == 4


@pytest.mark.parametrize(("file", "_expected", "family"), CASES)
def test_every_tensor_is_accounted_for(checkpoints: Path, file: str, _expected: str, family: str) -> None:
    report = inspect_checkpoint(checkpoints / file)
    assert (report.family, report.coverage, report.missing) == (family, 1.0, ())
    assert report.num_heads == 0
    assert "num_heads=" in " ".join(report.notes)
    dropped = {record.name: record.reason for record in report.tensors if record.status == "dropped"}
    assert all(dropped.values())
    if "full" in file or "training" in file:
        assert len(report.tensors) == 62
        assert len(dropped) == 20
        assert "reconstruction" in dropped["mask_token"]
        assert "decoder" in dropped["decoder_pred.weight"]
    else:
        assert dropped == {}
    assert {record.target for record in report.tensors if record.target} == set(
        load_backbone(checkpoints / file, num_heads=4).model.state_dict()
    )


@pytest.mark.parametrize(
    ("file", "guess"),
    [
        ("beit_pretrain.pth", "BEiT"),
        ("simmim_pretrain.pth", "SimMIM"),
        ("ijepa.pth.tar", "I-JEPA"),
        ("README.md", "is not a checkpoint"),
    ],
)
def test_other_files_are_refused_with_a_guess(checkpoints: Path, file: str, guess: str) -> None:
    from mim_refiner.errors import CheckpointError

    with pytest.raises(CheckpointError, match=guess):
        load_backbone(checkpoints / file, num_heads=4)
