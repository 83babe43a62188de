"""Which weights and which of the file's words count, where a file holds those of several parts or states."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints import load_backbone
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
