"""Which weights and which of the file's words count, where a file holds those of several parts or states."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.models.backbone import create_vit

State = dict[str, Tensor]


def is_of(backbone: Any, state: State) -> bool:
    held = backbone.model.state_dict()
    return backbone.info.coverage == 1 and all(torch.equal(held[name], state[name]) for name in held)


def moved(state: State, prefix: str = "", by: float = 1.0) -> State:
    return {prefix + name: tensor + by for name, tensor in state.items()}


@pytest.mark.parametrize("mark", [{"meta": {"mmengine_version": "0.10"}}, {"message_hub": {"resumed_keys": {"a": 1}}}])
def test_mmengine_swaps_average_and_weights_on_saving(tmp_path: Path, vit_state: State, mark: dict[str, Any]) -> None:
    raw = moved(vit_state, "module.backbone.")
    for name, extra in {"a": mark, "b": {}}.items():
        ema = raw if extra else raw | {"steps": torch.tensor(3)}
        average = moved(vit_state, "backbone.", 0)
        torch.save({"state_dict": average, "ema_state_dict": ema, **extra}, tmp_path / name)
        assert is_of(load_backbone(tmp_path / name, num_heads=4), vit_state)
        assert is_of(load_backbone(tmp_path / name, num_heads=4, encoder="ema"), moved(vit_state))
    torch.save({"state_dict": average, "ema_state_dict": raw}, tmp_path / "other")  # of another tool
    assert is_of(load_backbone(tmp_path / "other", num_heads=4), moved(vit_state))


@pytest.mark.parametrize(
    "part",
    ["decoder_cfg", "decoderArgs", "mae_decoder", "mask_decoder", "predictor_config", "attn_pooler", "probe", "teacher",
     "text_encoder", "target", "neck_2"],
)  # fmt: skip
def test_words_about_another_part_do_not_count(tmp_path: Path, vit_state: State, part: str) -> None:
    said = {"num_heads": 8, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "img_size": {"height": 16, "width": 64}}
    torch.save({"model": vit_state, "args": {part: said}}, tmp_path / "x")
    with pytest.raises(InputError, match="number of attention heads"):
        load_backbone(tmp_path / "x")
    assert load_backbone(tmp_path / "x", num_heads=4).info.mean == pytest.approx((0.485, 0.456, 0.406))
    torch.save({"model": vit_state, "args": {part: said, "encoder_cfg": said | {"num_heads": 4}}}, tmp_path / "x")
    info = load_backbone(tmp_path / "x").info
    assert (info.num_heads, info.mean) == (4, (0.1, 0.2, 0.3))


def test_an_adapter_beside_its_base_is_merged(tmp_path: Path, vit_state: State) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": arguments}))
    save_file(vit_state, tmp_path / "model.safetensors")
    a, b = torch.randn(2, 32), torch.randn(96, 2)
    layer = "base_model.model.blocks.0.attn.qkv"
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    torch.save([torch.ones(2)], tmp_path / "rng_state.pth")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "owner/elsewhere"}

    def write(**more: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | more))

    write(init_lora_weights=True, layer_replication=None, use_qalora=False)
    merged = vit_state["blocks.0.attn.qkv.weight"] + 2 * b @ a
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors"):
        assert torch.allclose(load_backbone(source).model.blocks[0].attn.qkv.weight, merged, atol=1e-5)
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b[1:]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: has LoRA layers of shapes"):
        load_backbone(tmp_path)
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    for more, named in [
        *(({"init_lora_weights": kind}, kind) for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq")),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
    ]:
        write(**more)
        with pytest.raises(CheckpointError, match=rf"{named}.*merge_and_unload"):
            load_backbone(tmp_path)
    write()
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(("top", "scale"), [(0.5, 1), (120.0, 255), (300.0, 65535), (9000.0, 65535)])
def test_raw_mean_and_std_are_scaled_by_their_largest(
    tmp_path: Path, vit_state: State, caplog: pytest.LogCaptureFixture, top: float, scale: float
) -> None:
    said = {"mean": [top / 2, top, top / 4], "std": [top / 3, top / 4, top / 5]}
    torch.save({"model": vit_state, "args": said}, tmp_path / "x")
    with caplog.at_level(logging.WARNING, "mim_refiner"):
        assert load_backbone(tmp_path / "x", num_heads=4).info.mean == pytest.approx([v / scale for v in said["mean"]])
    assert ("divided by 65535" in caplog.text) == (scale == 65535)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mim_refiner"):
        load_backbone(tmp_path / "x", num_heads=4, key_map={"norm_eps": 1e-5})  # the caller's word on something else
    assert ("divided by 65535" in caplog.text) == (scale == 65535)


@pytest.mark.parametrize("names", [("fast", "slow"), ("best", "last"), ("s1_encoder", "s2_encoder")])
def test_the_choice_that_no_name_tells_is_said(
    tmp_path: Path, vit_state: State, caplog: pytest.LogCaptureFixture, names: tuple[str, str]
) -> None:
    torch.save({names[0]: vit_state, names[1]: moved(vit_state)}, tmp_path / "x")
    with caplog.at_level(logging.WARNING, "mim_refiner"):
        assert is_of(load_backbone(tmp_path / "x", num_heads=4), vit_state)
    assert f"'{names[0]}' of the file's encoders" in caplog.text
    assert f"holds {names[1]}" in caplog.text
    caplog.clear()
    load_backbone(tmp_path / "x", num_heads=4, encoder=names[1])
    assert "no name tells" not in caplog.text


@pytest.mark.parametrize("size", ["vit_w48_d2_h4_p8", "vit_w32_d3_h4_p8"])
def test_a_teacher_of_other_shapes_is_no_average(
    tmp_path: Path, vit_state: State, caplog: pytest.LogCaptureFixture, size: str
) -> None:
    torch.save({"model": vit_state, "teacher": create_vit(size, 32).state_dict()}, tmp_path / "x")
    with caplog.at_level(logging.WARNING, "mim_refiner"):
        assert is_of(load_backbone(tmp_path / "x", num_heads=4), vit_state)
    assert "'teacher' has other shapes" in caplog.text


@pytest.mark.parametrize(
    ("extra", "gone"),
    [
        ({"adapter.down.weight": torch.ones(4, 32)}, ""), ({"attn.qkv.weight_mask": torch.ones(96, 32)}, ""),
        ({"attn.qkv.weight_orig": torch.ones(96, 32)}, "attn.qkv.weight"),
        ({"attn.qkv.parametrizations.weight.original0": torch.ones(96, 1)}, "attn.qkv.weight"),
        ({"attn.qkv.linear_a_q.weight": torch.ones(4, 32), "attn.qkv.qkv.weight": torch.ones(96, 32)},
         "attn.qkv.weight"),
    ],
)  # fmt: skip
def test_what_is_strange_in_a_block_is_named(tmp_path: Path, vit_state: State, extra: State, gone: str) -> None:
    state = {name: tensor for name, tensor in vit_state.items() if not gone or not name.endswith(gone)}
    state |= {f"blocks.{block}.{name}": tensor for block in (0, 1) for name, tensor in extra.items()}
    torch.save({"model": {f"image_encoder.{name}": tensor for name, tensor in state.items()}}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=rf"x: {2 * len(extra)} tensors .*image_encoder\.blocks\.0\..* drop: "):
        load_backbone(tmp_path / "x", num_heads=4)
    if not gone:
        torch.save(state, tmp_path / "y")
        drop = {f"blocks.{block}.{name}": "extra" for block in (0, 1) for name in extra}
        assert is_of(load_backbone(tmp_path / "y", num_heads=4, key_map={"drop": drop}), vit_state)


def test_a_distilled_deit_keeps_its_second_token(tmp_path: Path) -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    )
    model.load_state_dict(moved(model.state_dict(), by=0.01))
    torch.save({"model": model.state_dict()}, tmp_path / "x")
    images = torch.randn(2, 3, 32, 32)
    backbone = load_backbone(tmp_path / "x", num_heads=4)
    with torch.no_grad():
        expected = model.eval().forward_features(images)
        assert torch.allclose(backbone.model.forward_features(images), expected, atol=1e-5)
    assert backbone.info.num_prefix_tokens == 2


def test_the_arguments_tell_the_eps_of_norms_and_a_key_map_counts_first(tmp_path: Path, vit_state: State) -> None:
    said = {"num_heads": 4, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    for name, eps in (("layer_norm_eps", 1e-2), ("norm_eps", 1e-3)):
        torch.save({"model": vit_state, "args": said | {name: eps}}, tmp_path / "x")
        assert load_backbone(tmp_path / "x").info.norm_eps == eps
    info = load_backbone(tmp_path / "x", key_map={"norm_eps": 1e-5, "mean": [0.5] * 3}).info
    assert (info.norm_eps, info.mean, info.std) == (1e-5, (0.5, 0.5, 0.5), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("heads", ["4", 4.0, np.array(4), np.array([4]), torch.tensor(4), np.int64(4)])
def test_heads_in_any_spelling(tmp_path: Path, vit_state: State, heads: Any) -> None:
    torch.save({"model": vit_state, "args": {"num_heads": heads}}, tmp_path / "x")
    assert load_backbone(tmp_path / "x").info.num_heads == 4


@pytest.mark.parametrize("kind", [np.array, torch.tensor, str, lambda v: torch.tensor(v).view(1, 3, 1, 1)])
def test_mean_and_std_in_any_spelling(tmp_path: Path, vit_state: State, kind: Any) -> None:
    said = {"mean": kind([0.1, 0.2, 0.3]), "std": kind([0.4, 0.5, 0.6])}
    torch.save({"model": vit_state, "args": said}, tmp_path / "x")
    info = load_backbone(tmp_path / "x", num_heads=4).info
    assert (*info.mean, *info.std) == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))


def test_an_adapter_by_the_names_of_transformers_5(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    plain = load_backbone(tmp_path).model.blocks[1].attn.qkv.weight
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    for layer in ("layers.1.attention.v_proj", "encoder.layer.1.attention.attention.value"):
        parts = {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
        save_file(parts, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        change = load_backbone(tmp_path).model.blocks[1].attn.qkv.weight - plain
        assert torch.allclose(change, torch.cat([torch.zeros(64, 32), b @ a]), atol=1e-5)
