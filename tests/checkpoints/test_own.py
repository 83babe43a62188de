"""An encoder of one's own through a key map, as a mapping and as a YAML file; options in a model source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mim_refiner.checkpoints import inspect_checkpoint, load_backbone
from mim_refiner.checkpoints.families.own import read_key_map
from mim_refiner.checkpoints.options import bare_source, split_options, with_options
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import Backbone, create_vit

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
        CheckpointError, match=r"holds \d+ tensors that the encoder has no place for|has shape|no square grid"
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
        ({"num_heads": 0}, "num_heads: Input should be greater than or equal to 1"),
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
    assert (bare, options.num_heads, options.encoder, options.image_size) == ("a/b.pth", 4, None, (48, 16))
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
