"""Loading: heads, sizes, channels, prefixes, partial and unusable files, names of sources."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.checkpoints import resolve
from mim_refiner.checkpoints.load import PartialCheckpointWarning, inspect_checkpoint, load_backbone
from mim_refiner.errors import CheckpointError, InputError
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import create_vit

State = dict[str, Tensor]


def save(state: object, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


def test_unknown_number_of_heads_is_asked_for(tmp_path: Path, vit_state: State) -> None:
    path = save(vit_state, tmp_path)
    with pytest.raises(InputError, match=r"2 blocks of width 32\) .* pass num_heads="):
        load_backbone(path)
    with pytest.raises(InputError, match="num_heads=5 does not divide"):
        load_backbone(path, num_heads=5)
    assert load_backbone(path, num_heads=8).info.num_heads == 8


def test_heads_of_widths_with_one_usual_number_are_guessed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = create_vit("vit_base_patch16_224", 32, mlp_ratio=0.1).half().state_dict()
    path = save({"model": state}, tmp_path)
    for _ in range(2):
        caplog.clear()
        info = load_backbone(path).info
        assert (info.num_heads, info.family, info.licence) == (12, "mae", "CC-BY-NC-4.0")
        assert "guessed: 12 attention heads" in caplog.text
        assert "guessed: images of 32x32 px in training" in caplog.text
    assert "guessed: 12 attention heads" in " ".join(inspect_checkpoint(path).notes)


@pytest.mark.parametrize(("arch", "usual"), [("vit_tiny_patch16_224", "3 or 12"), ("vit_small_patch16_224", "6 or 12")])
def test_widths_with_several_usual_heads_are_asked_for(tmp_path: Path, arch: str, usual: str) -> None:
    state = create_vit(arch, 32, mlp_ratio=0.1).half().state_dict()
    path = save({"model": state}, tmp_path)
    with pytest.raises(InputError, match=rf"\({usual} are usual\); pass num_heads="):
        load_backbone(path)
    assert load_backbone(path, num_heads=12).info.num_heads == 12
    save({"model": state, "args": argparse.Namespace(num_heads=12)}, tmp_path)
    assert load_backbone(path).info.num_heads == 12
    assert load_backbone(path, num_heads=int(usual[0])).info.num_heads == int(usual[0])


def test_what_is_known_of_the_image_size_counts_before_the_square(
    tmp_path: Path, vit_state: State, caplog: pytest.LogCaptureFixture
) -> None:
    told = [{"args": argparse.Namespace(input_size=[16, 64])}, {"hyper_parameters": {"cfg": {"img_size": [16, 64]}}}]
    told += [{"config": {"data": {"image_size": "16x64"}}}, {"args": {"img_size": [3, 16, 64]}}]
    told += [{"args": {"target_length": 16, "num_mel_bins": 64}}, {"args": {"img_h": 16, "img_w": 64}}]
    told += [{"cfg": {"data": {"input_height": 16, "input_width": 64}}}, {"args": {"img_size": "(16, 64)"}}]
    for extra in told:
        path = save({"model": vit_state, **extra}, tmp_path)
        assert load_backbone(path, num_heads=4).info.image_size == (16, 64)
        assert inspect_checkpoint(path, num_heads=4).image_size == (16, 64)
    assert "images of" not in caplog.text
    resized = load_backbone(path, num_heads=4, image_size=32)  # the file's word stands; the caller wants another size
    assert resized.info.image_size == (32, 32)
    assert not torch.equal(resized.model.pos_embed, vit_state["pos_embed"])
    path = save({"model": vit_state}, tmp_path)
    asked = load_backbone(path, num_heads=4, image_size=(16, 64))
    assert torch.equal(asked.model.pos_embed, vit_state["pos_embed"])


@pytest.mark.parametrize(
    ("arch", "size", "in_chans"), [("vit_w24_d1_h2_p4", (32, 128), 3), ("vit_w24_d1_h2_p8", (64, 256), 1)]
)
def test_many_positions_that_are_no_usual_square_are_asked_for(
    tmp_path: Path, arch: str, size: tuple[int, int], in_chans: int
) -> None:
    state = create_vit(arch, size, in_chans=in_chans).state_dict()
    path = save({"model": state}, tmp_path)
    for read in (load_backbone, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=r"256 positions may be 16x16 .* or 8x32 .*pass image_size="):
            read(path, num_heads=2)
    assert load_backbone(path, num_heads=2, image_size=size).info.image_size == size


def test_a_config_of_no_known_library_counts_as_arguments(tmp_path: Path, vit_state: State) -> None:
    save_file(vit_state, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text('{"model": {"img_size": [16, 64], "num_heads": 8}, "std": [0.2, 0.2, 0.2]}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')
    for source in (tmp_path, tmp_path / "weights.safetensors"):
        info = load_backbone(source).info
        assert (info.image_size, info.num_heads, info.mean, info.std) == ((16, 64), 8, (0.1,) * 3, (0.2,) * 3)


def test_mean_and_std_of_the_file_or_a_guess(
    tmp_path: Path, vit_state: State, caplog: pytest.LogCaptureFixture
) -> None:
    args = {"mean": [127.5, 127.5, 127.5], "std": [63.75] * 3}
    path = save({"state_dict": {f"net.{n}": t for n, t in vit_state.items()}, "hyper_parameters": args}, tmp_path)
    info = load_backbone(path, num_heads=4).info
    assert (info.mean, info.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert "mean and std" not in caplog.text
    path = save({"state_dict": {f"net.{n}": t for n, t in vit_state.items()}}, tmp_path)
    assert load_backbone(path, num_heads=4).info.mean == (0.485, 0.456, 0.406)
    assert "guessed: mean and std (ImageNet's)" in caplog.text


def test_half_precision_becomes_float32(tmp_path: Path, vit_state: State) -> None:
    path = save({name: tensor.half() for name, tensor in vit_state.items()}, tmp_path)
    backbone = load_backbone(path, num_heads=4)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert not backbone.training


def test_another_image_size_resamples_the_table_as_timm(tmp_path: Path, vit_state: State) -> None:
    path = save(vit_state, tmp_path)
    native, resized = load_backbone(path, num_heads=4), load_backbone(path, num_heads=4, image_size=(48, 16))
    assert resized.info.image_size == (48, 16)
    assert resized.model.pos_embed.shape == (1, 13, 32)
    images = torch.randn(2, 3, 48, 16)  # the native model resamples in its forward pass
    [expected], [got] = native.forward_blocks(images, [-1]), resized.forward_blocks(images, [-1])
    torch.testing.assert_close(got.patches, expected.patches, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="50x50 is not a multiple of the patch size 8x8"):
        load_backbone(path, num_heads=4, image_size=50)


def test_a_table_that_is_no_square_needs_its_image_size(tmp_path: Path) -> None:
    state = create_vit("vit_w32_d2_h4_p8", (48, 16)).state_dict()
    path = save(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"13 entries, no square grid; pass its image_size"):
        load_backbone(path, num_heads=4)
    backbone = load_backbone(path, num_heads=4, image_size=(48, 16))
    assert torch.equal(backbone.model.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_other_channels_keep_the_response_to_gray(tmp_path: Path, vit_state: State, channels: int) -> None:
    path = save(vit_state, tmp_path)
    backbone = load_backbone(path, num_heads=4, in_chans=channels)
    assert backbone.info.in_chans == channels == len(backbone.info.mean)
    weight, source = backbone.model.patch_embed.proj.weight, vit_state["patch_embed.proj.weight"]
    if channels != 2:  # every source channel occurs equally often
        torch.testing.assert_close(weight.sum(1), source.sum(1))
    torch.testing.assert_close(weight[:, 0], source.sum(1) if channels == 1 else source[:, 0] * 3 / channels)
    with pytest.raises(InputError, match="in_chans must be at least 1"):
        load_backbone(path, num_heads=4, in_chans=0)


def test_incomplete_file(tmp_path: Path, vit_state: State) -> None:
    gone = [name for name in vit_state if name.startswith("blocks.0.")] + ["cls_token"]
    path = save({name: tensor for name, tensor in vit_state.items() if name not in gone}, tmp_path)
    with pytest.raises(CheckpointError, match=r"gives 17 of the encoder's 30 tensors, missing: .*\(\+9 more\)"):
        load_backbone(path, num_heads=4)
    with pytest.warns(PartialCheckpointWarning, match="missing ones stay RANDOM"):
        backbone = load_backbone(path, num_heads=4, strict=False)
    assert backbone.info.coverage == pytest.approx(17 / 30)
    assert torch.equal(backbone.model.blocks[1].norm1.weight, vit_state["blocks.1.norm1.weight"])
    report = inspect_checkpoint(path)
    assert sorted(report.missing) == sorted(gone)
    assert report.coverage == pytest.approx(17 / 30)


@pytest.mark.parametrize("name", ["pos_embed", "norm.weight", "patch_embed.proj.bias"])
def test_one_missing_tensor_is_named(tmp_path: Path, vit_state: State, name: str) -> None:
    del vit_state[name]
    with pytest.raises(CheckpointError, match=f"missing: {name};"):
        load_backbone(save(vit_state, tmp_path), num_heads=4, image_size=32)


def test_a_mae_file_without_final_norm_is_incomplete(tmp_path: Path, vit_state: State) -> None:
    path = save({"model": {n: t for n, t in vit_state.items() if not n.startswith("norm.")}}, tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight, norm\.bias"):
        load_backbone(path, num_heads=4)


def test_tensors_without_a_place(tmp_path: Path, vit_state: State) -> None:
    path = save(vit_state | {"rel_pos_bias.table": torch.ones(3), "head.weight": torch.ones(5, 32)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 tensor that the encoder has no place for: rel_pos_bias\.table"):
        load_backbone(path, num_heads=4)
    with pytest.warns(PartialCheckpointWarning, match="ignored"):
        assert load_backbone(path, num_heads=4, strict=False).info.coverage == 1.0
    reasons = {record.name: record.reason for record in inspect_checkpoint(path).tensors if record.status == "dropped"}
    head = "head of the training (classifier, projection)"
    assert reasons == {"rel_pos_bias.table": "no place in the encoder", "head.weight": head}


def test_tensors_of_other_sections_are_reported(tmp_path: Path, vit_state: State) -> None:
    path = save({"model": vit_state, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}, tmp_path)
    report = inspect_checkpoint(path)
    assert len(report.tensors) == len(vit_state) + 1
    [record] = [record for record in report.tensors if record.status == "dropped"]
    assert (record.name, record.shape, record.reason) == ("optimizer.state.0.exp_avg", (4,), "optimiser state")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(tmp_path: Path, vit_state: State, value: float) -> None:
    vit_state["blocks.1.mlp.fc1.weight"][0, 0] = value
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight holds NaN or infinite"):
        load_backbone(save(vit_state, tmp_path), num_heads=4)


def test_wrong_shape_names_tensor_and_shapes(tmp_path: Path, vit_state: State) -> None:
    vit_state["blocks.1.attn.proj.weight"] = torch.zeros(32, 31)
    with pytest.raises(CheckpointError, match=r"1\.attn\.proj\.weight has shape \[32, 31\], .* needs \[32, 32\]"):
        load_backbone(save(vit_state, tmp_path), num_heads=4)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layer1.0.conv1.weight": torch.ones(2)}, "it looks like a ResNet"),
        ({"foo": torch.ones(2), "bar": torch.ones(2)}, "its tensors are named foo, bar"),
        ({"blocks.0.attn.qkv.weight": torch.ones(96, 32)}, "without patch_embed.proj.weight"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, state: State, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_backbone(save(state, tmp_path))


def test_loading_leaves_the_callers_random_state(tmp_path: Path, vit_state: State) -> None:
    path = save(vit_state, tmp_path)
    before = torch.get_rng_state()
    load_backbone(path, num_heads=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.pth", "no such file or folder"),
        ("missing.safetensors", "no such file or folder"),
        ("vit_base_patch16_224", "architecture without weights; name one of its weights: vit_base_patch16_224"),
        ("vit_base_patch16_224.nonsense", "without weights; name one"),
        ("vit_bas_patch16_224", "did you mean 'vit_base_patch16_224'"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_backbone(source)


def test_hub_sources(tmp_path: Path, vit_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_backbone(save(vit_state, tmp_path), num_heads=4)
    export_timm(plain, tmp_path / "hub")
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(tmp_path / "hub")

    monkeypatch.setattr(resolve, "snapshot_download", download)
    for source in ("hf-hub:owner/name", "hf-hub:owner/name@v2", "vit_base_patch16_224.mae"):
        assert load_backbone(source).info.source == source
    assert asked == [("owner/name", None), ("owner/name", "v2"), ("timm/vit_base_patch16_224.mae", None)]


def test_offline_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"downloaded \(no route to host\).*pass its path"):
        load_backbone("vit_base_patch16_224.mae")


def test_run_folder_export_folder_and_local_dir(tmp_path: Path, vit_state: State) -> None:
    plain = load_backbone(save({"model": vit_state}, tmp_path), num_heads=4)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("seed: 0\n")
    export_timm(plain, run / "export")
    for source in (run, run / "export", f"local-dir:{run / 'export'}", run / "export" / "model.safetensors"):
        heads = 4 if str(source).endswith(".safetensors") else None
        backbone = load_backbone(source, num_heads=heads)
        assert all(torch.equal(tensor, vit_state[name]) for name, tensor in backbone.model.state_dict().items())
    assert load_backbone(run).info.family == "mae"
    report = inspect_checkpoint(run)
    assert (report.num_heads, report.coverage, report.licence) == (4, 1.0, "CC-BY-NC-4.0")


def test_several_weight_files_in_a_folder(tmp_path: Path, vit_state: State) -> None:
    export_timm(load_backbone(save(vit_state, tmp_path), num_heads=4), tmp_path / "folder")
    weights = tmp_path / "folder" / "model.safetensors"
    weights.rename(weights.with_name("a.safetensors"))
    assert load_backbone(tmp_path / "folder").info.coverage == 1.0
    save_file(vit_state, weights.with_name("b.safetensors"))
    with pytest.raises(CheckpointError, match=r"several weight files \(a\.safetensors, b\.safetensors\)"):
        load_backbone(tmp_path / "folder")
