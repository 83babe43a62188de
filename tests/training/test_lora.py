"""Adapters: the slow sum, what trains, merging, resuming, the cached step, and the way out and back in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.core.run import Run
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.export.adapter import write_adapter
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.lora import adapted, add_lora, lora_share, merge_lora
from mim_refiner.models.refiner import Refiner
from mim_refiner.training import refine
from mim_refiner.training.memory import measure_needs
from mim_refiner.training.recipe import LoraSettings, RefineRecipe


def encoder(**options: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16, **options))


def changed(backbone: Backbone) -> Backbone:
    """Adapters that do something: B is zero at the start."""
    add_lora(backbone, ["qkv", "proj", "fc1"], rank=3, alpha=6.0, first_block=1)
    with torch.no_grad():
        for parts in adapted(backbone).values():
            parts[0].b.normal_(std=0.3)
    return backbone


def outputs(backbone: Backbone) -> list[Tensor]:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [output.patches for output in backbone.eval().forward_blocks(images)]


def test_an_adapted_layer_is_the_sum_and_merging_changes_nothing() -> None:
    start, backbone = encoder(), changed(encoder())
    layer, plain = backbone.model.blocks[2].attn.qkv, start.model.blocks[2].attn.qkv
    parts = layer.parametrizations.weight[0]
    x = torch.randn(5, 32)
    by_hand = x @ plain.weight.T + plain.bias + (6.0 / 3) * ((x @ parts.a.T) @ parts.b.T)
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-5, atol=1e-6)
    assert sorted(adapted(backbone))[0].startswith("blocks.1.")
    before = outputs(backbone)
    assert (before[2] - outputs(start)[2]).abs().max() > 1e-2
    merge_lora(backbone)
    assert not adapted(backbone)
    assert backbone.state_dict().keys() == start.state_dict().keys()
    for ours, theirs in zip(outputs(backbone), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_only_the_adapters_of_trained_blocks_train_and_the_planner_sees_it() -> None:
    def refiner(lora: bool) -> Refiner:
        backbone = encoder()
        if lora:
            add_lora(backbone, ["qkv"], 2, 2.0, 1)
        made = Refiner(backbone, (2,), HeadConfig(24, 24, 16, 64), pooling="cls", frozen_blocks=1)
        made.unfreeze_encoder()
        return made

    whole, small = refiner(False), refiner(True)
    trains = {name for name, p in small.backbone.named_parameters() if p.requires_grad}
    layers = ("blocks.1.attn.qkv", "blocks.2.attn.qkv")
    assert trains == {f"model.{name}.parametrizations.weight.0.{part}" for name in layers for part in "ab"}
    assert lora_share(small.backbone) == pytest.approx(
        2 * 2 * (32 + 96) / sum(p.numel() for p in encoder().parameters())
    )
    needs = [measure_needs(each, [(16, 2)], 4, precision="fp32") for each in (whole, small)]
    assert needs[1].gradients < needs[0].gradients
    assert needs[1].state < needs[0].state


def test_micro_batches_give_the_plain_gradients() -> None:
    def gradients(micro_batch: int | None) -> dict[str, Tensor]:
        refiner = Refiner(changed(encoder()), (1, 2), HeadConfig(24, 24, 16, 64), pooling="cls")
        refiner.unfreeze_encoder()
        refiner.double()
        draw = torch.Generator().manual_seed(2)
        views = [torch.randn(6, 3, size, size, generator=draw, dtype=torch.float64) for size in (16, 16, 8)]
        refine.forward_backward(refiner, views, torch.arange(6), draw, Run(), micro_batch)
        return {name: p.grad for name, p in refiner.backbone.named_parameters() if p.grad is not None}

    expected, found = gradients(None), gradients(4)
    assert expected.keys() == found.keys()
    assert all("parametrizations" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_run_moves_the_adapters_alone_averages_them_and_resumes_to_the_bit(tiny_run, tmp_path: Path) -> None:
    lora = {"adapter": "lora", "lora": LoraSettings(rank=2, targets=["qkv"])}
    start = tiny_run().refiner.backbone.state_dict()
    whole = tiny_run(**lora)
    whole.run(tmp_path / "whole")
    state = {name.replace("parametrizations.weight.original", "weight"): t
             for name, t in whole.refiner.backbone.state_dict().items()}  # fmt: skip
    for name, tensor in start.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)
    moved = {name: parts[0].b.abs().max() for name, parts in adapted(whole.refiner.backbone).items()}
    assert len(moved) == 3
    assert min(moved.values()) > 0
    assert all(parts[0].b.abs().max() > 0 for parts in adapted(whole.ema.module).values())

    cut = tiny_run(**lora)
    with pytest.raises(KeyboardInterrupt):
        cut.run(tmp_path / "cut", stop_after=14)
    again = tiny_run(**lora)
    again.run(tmp_path / "cut")
    for name, tensor in whole.refiner.state_dict().items():
        torch.testing.assert_close(again.refiner.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_the_adapter_goes_out_in_pefts_layout_and_comes_back_on_its_base_alone(tmp_path: Path) -> None:
    base = encoder()
    export_timm(base, tmp_path / "base")
    adapter = changed(encoder())
    write_adapter(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.blocks.1.attn.qkv.lora_A.weight"].shape == (3, 32)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (3, 6.0, 6)
    for ours, theirs in zip(outputs(load_backbone(str(tmp_path / "adapter"))), outputs(adapter), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    half = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in half.items()}, tmp_path / "base" / "model.safetensors")
    adapter = changed(load_backbone(tmp_path / "base"))
    write_adapter(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    for ours, theirs in zip(outputs(load_backbone(tmp_path / "adapter")), outputs(adapter), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # the sum is not rounded as the stored base is

    with torch.no_grad():
        base.model.blocks[1].attn.qkv.weight.add_(0.01)
    export_timm(base, tmp_path / "other")
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is an adapter of other weights than .*name the encoder"):
        load_backbone(str(tmp_path / "adapter"))


def test_what_cannot_be_adapted_is_said() -> None:
    with pytest.raises(InputError, match=r"no block has a linear layer 'query'; choose among qkv, proj, fc1"):
        add_lora(encoder(), ["query"], 2, 2.0)
    for rank, target, most in ((33, "qkv", 32), (4096, "fc1", 32)):
        with pytest.raises(
            InputError, match=rf"lora\.rank {rank}: .* '{target}' is {most}, .* set lora\.rank to {most} at"
        ):
            add_lora(encoder(), [target], rank, 1.0)
    add_lora(encoder(), ["qkv"], 32, 1.0)
    with pytest.raises(InputError, match=r"no block from 3 on has a linear layer 'qkv'; freeze fewer blocks"):
        add_lora(encoder(), ["qkv"], 2, 2.0, first_block=3)
    twice = encoder()
    add_lora(twice, ["qkv", "qkv"], 2, 2.0)
    assert [len(parts) for parts in adapted(twice).values()] == [1, 1, 1]
    recipe = RefineRecipe(name="test", batch_size=4, adapter="lora", shard=True)
    with pytest.raises(InputError, match="adapter=lora goes neither with shard nor with compile"):
        refine.adapt(encoder(), recipe)
