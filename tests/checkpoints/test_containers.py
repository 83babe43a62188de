"""Containers that tools write: shards, distributed folders, DeepSpeed, adapters, the hub's cache, single files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints import resolve, store
from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.errors import CheckpointError
from mim_refiner.models.backbone import Backbone

State = dict[str, Tensor]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def same(backbone: Backbone, state: State) -> bool:
    held = backbone.model.state_dict()
    return backbone.info.coverage == 1 and all(torch.equal(held[name], state[name]) for name in held)


def write_config(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": SMALL,
        "pretrained_cfg": {"mean": [0.1] * 3, **more},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shards(folder: Path, state: State, *, binary: bool, config: bool = True) -> Path:
    folder = write_config(folder)
    if not config:
        (folder / "config.json").unlink()
    names, half, stem = list(state), len(state) // 2, "pytorch_model" if binary else "model"
    ending = "bin" if binary else "safetensors"
    place = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        held = {name: state[name].contiguous() for name in part}
        torch.save(held, folder / file) if binary else save_file(held, folder / file)
        place |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@pytest.mark.parametrize("binary", [False, True])
def test_shards_with_an_index(tmp_path: Path, vit_state: State, binary: bool) -> None:
    folder = shards(tmp_path / "a", vit_state, binary=binary)
    index, first = next(folder.glob("*.index.json")), next(folder.glob("*-00001-*"))
    for source in (folder, index, first):  # one shard means the model
        assert same(load_backbone(source), vit_state)
        assert load_backbone(source).info.mean == (0.1,) * 3
    bare = shards(tmp_path / "b", vit_state, binary=binary, config=False)
    assert same(load_backbone(bare, num_heads=4), vit_state)
    text = index.read_text()
    for old, new, message in [
        ("-00002-of", "-00009-of", "this shard of the model is missing"),
        ("model-00002", "../model-00002", "not in its folder"),
        ('"cls_token"', '"elsewhere"', "its shards lack elsewhere"),
        ("weight_map", "weights", "no 'weight_map'"),
    ]:
        index.write_text(text.replace(old, new))
        for read in (load_backbone, inspect_checkpoint):
            with pytest.raises(CheckpointError, match=message):
                read(folder)


def test_the_config_beside_a_file_belongs_to_it(tmp_path: Path, vit_state: State) -> None:
    folder = write_config(tmp_path / "m", std=[0.3] * 3)
    for name in ("model.safetensors", "weights.safetensors"):
        save_file(vit_state, folder / name)
        info = load_backbone(folder / name).info
        assert (info.num_heads, info.mean, info.std) == (4, (0.1,) * 3, (0.3,) * 3)
        assert inspect_checkpoint(folder / name).problem == ""
        (folder / name).rename(tmp_path / name)
    other = write_config(tmp_path / "downloads")
    for name in ("a.pth", "b.pth"):  # a folder of several files: the config is not known to be theirs
        torch.save({"model": vit_state}, other / name)
    with pytest.raises(CheckpointError, match="several weight files"):
        load_backbone(other)
    assert load_backbone(other / "a.pth", num_heads=8).info.num_heads == 8


def test_the_hub_cache(tmp_path: Path, vit_state: State) -> None:
    top = tmp_path / "models--a--b"
    blob = top / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    save_file(vit_state, blob)
    for place in ("", "base", "deep/er"):
        folder = write_config(top / "snapshots" / "abc" / place)
        (folder / "model.safetensors").symlink_to(os.path.relpath(blob, folder))
        assert same(load_backbone(folder), vit_state)
    assert same(load_backbone(top), vit_state)
    (top / "snapshots" / "xyz").mkdir()
    with pytest.raises(CheckpointError, match=r"2 snapshots.*newest is .*xyz"):
        load_backbone(top)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("abc\n")
    for place in (top, top / "snapshots", top.parent):
        assert same(load_backbone(place), vit_state)
    (top.parent / "models--b--other" / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"download did not finish \(no snapshots\)"):
        load_backbone(top.parent / "models--b--other")
    with pytest.raises(CheckpointError, match=r"a cache of 2 models; give the folder of one \(models--"):
        load_backbone(top.parent)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load_backbone(folder)
    blob.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link to nothing; copy the file"):
        load_backbone(top)


@pytest.fixture
def distributed(tmp_path: Path, vit_state: State) -> Path:
    moments = {name: {"exp_avg": tensor} for name, tensor in vit_state.items()}
    payload = {"model": vit_state, "optimizer": {"state": moments}, "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves from a single process
        dcp.save(payload, checkpoint_id=str(tmp_path / "dcp"))
    return tmp_path / "dcp"


def test_a_folder_of_distributed_checkpoint(
    distributed: Path, vit_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SHARED_SLACK", 0)  # tensors may be as large as the files, not as the folder's entry
    assert same(load_backbone(distributed, num_heads=4), vit_state)
    report = inspect_checkpoint(distributed, num_heads=4)
    assert (report.problem, len(report.tensors)) == ("", len(vit_state))  # the optimiser's are not read
    for part in distributed.iterdir():  # a part means the folder
        assert same(load_backbone(part, num_heads=4), vit_state)
    (distributed / "latest").symlink_to("gone")  # of another tool: not asked for
    assert same(load_backbone(distributed, num_heads=4), vit_state)


def test_chunks_of_several_processes_are_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parts = {(0, 0): whole[:2, :4], (0, 4): whole[:2, 4:], (2, 0): whole[2:]}
    monkeypatch.setattr(resolve, "_chunk", lambda folder, place: place["part"])
    places = {("w", offset): {"part": part} for offset, part in parts.items()}
    chunks: list[Any] = [{"offsets": offset, "sizes": tuple(part.shape)} for offset, part in parts.items()]
    assert torch.equal(resolve._joined(tmp_path, "w", (4, 6), chunks, places), whole)
    for size, message in [((24,), "outside of it"), ((10**9, 10**9), "do not fill it"), ((6, 4), "outside of it")]:
        with pytest.raises(ValueError, match=message):
            resolve._joined(tmp_path, "w", size, chunks, places)


def test_damaged_and_hostile_distributed_folders(distributed: Path, tmp_path: Path) -> None:
    metadata, [data] = distributed / ".metadata", distributed.glob("*.distcp")
    good, content = metadata.read_bytes(), data.read_bytes()

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'executed'}",))

    bad = [
        b"",
        good[:100],
        good.replace(data.name.encode(), b"../x.distcp"),
        pickle.dumps(Runs()),
        pickle.dumps({1: 2}),
    ]
    for text in bad:
        metadata.write_bytes(text)
        with pytest.raises(CheckpointError) as caught:
            load_backbone(distributed, num_heads=4)
        assert "\n" not in str(caught.value)
    metadata.write_bytes(good)
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cut off"):
        load_backbone(distributed, num_heads=4)
    assert not (tmp_path / "executed").exists()


def test_a_part_of_a_dtensor_is_named(tmp_path: Path, vit_state: State) -> None:
    from torch.distributed.tensor import DTensor

    class Part:
        def __init__(self, local: Tensor, size: tuple[int, ...]) -> None:
            self.local, self.size = local, size

        def __reduce__(self) -> tuple[Any, ...]:
            arguments = (DTensor, self.local.dtype, torch.Size(self.size), self.local.stride(), 0, None, "cpu", False)
            call = (torch._utils._rebuild_wrapper_subclass, DTensor, arguments, (None, {"_local_tensor": self.local}))
            return (torch._tensor._rebuild_from_type_v2, call)

    whole = {name: Part(tensor, tuple(tensor.shape)) for name, tensor in vit_state.items()}
    torch.save({"model": whole}, tmp_path / "whole.pth")
    assert same(load_backbone(tmp_path / "whole.pth", num_heads=4), vit_state)
    torch.save({"model": whole | {"norm.bias": Part(torch.zeros(16), (32,))}}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"one process's part \[16\] of a tensor \[32\].*full_state_dict"):
        load_backbone(tmp_path / "part.pth", num_heads=4)


def test_sharded_tensors_and_archives_of_numpy_are_named(
    tmp_path: Path, vit_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.distributed._shard.sharded_tensor.api")
    kind = type("ShardedTensor", (), {"__module__": module.__name__})
    module.ShardedTensor = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"model": vit_state | {"norm.weight": kind()}}, tmp_path / "sharded.pth")
    np.savez(tmp_path / "jax.npz", a=np.ones(3), b=np.ones(2))
    for name, message in (("sharded.pth", r"FULL_STATE_DICT"), ("jax.npz", "a NumPy archive")):
        with pytest.raises(CheckpointError, match=message):
            load_backbone(tmp_path / name, num_heads=4)


def test_deepspeed(tmp_path: Path, vit_state: State) -> None:
    rest = {
        "param_shapes": [OrderedDict((n, t.shape) for n, t in vit_state.items())],
        "sparse": set(),
        "ds_version": "0.15",
    }
    folder = tmp_path / "run" / "global_step5"
    folder.mkdir(parents=True)
    torch.save({"module": vit_state, **rest}, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"fp32": torch.ones(3)}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "run" / "latest").write_text("global_step5")
    for source in (tmp_path / "run", folder, folder / "mp_rank_00_model_states.pt"):
        assert same(load_backbone(source, num_heads=4), vit_state)
    with pytest.raises(CheckpointError, match="optimiser's state and no model"):
        load_backbone(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    empty = {name: torch.empty(0) for name in vit_state}
    torch.save({"module": empty, **rest}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"ZeRO 3.*python zero_to_fp32\.py"):
        load_backbone(tmp_path / "run", num_heads=4)
    (folder / "mp_rank_00_model_states.pt").rename(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for source in (tmp_path / "run", folder):  # as ZeRO 3 itself names it
        with pytest.raises(CheckpointError, match=r"ZeRO 3.*python zero_to_fp32\.py"):
            load_backbone(source, num_heads=4)
    (tmp_path / "run" / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match="'latest' names 'global_step9'"):
        load_backbone(tmp_path / "run", num_heads=4)


def test_folders_without_a_model_say_what_they_hold(tmp_path: Path, vit_state: State) -> None:
    folder = shards(tmp_path / "shards", vit_state, binary=False, config=False)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="without their index; download"):
        load_backbone(folder)
    (tmp_path / "run" / "pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"only folders \(pytorch_model_fsdp_0\); give the one"):
        load_backbone(tmp_path / "run")
    pointer = write_config(tmp_path / "pointer")
    (pointer / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"config.json: is a Git LFS pointer"):
        load_backbone(pointer)


def test_a_config_in_capitals_and_the_pooling_of_the_arguments(tmp_path: Path, vit_state: State) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": vit_state, "cfg": {"MODEL": {"NUM_HEADS": 4}, "DECODER": {"NUM_HEADS": 2}}}, path)
    assert (load_backbone(path).info.num_heads, load_backbone(path).info.pooling) == (4, "cls")
    for said in ({"gp": "avg"}, {"global_pool": True}):
        torch.save({"model": vit_state, "args": {"num_heads": 4, **said}}, path)
        assert load_backbone(path).info.pooling == inspect_checkpoint(path).pooling == "mean"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("encoder.stages.0.layers.0.attn.qkv.weight", "embeddings.patch_embeddings.projection.weight"), "a Hiera"),
        (("encoder.layers.0.blocks.0.attention.self.key.weight", "embeddings.norm.bias"), "a Swin"),
        (("embeddings.distillation_token", "embeddings.patch_embeddings.projection.weight"), "Audio Spectrogram"),
        (("layer.0.attention.o_proj.bias", "embeddings.cls_token"), "a DINOv3"),
        (("encoder.stages.0.layers.0.pwconv1.bias",), "a ConvNeXt"),
    ],
)
def test_bare_models_of_transformers_are_named(tmp_path: Path, names: tuple[str, ...], what: str) -> None:
    save_file({name: torch.ones(4, 3, 4, 4) for name in names}, tmp_path / "x.safetensors")
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=what):
            read(tmp_path / "x.safetensors", num_heads=4)


def lora(state: State, *, zero: bool = False) -> tuple[State, State]:
    """(LoRA layers of every attention, the state with alpha / rank = 2 times their product added)."""
    generator = torch.Generator().manual_seed(0)
    layers, merged = {}, dict(state)
    for name in [name for name in state if name.endswith(("attn.qkv.weight", "patch_embed.proj.weight"))]:
        out, *rest = state[name].shape
        a, b = (
            torch.randn(4, *rest, generator=generator),
            torch.randn(out, 4, *[1] * (len(rest) - 1), generator=generator),
        )
        b = b * 0 if zero else b
        layers[name.removesuffix(".weight")] = (a, b)
        merged[name] = state[name] + 2 * (b.flatten(1) @ a.flatten(1)).reshape(state[name].shape)
    names = {f"{layer}.lora_{part}": t for layer, pair in layers.items() for part, t in zip("AB", pair, strict=True)}
    return names, merged


def test_lora_layers_in_one_file_are_merged(tmp_path: Path, vit_state: State) -> None:
    layers, merged = lora(vit_state)
    adapted = tuple(f"{name.rpartition('.')[0]}." for name in layers)
    state = {
        f"base_model.model.{'.base_layer.'.join(n.rsplit('.', 1)) if n.startswith(adapted) else n}": t
        for n, t in vit_state.items()
    }
    state |= {f"base_model.model.{name}.default.weight": tensor for name, tensor in layers.items()}
    torch.save({"model": state, "peft_config": {"lora_alpha": 8, "r": 4}}, tmp_path / "told.pth")
    held = load_backbone(tmp_path / "told.pth", num_heads=4).model.state_dict()
    assert all(torch.allclose(held[name], merged[name], atol=1e-6) for name in held)
    options = {"lora_alpha": 1, "use_rslora": True, "rank_pattern": {"x": 1}, "alpha_pattern": {r"blocks\..*|proj": 4}}
    torch.save({"model": state, "peft_config": options}, tmp_path / "patterns.pth")  # 4 / sqrt(4) is 2 as well
    held = load_backbone(tmp_path / "patterns.pth", num_heads=4).model.state_dict()
    assert all(torch.allclose(held[name], merged[name], atol=1e-6) for name in held)
    for change, message in [
        ({}, r"scale \(lora_alpha\)"),
        ({"base_model.model.blocks.0.attn.qkv.lora_A.other.weight": torch.ones(4, 32)}, "several LoRA adapters"),
        ({"base_model.model.blocks.0.mlp.fc1.lora_A.default.weight": torch.ones(4, 32)}, "half of a LoRA"),
        ({"base_model.model.blocks.0.attn.qkv.lora_magnitude_vector.default.weight": torch.ones(96)}, "DoRA"),
    ]:
        torch.save({"model": state | change}, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=rf"{message}.*merge_and_unload"):
            load_backbone(tmp_path / "bad.pth", num_heads=4)
    # a layer of another module, whose own weight is missing, is not merged into the encoder's of the same ending
    other = {
        name.replace("base_model.model.", "base_model.model.decoder."): state[name] for name in state if "lora_" in name
    }
    torch.save({"model": state | other, "peft_config": {"lora_alpha": 8, "r": 4}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"adapts decoder\..*which its base model has not"):
        load_backbone(tmp_path / "bad.pth", num_heads=4)


def test_a_part_without_patches_is_no_second_encoder(tmp_path: Path, vit_state: State) -> None:
    decoder = {name: tensor for name, tensor in vit_state.items() if name.startswith(("blocks.", "norm."))}
    torch.save({"decoder": decoder, "encoder": vit_state}, tmp_path / "both.pth")
    held = load_backbone(tmp_path / "both.pth", num_heads=4).model.state_dict()
    assert all(torch.equal(held[name], vit_state[name]) for name in vit_state)


def test_an_adapter_folder_is_merged_into_its_base(
    tmp_path: Path, vit_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_config(tmp_path / "base")
    save_file(vit_state, base / "model.safetensors")
    layers, merged = lora(vit_state)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"base_model.model.{n}.weight": t for n, t in layers.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}

    def write(**more: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config | more))

    write()
    held = load_backbone(folder).model.state_dict()
    assert all(torch.allclose(held[name], merged[name], atol=1e-6) for name in held)
    write(use_rslora=True, lora_alpha=4)  # 4 / sqrt(4) is 2 as well
    held = load_backbone(folder / "adapter_model.safetensors").model.state_dict()
    assert all(torch.allclose(held[name], merged[name], atol=1e-6) for name in held)
    for more, message in [
        ({"peft_type": "IA3"}, "kind IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"alpha_pattern": {"(a+)+": 16}}, r"adapter_config.json: the pattern .* too involved"),
        ({"alpha_pattern": {"[": 16}}, "adapter_config.json: '\\[' is no pattern"),
        ({"alpha_pattern": [16]}, "alpha_pattern must be an object"),
        ({"rank_pattern": {"qkv": 2}}, "adapter_config.json: r or rank_pattern says rank 2"),
        ({"r": "x"}, "r and lora_alpha"),
    ]:
        write(**more)
        with pytest.raises(CheckpointError, match=message):
            load_backbone(folder)

    # The convolution by its own rank and alpha; one layer's alpha by an expression.
    write(r=8, rank_pattern={"qkv|proj": 4}, alpha_pattern={r"blocks\.1\.attn\.qkv": 16, "proj": 4})
    changed = {"blocks.1.attn.qkv.weight": 2.0, "patch_embed.proj.weight": 0.5}
    held = load_backbone(folder).model.state_dict()
    for name in held:
        expected = vit_state[name] + changed.get(name, 1.0) * (merged[name] - vit_state[name])
        assert torch.allclose(held[name], expected, atol=1e-5)
    tensors = {f"base_model.model.{n}.weight": t for n, t in layers.items()}
    tensors["base_model.model.classifier.weight"] = torch.ones(2, 32)
    save_file(tensors, folder / "adapter_model.safetensors")
    write()
    held = load_backbone(folder).model.state_dict()
    assert all(torch.allclose(held[name], merged[name], atol=1e-6) for name in held)
    dropped = {record.name: record.reason for record in inspect_checkpoint(folder).tensors}
    assert (
        dropped["modules_to_save.base_model.model.classifier.weight"] == "classifier that was trained with the adapter"
    )

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(resolve, "snapshot_download", offline)
    write(base_model_name_or_path="owner/name")
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"adapter \(LoRA\) of owner/name, which was not found"):
            read(folder)


@pytest.mark.parametrize("mark", ["SCB", "absmax", "qweight", "weight_scale"])
def test_quantised_weights_are_named(tmp_path: Path, vit_state: State, mark: str) -> None:
    names = [name for name in vit_state if name.endswith("qkv.weight")]
    state = vit_state | {name: vit_state[name].to(torch.int8) for name in names}
    state |= {name.replace("weight", mark): torch.ones(96) for name in names}
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match=r"weights (of|with) .*dequantise"):
        load_backbone(tmp_path / "q.safetensors", num_heads=4)
    save_file(state | {names[0]: vit_state[names[0]]}, tmp_path / "q.safetensors")  # some layers were left as they are
    with pytest.raises(CheckpointError, match=r"weights (of|with) .*dequantise"):
        load_backbone(tmp_path / "q.safetensors", num_heads=4)


TEXTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "Git LFS pointer.*git lfs pull",
    b"<!DOCTYPE html><html></html>": "web page", b"\n <html><body>": "web page",
    b"<?xml version='1.0'?><Error/>": "web page",
    b"\x89HDF\r\n\x1a\n" + bytes(20): "HDF5", b"GGUF" + bytes(20): "GGUF", b"just text": "is not a checkpoint",
    b"\xef\xbb\xbf<!DOCTYPE html>": "web page", b"<!-- saved --><html>": "web page",
    bytes(4096): "zeros.*did not finish",
    b'{"error": "not found"}': "is text .*not found",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["x.pth", "m/model.safetensors", "m/pytorch_model.bin"])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, text: bytes, name: str) -> None:
    write_config(tmp_path / "m")
    path = tmp_path / name
    path.write_bytes(text)
    for source in (path, path.parent) if path.parent.name == "m" else (path,):
        with pytest.raises(CheckpointError, match=TEXTS[text]):
            load_backbone(source)


def test_other_folders(tmp_path: Path, vit_state: State) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save({"state_dict": vit_state}, folder / "last.ckpt")
    assert same(load_backbone(folder, num_heads=4), vit_state)  # the only weights there
    for name, tool in (("flax_model.msgpack", "Flax"), ("tf_model.h5", "TensorFlow")):
        other = write_config(tmp_path / tool)
        (other / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=f"weights of {tool} only"):
            load_backbone(other)
    trained = write_config(tmp_path / "trainer")
    save_file(vit_state, trained / "weights.safetensors")
    torch.save({"lr": 1}, trained / "training_args.bin")
    assert same(load_backbone(trained), vit_state)
    shutil.rmtree(trained)


@pytest.mark.parametrize("section", ["model", "state_dict", "teacher", "module", "model_ema", "net.params", ""])
def test_sections_of_many_tools(tmp_path: Path, vit_state: State, section: str) -> None:
    payload: Any = {f"backbone.{name}": tensor for name, tensor in vit_state.items()}
    for part in reversed(section.split(".") if section else []):
        payload = {part: payload, "epoch": 3, "rng": torch.get_rng_state(), "hooks": types.SimpleNamespace(a=1)}
    torch.save(payload, tmp_path / "x.pth")
    assert same(load_backbone(tmp_path / "x.pth", num_heads=4), vit_state)


def test_an_average_without_names_gets_the_models(tmp_path: Path, vit_state: State) -> None:
    """torch_ema keeps a list in the order of the parameters, of those alone that are trained."""
    for fixed in ((), ("pos_embed",)):
        trained = [name for name in vit_state if name not in fixed]
        shadow = [vit_state[name] + 1 for name in trained]
        for average in ({"ema": {"decay": 0.9, "shadow_params": shadow}}, {"shadow_params": shadow}):
            torch.save(
                {"model": vit_state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}, **average}, tmp_path / "x"
            )
            averaged = vit_state | dict(zip(trained, shadow, strict=True))
            assert same(load_backbone(tmp_path / "x", num_heads=4), averaged)
            assert same(load_backbone(tmp_path / "x", num_heads=4, encoder="model"), vit_state)
    kept = {"ema": {"collected_params": list(vit_state.values()), "shadow_params": [t + 1 for t in vit_state.values()]}}
    torch.save(kept | {"model": vit_state}, tmp_path / "x")  # another list of the same shapes comes before the model
    assert same(load_backbone(tmp_path / "x", num_heads=4), {name: tensor + 1 for name, tensor in vit_state.items()})
    torch.save({"model": vit_state, "ema": {"shadow_params": shadow[1:]}}, tmp_path / "x")
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"ema\.shadow_params is a running average without names.*encoder="):
            read(tmp_path / "x", num_heads=4)
    assert same(load_backbone(tmp_path / "x", num_heads=4, encoder="model"), vit_state)
