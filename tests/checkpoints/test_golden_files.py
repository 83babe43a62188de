"""Files made by each project's own code: every block within 1e-5, the right family, every tensor accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import InputError
from mim_refiner.types import CheckpointReport

# file, file of expected outputs, start of its names ("48x16/" is a resolution), family
CASES = [
    *((f"checkpoints/mae_{name}.pth", "mae", "", "mae") for name in ("pretrain", "pretrain_full")),
    ("checkpoints/mae_training_checkpoint-0.pth", "mae", "", "mae"),
    *((f"checkpoints/dbot_{name}.pth", "dbot", "", "dbot") for name in ("pretrain", "pretrain_clean")),
    ("checkpoints/crossmae_wfm.pth", "crossmae_wfm", "", "crossmae"),
    *(
        (f"checkpoints/data2vec2_fairseq_{name}.pt", "data2vec2", "", "data2vec2")
        for name in ("pretrain", "finetuned_prefix")
    ),
    ("checkpoints/ijepa.pth.tar", "ijepa", "", "ijepa"),
    *(
        (f"checkpoints/ibot_{name}.pth", "ibot", start, "ibot")
        for name in ("training_checkpoint", "checkpoint_teacher")
        for start in ("", "48x16/")
    ),
    ("checkpoints/simmim_pretrain.pth", "simmim", "", "simmim"),
    ("checkpoints/beit_pretrain.pth", "beit", "", "beit"),
    ("checkpoints/beit_finetuned_format.pth", "beit", "finetune/", "beit"),
    ("checkpoints/beit2_pretrain.pth", "beit2", "", "beit2"),
    ("checkpoints/beit2_finetuned_format.pth", "beit2", "finetune/", "beit"),  # tensor for tensor as BEiT's
    ("checkpoints/capi_vit.pth", "capi", "", "capi"),
    *((f"checkpoints/hf_beit_{kind}", f"hf_beit_{kind}", "", "hf_beit") for kind in ("shared", "perblock")),
    *(
        (f"checkpoints/hf_data2vec_vision_{kind}", f"hf_data2vec_vision_{kind}", "", "hf_data2vec_vision")
        for kind in ("shared", "perblock", "abspos")
    ),
    ("checkpoints/hf_ijepa", "hf_ijepa", "", "hf_ijepa"),
    *(
        (f"checkpoints/hf_vitmae{name}", "hf_vitmae", "", "hf_vitmae")
        for name in ("", "_base", "_saved_by_v5", "_saved_by_v5/state_dict_v5_names.pth", "/pytorch_model.bin")
    ),
    *(
        (f"checkpoints/timm_vit_mae.{ending}", f"timm_vit_mae{size}", "", "timm")
        for ending in ("pth", "safetensors")
        for size in ("", "_48x16")
    ),
    *(
        (f"checkpoints/timm_vit_{kind}.safetensors", f"timm_vit_{kind}", "", "timm")
        for kind in ("layerscale_reg2", "nocls_gap", "prenorm_nofinalnorm")
    ),
    ("hub/debug_postnorm.th", "debug_postnorm", "224x224/", "mim_refiner"),
    *(("hub/debug_prenorm.th", "debug_prenorm", start, "mim_refiner") for start in ("112x160/", "224x224/")),
    *(
        (f"hub/{kind}_d64.th", f"{kind}_d64", start, "mim_refiner")
        for kind in ("prenorm", "postnorm")
        for start in ("16x16/", "32x32/", "48x64/")
    ),
]
FILES = sorted({(file, family) for file, _, _, family in CASES})


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    return shared_dir / "golden"


def expected_outputs(golden: Path, file: str, name: str) -> dict[str, torch.Tensor]:
    ending = "io" if file.startswith("hub/") else "expected"
    return load_file(golden / file.split("/")[0] / f"{name}_{ending}.safetensors")


def num_heads(file: str) -> int:
    return 2 if "debug" in file else 4


@pytest.mark.parametrize(("file", "expected", "start", "family"), CASES)
def test_every_block_and_the_final_norm(golden: Path, file: str, expected: str, start: str, family: str) -> None:
    backbone = load_backbone(golden / file, num_heads=num_heads(file))
    info = backbone.info
    assert (info.family, info.coverage) == (family, 1.0)
    wanted = expected_outputs(golden, file, expected)
    images = wanted.get(f"{start}images", wanted.get("images"))
    assert images is not None
    with torch.inference_mode():
        outputs = {f"block{i}": block for i, block in enumerate(backbone.forward_blocks(images))}
        [outputs["final"]] = backbone.forward_blocks(images, [-1], norm=True)
        outputs["out"] = outputs["final"]
    compared = 0
    for name, output in outputs.items():
        tokens = wanted.get(start + name)
        if tokens is None:
            continue
        torch.testing.assert_close(output.patches, tokens[:, info.num_prefix_tokens :], rtol=0, atol=1e-5)
        assert (output.cls is not None) == info.has_cls
        if output.cls is not None:
            torch.testing.assert_close(output.cls, tokens[:, 0], rtol=0, atol=1e-5)
        compared += 1
    assert compared == info.depth + (start != "finetune/")


@pytest.mark.parametrize(("file", "family"), FILES)
def test_every_tensor_is_accounted_for(golden: Path, file: str, family: str) -> None:
    report = inspect_checkpoint(golden / file)
    assert (report.family, report.coverage, report.missing) == (family, 1.0, ())
    assert len({record.name for record in report.tensors}) == len(report.tensors) == tensors_in(golden / file)
    assert all(record.reason for record in report.tensors if record.status == "dropped")
    assert not any("no place" in record.reason for record in report.tensors)
    backbone = load_backbone(golden / file, num_heads=num_heads(file))
    assert {record.target for record in report.tensors if record.target} == set(backbone.model.state_dict())
    # Tables of relative positions, frequencies and configs tell the number of heads; else it is asked for.
    if report.num_heads == 0:
        assert "num_heads=" in " ".join(report.notes)
        with pytest.raises(InputError, match="do not tell the number of attention heads; pass num_heads="):
            load_backbone(golden / file)
    else:
        assert load_backbone(golden / file).info.num_heads == report.num_heads == 4


def tensors_in(path: Path) -> int:
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix == ".safetensors":
        return len(load_file(path))

    def count(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return 1
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, list | tuple) else 0

    return count(torch.load(path, weights_only=False))


def reasons(report: CheckpointReport) -> dict[str, str]:
    return {record.name: record.reason for record in report.tensors if record.status == "dropped"}


def test_reasons_for_what_is_left_out(golden: Path) -> None:
    checkpoints = golden / "checkpoints"
    mae = reasons(inspect_checkpoint(checkpoints / "mae_training_checkpoint-0.pth"))
    assert "pre-training" in mae["mask_token"]
    assert "decoder" in mae["decoder_pred.weight"]
    beit = reasons(inspect_checkpoint(checkpoints / "beit_pretrain.pth"))
    assert beit["rel_pos_bias.relative_position_index"] == "computed from the grid"
    assert "pre-training" in beit["lm_head.weight"]
    ijepa = reasons(inspect_checkpoint(checkpoints / "ijepa.pth.tar"))
    assert "--encoder encoder" in ijepa["encoder.module.pos_embed"]
    d2v = reasons(inspect_checkpoint(checkpoints / "data2vec2_fairseq_pretrain.pt"))
    assert "--encoder ema" in d2v["model._ema.blocks.0.norm1.weight"]


@pytest.mark.parametrize(
    ("file", "expected", "output", "encoder"),
    [
        ("ijepa.pth.tar", "ijepa", "context_encoder_final", "encoder"),
        ("ibot_training_checkpoint.pth", "ibot", "student_final", "student"),
    ],
)
def test_another_encoder_on_request(golden: Path, file: str, expected: str, output: str, encoder: str) -> None:
    path = golden / "checkpoints" / file
    wanted = expected_outputs(golden, f"checkpoints/{file}", expected)
    backbone = load_backbone(path, num_heads=4, encoder=encoder)
    [last] = backbone.forward_blocks(wanted["images"], [-1], norm=True)
    torch.testing.assert_close(last.patches, wanted[output][:, backbone.info.num_prefix_tokens :], rtol=0, atol=1e-5)
    report = inspect_checkpoint(path, encoder=encoder)
    assert report.encoder == encoder
    assert len(report.encoders) == 2
    with pytest.raises(InputError, match=r"has no encoder 'x'; it holds \w+, \w+; pass one of them"):
        load_backbone(path, num_heads=4, encoder="x")


def test_the_average_of_data2vec_on_request(golden: Path) -> None:
    path = golden / "checkpoints" / "data2vec2_fairseq_pretrain.pt"
    average = load_backbone(path, encoder="ema")
    raw = torch.load(path, weights_only=True)["model"]["_ema"]
    assert torch.equal(average.model.blocks[1].mlp.fc1.weight, raw["blocks.1.mlp.fc1.weight"])
    assert not torch.equal(average.model.cls_token, load_backbone(path).model.cls_token)
