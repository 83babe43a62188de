"""An encoder of one's own through a key map, as a mapping and as a YAML file; options in a model source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mim_refiner.checkpoints.families.described import read_key_map
from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone
from mim_refiner.checkpoints.options import bare_source, split_options, with_options
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.mae import sincos_position_table
from mim_refiner.models.positions import sinusoid_table

State = dict[str, Tensor]

YAML = """
keys:
  patch_embed.proj.{p}: stem.conv.{p}
  blocks.{i}.norm1.{p}: layers.{i}.first.{p}
  blocks.{i}.attn.qkv.{p}:
    - layers.{i}.q.{p}
    - layers.{i}.k.{p}
    - layers.{i}.v.{p}
  blocks.{i}.mlp.fc1.{p}: layers.{i}.mlp.fc1.{p}
  blocks.{i}.mlp.fc2.{p}: layers.{i}.mlp.fc2.{p}
  blocks.{i}.attn.proj.{p}: layers.{i}.out.{p}
  blocks.{i}.norm2.{p}: layers.{i}.second.{p}
  reg_token: memory
drop: {projector.: used only in pre-training}
num_heads: 3
norm_eps: 1.0e-5
position_rule: bicubic
pooling: mean
mean: [0.1, 0.2, 0.3, 0.4]
std: [1, 1, 1, 1]
family: ours
licence: MIT
"""


@pytest.fixture
def own() -> tuple[Backbone, dict[str, Tensor]]:
    """A ViT with registers, 4 channels and patches of 4, and its state under other names."""
    model = create_vit("vit_w24_d2_h3_p4", 12, in_chans=4, reg_tokens=2)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    state: dict[str, Tensor] = {}
    parts = {"norm1": "first", "norm2": "second", "attn.proj": "out"}
    for name, tensor in model.state_dict().items():
        new = name.replace("blocks.", "layers.").replace("patch_embed.proj", "stem.conv").replace("reg_token", "memory")
        for old, other in parts.items():
            new = new.replace(old, other)
        if ".attn.qkv." in new:
            pieces = zip("qkv", tensor.chunk(3), strict=True)
            state |= {new.replace("attn.qkv", part): piece.clone() for part, piece in pieces}
        else:
            state[new] = tensor
    return Backbone.wrap(model.eval()), state | {"projector.weight": torch.ones(3)}


def test_a_key_map_brings_an_encoder_of_ones_own(tmp_path: Path, own: tuple[Backbone, dict[str, Tensor]]) -> None:
    native, state = own
    torch.save({"net": {f"module.enc.{name}": tensor for name, tensor in state.items()}}, tmp_path / "own.pth")
    (tmp_path / "map.yaml").write_text(YAML)
    backbone = load_backbone(tmp_path / "own.pth", key_map=tmp_path / "map.yaml")
    info = backbone.info
    assert (info.family, info.licence, info.num_heads, info.coverage) == ("ours", "MIT", 3, 1.0)
    assert (info.norm_eps, info.position_rule, info.pooling) == (1e-5, "bicubic", "mean")
    assert info.mean == (0.1, 0.2, 0.3, 0.4)
    images = torch.randn(2, 4, 12, 12)
    for got, expected in zip(backbone.forward_blocks(images), native.forward_blocks(images), strict=True):
        torch.testing.assert_close(got.patches, expected.patches, rtol=0, atol=1e-6)
    report = inspect_checkpoint(f"{tmp_path / 'own.pth'}::key_map={tmp_path / 'map.yaml'}")
    assert report.coverage == 1.0
    assert {r.reason for r in report.tensors if r.status == "dropped"} == {"used only in pre-training"}


def test_a_key_map_with_gaps_is_refused(tmp_path: Path, own: tuple[Backbone, dict[str, Tensor]]) -> None:
    torch.save(own[1], tmp_path / "own.pth")
    keys = {"patch_embed.proj.{p}": "stem.conv.{p}", "blocks.{i}.attn.qkv.{p}": "layers.{i}.q.{p}"}
    with pytest.raises(
        CheckpointError, match=r"holds \d+ tensors? that the encoder has no place for|has shape|no square grid"
    ):
        load_backbone(tmp_path / "own.pth", key_map={"keys": keys, "num_heads": 3})


def test_another_timm_architecture_by_key_map(tmp_path: Path) -> None:
    import timm

    arguments: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    model = timm.create_model("convnextv2_atto", num_classes=0, **arguments)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    key_map = {"architecture": "convnextv2_atto", "arguments": arguments, "mean": [0, 0, 0], "std": [1, 1, 1]}
    backbone = load_backbone(tmp_path / "own.pth", key_map=key_map)
    assert backbone.block_dims == (8, 8, 16, 16)


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        ({"key": {}}, "key: .*did you mean 'keys'"),
        ({"num_heads": 0}, "num_heads: must be 1 or more"),
        ({"num_heads": "4"}, "num_heads: must be a whole number"),
        ({"arguments": {"num_heads": "4"}}, "arguments: num_heads='4' is no whole number"),
        ({"num_heads": 3, "mean": [1]}, "mean: has 1 value, the encoder has 4 channels"),
        ({"num_heads": 3, "std": [1, 1]}, "std: has 2 values, the encoder has 4 channels"),
        ({"keys": {"patch_embed.proj.{p}": "stem.{q}"}}, r"placeholder \{q\}"),
        ({"architecture": "vit_tinny"}, "architecture 'vit_tinny' is unknown to timm"),
        (["keys"], "a key map is a mapping"),
        ("missing.yaml", "missing.yaml: the key map cannot be read"),
    ],
)
def test_unusable_key_maps(tmp_path: Path, own: tuple[Backbone, dict[str, Tensor]], key_map: Any, message: str) -> None:
    torch.save(own[0].model.state_dict(), tmp_path / "own.pth")
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(tmp_path / "own.pth", key_map=key_map)
    assert "\n" not in str(caught.value)


def test_options_in_a_source() -> None:
    source = with_options("a/b.pth", num_heads=4, encoder=None, image_size="48x16")
    assert source == "a/b.pth::num_heads=4,image_size=48x16"
    bare, options = split_options(source)
    assert (bare, options) == ("a/b.pth", {"num_heads": 4, "image_size": (48, 16)})
    assert bare_source("hf-hub:owner/name") == "hf-hub:owner/name"
    wrong_ones = {"heads=4": "did you mean 'num_heads'", "num_heads=x": "whole number", "image_size=1x": "HEIGHTxWIDTH"}
    for wrong, message in wrong_ones.items():
        with pytest.raises(InputError, match=message):
            split_options(f"file.pth::{wrong}")


def test_the_key_map_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    key_map = read_key_map(yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0]))
    assert key_map.num_heads == 6
    assert key_map.keys["blocks.{i}.attn.qkv.{p}"] == [f"layers.{{i}}.{part}.{{p}}" for part in "qkv"]


def renamed(state: State, rules: dict[str, str]) -> State:
    """``state`` with parts of its names replaced."""
    found: State = {}
    for name, tensor in state.items():
        for old, new in rules.items():
            name = name.replace(old, new)
        found[name] = tensor.clone()
    return found


def tokens(backbone: Backbone, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [block.patches for block in backbone.forward_blocks(images)]


def test_chunks_and_tables_without_entries_of_registers(tmp_path: Path) -> None:
    model = create_vit("vit_w24_d4_h3_p4", 12, reg_tokens=2, no_embed_class=True)
    state = dict(model.state_dict())
    blocks = {name: name.removeprefix("blocks.") for name in state if name.startswith("blocks.")}
    chunks = {name: f"trunk.{int(rest.partition('.')[0]) // 2}.{rest}" for name, rest in blocks.items()}
    own = {chunks.get(name, name.replace("reg_token", "storage")): tensor for name, tensor in state.items()}
    token, table = own["cls_token"], own["pos_embed"]
    entry = torch.randn(1, 1, 24)
    own |= {"cls_token": token - entry, "pos_embed": torch.cat([entry, table], dim=1)}  # one for the class token
    torch.save(own, tmp_path / "own.pth")
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    keys = {f"blocks.{{i}}.{part}.{{p}}": f"trunk.{{n}}.{{i}}.{part}.{{p}}" for part in parts} | {
        "reg_token": "storage"
    }
    backbone = load_backbone(tmp_path / "own.pth", key_map={"keys": keys, "num_heads": 3})
    images = torch.randn(2, 3, 12, 12)
    expected = tokens(Backbone.wrap(model.eval()), images)
    for got, right in zip(tokens(backbone, images), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "sinusoid"])
def test_computed_tables_separate_biases_and_heads_by_block(tmp_path: Path, positions: str) -> None:
    heads, images = [2, 4, 8], torch.randn(2, 3, 16, 24)
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "img_size": (16, 24)}
    model = create_vit("vit_variant", **sizes, block_heads=heads)
    state = dict(model.state_dict())
    computed = sincos_position_table(32, 4, 6, 1) if positions == "sincos" else None
    if computed is None:
        computed = torch.cat([torch.zeros(1, 1, 32), sinusoid_table(24, 32)], dim=1)
    own: State = {}
    for name, tensor in state.items():
        if name.endswith("attn.qkv.bias"):
            tensor[32:64] = 0
            own[name.replace("qkv.bias", "bias_q")] = tensor[:32].clone()
            own[name.replace("qkv.bias", "bias_v")] = tensor[64:].clone()
        elif name != "pos_embed":
            own[name] = tensor
    model.load_state_dict(state | {"pos_embed": computed})
    torch.save(own, tmp_path / "own.pth")
    biases = ["blocks.{i}.attn.bias_q", "0", "blocks.{i}.attn.bias_v"]
    key_map: dict[str, Any] = {"keys": {"blocks.{i}.attn.qkv.bias": biases}, "num_heads": heads, "positions": positions}
    with pytest.raises(InputError, match="needs the image size"):
        load_backbone(tmp_path / "own.pth", key_map=key_map)
    for options in ({"image_size": (16, 24)}, {"arguments": {"img_size": [16, 24]}}):
        size = options.pop("image_size", None)
        backbone = load_backbone(tmp_path / "own.pth", key_map=key_map | options, image_size=size)
        for got, right in zip(tokens(backbone, images), tokens(Backbone.wrap(model.eval()), images), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
    for wrong in ([2, 4], [2, 4, 5]):
        with pytest.raises(CheckpointError, match="one divisor of the width"):
            load_backbone(tmp_path / "own.pth", key_map=key_map | {"num_heads": wrong}, image_size=(16, 24))
    torch.save(own | {"pos_embed": computed}, tmp_path / "own.pth")
    with pytest.raises(InputError, match="has a table of positions"):
        load_backbone(tmp_path / "own.pth", key_map=key_map, image_size=(16, 24))


def test_arguments_of_the_model(tmp_path: Path) -> None:
    model = create_vit("vit_w24_d2_h3_p4", 12, act_layer="relu")
    torch.save(renamed(dict(model.state_dict()), {"blocks.": "layers."}), tmp_path / "own.pth")
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    keys = {f"blocks.{{i}}.{part}.{{p}}": f"layers.{{i}}.{part}.{{p}}" for part in parts}
    key_map = {"keys": keys, "num_heads": 3, "arguments": {"act_layer": "relu"}}
    images = torch.randn(1, 3, 12, 12)
    got = tokens(load_backbone(tmp_path / "own.pth", key_map=key_map), images)
    for one, right in zip(got, tokens(Backbone.wrap(model.eval()), images), strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patch_embed.proj.{p}": "stem.{p}"}, r"no tensor is named as those of blocks .* layers\.0\.norm1"),
        ({"patch_embed.proj.weight": "stem.weight"}, r"no tensor is named as those of blocks"),
        ({"blocks.{i}.norm1.{p}": "layers.0.norm1.{p}"}, "its placeholders must stand in"),
        ({"blocks.{i}.norm1.weight": "layers.{i}.norm1.weight"}, "leads no tensor to patch_embed"),
        ({"blocks.{i.x}.norm1": "layers.{i.x}.norm1"}, "brace that is no placeholder"),
        ({"norm.weight": ["0", "0"]}, "its placeholders must stand in"),
    ],
)
def test_first_steps_of_a_key_map_end_in_one_line(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    state = dict(create_vit("vit_w24_d2_h3_p4", 12).state_dict())
    torch.save(renamed(state, {"blocks.": "layers.", "patch_embed.proj": "stem"}), tmp_path / "own.pth")
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises((CheckpointError, InputError), match=message):
            read(tmp_path / "own.pth", key_map={"keys": keys, "num_heads": 3})


AVERAGES = [
    "teacher", "momentum", "ema", "target", "model_ema", "ema_model", "teacher_backbone.vit", "momentum_encoder",
    "target_network", "net_target", "encoder_ema", "averaged_model.module", "swa_model",
    "modelEMA", "EMAModel", "teacherEncoder", "ema2", "avg_model", "average_model.module", "polyak",
]  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("section", [False, True])
def test_the_running_average_is_taken_whatever_it_is_called(tmp_path: Path, name: str, section: bool) -> None:
    model = create_vit("vit_w24_d1_h3_p4", 12).state_dict()
    states = {"student": {n: t + 1 for n, t in model.items()}, name: dict(model)}
    states["gram_teacher.backbone"] = {n: t + 2 for n, t in model.items()}
    payload: Any = {f"{part}.{n}": t for part, state in states.items() for n, t in state.items()}
    torch.save({"state_dict": payload} if section else states, tmp_path / "x.pth")
    held = load_backbone(tmp_path / "x.pth", num_heads=3).model.state_dict()
    assert all(torch.equal(held[n], model[n]) for n in held)
    report = inspect_checkpoint(tmp_path / "x.pth", num_heads=3)
    assert len(report.encoders) == 3
    student = load_backbone(tmp_path / "x.pth", num_heads=3, encoder="student").model.state_dict()
    assert all(torch.equal(student[n], model[n] + 1) for n in student)
    with pytest.raises(InputError, match=f"it holds .*{report.encoder}"):
        load_backbone(tmp_path / "x.pth", num_heads=3, encoder="nobody")
