"""``inspect`` through the command line: table and JSON, choice of encoder, incomplete files, options of a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.cli.app import main
from mim_refiner.errors import CheckpointError
from mim_refiner.models.backbone import create_vit


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(create_vit("vit_w24_d2_h3_p8", 24).state_dict())


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["inspect", *arguments])
    except SystemExit as done:
        code = int(done.code or 0)
    output = capsys.readouterr()
    return int(code or 0), output.out, output.err


def test_teacher_by_default_and_student_on_request(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run.pth")
    student = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    student["module.backbone.masked_embed"] = torch.ones(1, 24)
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"student": student, "teacher": teacher, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}, path)
    code, out, _ = run(capsys, path, "--num-heads", "3", "--tensors")
    assert code == 0
    for text in ("ibot", "teacher: 2 blocks, width 24, 3 attention heads", "100.0 %", "optimiser state"):
        assert text in out
    assert "; --tensors lists all" not in out
    code, out, err = run(capsys, f"{path}::encoder=student", "--json")
    report = json.loads(out)
    assert code == 2  # as loading: the report is there, and the line that asks
    assert (report["encoder"], report["encoders"], report["num_heads"]) == ("student", ["student", "teacher"], 0)
    assert len(report["tensors"]) == 2 * len(state) + 2
    assert err == f"error: {report['problem']}\n"
    assert "pass num_heads=" in report["problem"]
    code, out, err = run(capsys, path, "--encoder", "techer")
    assert (code, out) == (2, "")
    assert "did you mean 'teacher'" in err


def test_an_incomplete_file_is_listed_and_exits_with_2(
    tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    del state["blocks.1.mlp.fc2.bias"]
    torch.save({"model": state}, tmp_path / "part.pth")
    code, out, err = run(capsys, str(tmp_path / "part.pth"), "--num-heads", "3")
    assert code == 2
    assert "missing: blocks.1.mlp.fc2.bias" in out
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "part.pth", num_heads=3)
    assert err == f"error: {caught.value}\n"


def test_a_key_map_file(tmp_path: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({name.replace("blocks", "layers"): tensor for name, tensor in state.items()}, tmp_path / "own.pth")
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    lines = [f"  blocks.{{i}}.{part}.{{p}}: layers.{{i}}.{part}.{{p}}" for part in parts]
    (tmp_path / "map.yaml").write_text("keys:\n" + "\n".join(lines) + "\nnum_heads: 3\nfamily: ours\n")
    code, out, err = run(capsys, str(tmp_path / "own.pth"), "--key-map", str(tmp_path / "map.yaml"), "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["family"], report["coverage"], report["num_heads"]) == ("ours", 1.0, 3)
    assert run(capsys, str(tmp_path / "own.pth"))[0] == 2
