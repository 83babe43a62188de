"""What had to be guessed about a model is said on stderr by every verb that loads one, and stdout stays clean."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mim_refiner.models.backbone import create_vit


@pytest.mark.slow
def test_guesses_are_said_unless_quiet(tmp_path: Path, cli: SimpleNamespace, unlabelled: Path) -> None:
    torch.save({"model": create_vit("vit_w24_d1_h2_p8", 16).state_dict()}, tmp_path / "x.pth")
    words = [
        "embed",
        "--model",
        tmp_path / "x.pth",
        "--num-heads",
        2,
        "--data",
        unlabelled,
        "--device",
        "cpu",
        "--json",
    ]
    for quiet in (False, True):
        out = tmp_path / f"{quiet}.parquet"
        process = cli.start(*words, "--out", out, *(["--quiet"] if quiet else []))
        text, messages = process.communicate()
        assert process.returncode == 0, messages
        assert json.loads(text)["rows"] == cli.images
        assert ("guessed: images of 16x16 px in training" in messages) != quiet
        assert "Traceback" not in messages
