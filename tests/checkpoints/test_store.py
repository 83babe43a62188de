"""Reading: never runs code, and says in one line what is wrong with a file."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.checkpoints.store import read_checkpoint
from mim_refiner.errors import CheckpointError


def stored_zip(name: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr(name, "hello")
    return buffer.getvalue()


class Unlisted:
    """A harmless class that is not on the list either."""


def test_a_listed_class_is_read_as_data_and_no_other_is(tmp_path: Path, vit_state: dict[str, Tensor]) -> None:
    path = tmp_path / "run.pth"
    torch.save({"model": vit_state, "args": argparse.Namespace(lr=1e-3, extra=torch.ones(2))}, path)
    contents = read_checkpoint(path)
    assert set(contents.sections) == {"model", "args"}
    assert contents.facts["args.lr"] == 1e-3
    torch.save({"model": vit_state, "args": Unlisted()}, path)
    with pytest.raises(CheckpointError, match=r"Unlisted.*could run code"):
        read_checkpoint(path)


def test_sections_hold_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    one = torch.ones(1)
    torch.save(
        {"model": {"a": one}, "optimizer": {"state": {0: {"exp_avg": one}}}, "list": [one, [one]], "x": one}, path
    )
    sections = read_checkpoint(path).sections
    found = {f"{where}/{name}" for where, tensors in sections.items() for name in tensors}
    assert found == {"model/a", "optimizer.state.0/exp_avg", "list/0", "list.1/0", "/x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"just some text\n", "is not a checkpoint"),
        (b"ab", "is not a checkpoint"),
        (b"\x89PNG\r\n\x1a\n12345", "is not a checkpoint"),
        (b"PK\x05\x06" + bytes(18), "is not a checkpoint"),  # a zip file without members
        (stored_zip("hello.txt"), "a zip file but no torch checkpoint"),
        # one of a later kind of zip, for which zipfile raises NotImplementedError
        (re.sub(rb"(?s)(PK\x01\x02..).", rb"\1c", stored_zip("x")), r"no torch checkpoint \(zip file version 9\.9\)"),
        (pickle.dumps({"epoch": 3, "model": {}}), "holds no tensors"),
        (b"\x80\x02}X\x01\0\0\0actorch.distributed.tensor\nDTensor\n)Rs.", "holds no tensors"),  # a part in name only
    ],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.pth: .*{message}"):
        load_backbone(path)


def test_the_name_of_a_file_says_nothing(tmp_path: Path, vit_state: dict[str, Tensor]) -> None:
    save_file(vit_state, tmp_path / "weights.pth")
    torch.save(vit_state, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert load_backbone(tmp_path / name, num_heads=4).info.coverage == 1.0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "no readable JSON"),
        ({"config.json": "[]"}, "must hold a JSON object"),
        ({"config.json": json.dumps({"architecture": "vit_tiny_patch16_224"})}, "no weights; put model.safetensors"),
        ({"recipe.yaml": "seed: 0"}, "has no export/ yet"),
    ],
)
def test_unusable_folders(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "vit_mae"}, r"names no timm 'architecture' \(it has: vit_mae\)"),
        ({"architecture": "vit_nonsense"}, "timm cannot build 'vit_nonsense'"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": 3}, "'model_args' in its config.json must be"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"bogus": 3}}, "timm cannot build"),
        ({"architecture": "vit_tiny_patch16_224"}, "has shape .* the encoder needs"),
    ],
)
def test_unusable_configs(tmp_path: Path, vit_state: dict[str, Tensor], config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vit_state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(tmp_path)
