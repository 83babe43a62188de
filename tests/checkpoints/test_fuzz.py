"""Seeded damage to checkpoints, configs and key maps: a model, or one line; never another error, a hang or much memory.

MIM_REFINER_FUZZ=N tries N/40 times as many, as of the other readers.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file
from torch import Tensor

from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import MimRefinerError

State = dict[str, Tensor]
TIMES = max(1, int(os.environ.get("MIM_REFINER_FUZZ", "40")) // 40)
SECONDS, MEGABYTES = 10, 500
JUNK = [
    None, True, -1, 0, 1, 2, 10**6, 2**31, 2**63, 10**30, float("inf"), float("nan"), -0.5, "", "x" * 50, "\0", "é",
    "224", [], [1], [[1]], [1, 2, 3, 4], {}, {"a": 1}, "hf-hub:x/y", [None], ["a"], [0, 0], [10**9, 10**9],
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """``value`` with one or two entries, at any depth, gone or replaced by junk."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        holder = value
        while isinstance(holder, dict | list) and holder:
            key: Any = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
                holder = holder[key]
                continue
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(JUNK))  # the second change may lie in it
            break
    return value


def damaged(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """Up to four bytes changed after the ``first``."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(first, len(data))] = rng.randrange(256)
    return bytes(changed)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1000


def attempt(source: Path, **options: Any) -> None:
    """Both ways of reading give a result or one line, soon, and agree."""
    ends = []
    for read in (load_backbone, inspect_checkpoint):
        start = time.monotonic()
        try:
            ends.append(getattr(read(source, **options), "problem", ""))
        except MimRefinerError as error:
            ends.append(str(error))
        assert time.monotonic() - start < SECONDS
    assert ends[0] == ends[1]
    assert "\n" not in ends[0]
    assert len(ends[0]) < 1500


def torch_bytes(state: State, *, legacy: bool) -> bytes:
    args = argparse.Namespace(num_heads=4, input_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    buffer = io.BytesIO()
    payload = {"model": state, "args": args, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save(payload, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def test_torch_files(tmp_path: Path, vit_state: State) -> None:
    rng, path = random.Random(1), tmp_path / "x.pth"
    whole, legacy = torch_bytes(vit_state, legacy=False), torch_bytes(vit_state, legacy=True)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(25 * TIMES):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # with right sums, so that only the pickle is wrong
            for name, content in members.items():
                archive.writestr(name, damaged(content, rng) if name.endswith("data.pkl") else content)
        path.write_bytes(buffer.getvalue())
        attempt(path)
        path.write_bytes(damaged(legacy[:6000], rng) + legacy[6000:])
        attempt(path)
        path.write_bytes(damaged(whole, rng))
        attempt(path)


def test_safetensors(tmp_path: Path, vit_state: State) -> None:
    rng, data, path = random.Random(2), save(vit_state), tmp_path / "x.safetensors"
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(40 * TIMES):
        text = json.dumps(mutated(header, rng)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        attempt(path, num_heads=4)


MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "beit_base_patch16_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32},
    "eva02_tiny_patch14_224": {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 28},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "img_size": 32},
}


@pytest.mark.parametrize("name", MODELS)
def test_configs(tmp_path: Path, name: str) -> None:
    rng, arguments = random.Random(3), MODELS[name]
    built = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    state = timm.create_model(name, num_classes=0, **built).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    facts = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "x",
    }
    own = {"family": "mae", "licence": "x", "position_rule": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
           "encoder_pooling": "cls", "without": ["fc_norm"], "norm_eps": 1e-6}  # fmt: skip
    config = {
        "architecture": name,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": facts,
        "mim_refiner": own,
    }
    for number in range(15 * TIMES):
        (tmp_path / "config.json").write_text(json.dumps(mutated(config, rng)))
        preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(mutated(preprocessor, rng) if number % 3 else {}))
        attempt(tmp_path)


def test_transformers_configs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rng = random.Random(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for kind in ("ViTMAE", "Beit"):
        config = getattr(transformers, f"{kind}Config")(**sizes, image_size=16, patch_size=8)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / kind)
        text = json.loads((tmp_path / kind / "config.json").read_text())
        for _ in range(15 * TIMES):
            (tmp_path / kind / "config.json").write_text(json.dumps(mutated(text, rng)))
            attempt(tmp_path / kind)


def test_key_maps(tmp_path: Path, vit_state: State) -> None:
    rng, path = random.Random(5), tmp_path / "x.safetensors"
    save_file(vit_state, path)
    key_map = {
        "keys": {"blocks.{i}.attn.qkv.{p}": ["blocks.{i}.attn.qkv.{p}"], "norm.{p}": "norm.{p}"}, "drop": {"a": "b"},
        "num_heads": 4, "norm_eps": 1e-6, "mean": [0.5] * 3, "std": [0.5] * 3, "arguments": {"img_size": 32},
        "architecture": "vit", "family": "f", "licence": "l", "positions": "table", "pooling": "mean",
    }  # fmt: skip
    attempt(path, key_map=key_map)
    for _ in range(40 * TIMES):
        attempt(path, key_map=mutated(key_map, rng))


def test_folders_of_several_files(tmp_path: Path, vit_state: State) -> None:
    rng, names = random.Random(6), list(vit_state)
    shards = tmp_path / "shards"
    shards.mkdir()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: vit_state[name] for name in part}, shards / file)
    index = {"metadata": {"total_size": 3}, "weight_map": {name: files[name in names[9:]] for name in names}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves from a single process
        dcp.save({"model": vit_state}, checkpoint_id=str(tmp_path / "dcp"))
    metadata, data = (next((tmp_path / "dcp").glob(name)) for name in (".metadata", "*.distcp"))
    good, content = metadata.read_bytes(), data.read_bytes()
    for _ in range(15 * TIMES):
        (shards / "model.safetensors.index.json").write_text(json.dumps(mutated(index, rng)))
        attempt(shards, num_heads=4)
        metadata.write_bytes(damaged(good, rng))
        attempt(tmp_path / "dcp", num_heads=4)
        metadata.write_bytes(good)
        data.write_bytes(damaged(content, rng))
        attempt(tmp_path / "dcp", num_heads=4)
        data.write_bytes(content)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_hostile_key_maps_configs_and_names(tmp_path: Path, vit_state: State) -> None:
    path = tmp_path / "x.safetensors"
    save_file(vit_state, path)
    os.mkfifo(tmp_path / "pipe.yaml")
    texts = {"bomb": BOMB, "deep": "[" * 100_000, "big": "# " + "x" * 2**21, "binary": "\x01\x02", "list": "- 1", "tag":
             "!!python/object/apply:os.system ['true']", "number": "3", "numbers": "{1: 2}", "empty": ""}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for name in (*texts, "pipe", "missing", "n" * 300):
        with pytest.raises(MimRefinerError):
            load_backbone(path, key_map=tmp_path / f"{name}.yaml", num_heads=4)
        attempt(path, key_map=tmp_path / f"{name}.yaml", num_heads=4)
    attempt(path, key_map="a\0b.yaml")
    odd = ["x" * 5000, f"{tmp_path}/{'n' * 300}.pth", "a\0b.pth", f"{path}/x.pth", "\udcff.pth", "", "hf-hub:", "::"]
    for source in odd:
        for read in (load_backbone, inspect_checkpoint):
            with pytest.raises(MimRefinerError):
                read(source)
    sizes = ["0", "-1", "²", "9" * 5000, "1e3", "99999999", "999999x999999"]
    for option in (*(f"num_heads={size}" for size in sizes), *(f"in_chans={size}" for size in (*sizes, "999999"))):
        attempt(Path(f"{path}::num_heads=4,{option}"))
    for size in (*sizes, "131072", "0x16"):
        attempt(Path(f"{path}::num_heads=4,image_size={size}"))


@pytest.mark.parametrize("what", ["blocks", "patch_embed", "pos_drop", "forward", "__class__"])
def test_a_config_cannot_hollow_out_a_model(tmp_path: Path, vit_state: State, what: str) -> None:
    save_file(vit_state, tmp_path / "model.safetensors")
    arguments = MODELS["vit_tiny_patch16_224"]
    for config in (
        {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "mim_refiner": {"without": [what]}},
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": arguments | {"depth": 0},
            "mim_refiner": {"without": ["blocks"]},
        },
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(MimRefinerError):
            load_backbone(tmp_path)
        attempt(tmp_path)
