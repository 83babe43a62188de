"""Bad input through the command line: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def refused(outcome, out: Path, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert not out.exists()


def test_missing_and_empty_data(cli, mae, tmp_path):
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    refused(cli.call(*cli.refine(tmp_path / "none", mae.export, out), "--quiet"), out, "no such file or folder")
    refused(cli.call(*cli.refine(empty, mae.export, out), "--quiet"), out, "the folder is empty")
    (empty / "a.png").write_text("not an image")
    refused(cli.call(*cli.refine(empty, mae.export, out), "--quiet"), out, "no image can be read")


def test_a_damaged_image_is_listed_and_too_many_stop_the_run(cli, mae, shapes, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shapes, data)
    files = sorted(data.rglob("*.png"))
    files[0].write_bytes(files[0].read_bytes()[:40])
    outcome = cli.call(*cli.refine(data, mae.export, out))
    assert outcome.code == 0, outcome.err
    assert "skipped 1 unreadable image; listed in" in outcome.err
    assert files[0].name in (out / "skipped_images.txt").read_text()
    for file in files[1:8]:
        file.write_text("broken")
    refused(cli.call(*cli.refine(data, mae.export, tmp_path / "b"), "--quiet"), tmp_path / "b", "more than 10 %")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoints(cli, mae, shapes, tmp_path):
    out, sprung = tmp_path / "run", tmp_path / "sprung"
    text, cut, hostile = tmp_path / "a.pth", tmp_path / "b.safetensors", tmp_path / "c.pth"
    text.write_text("hello")
    cut.write_bytes((mae.export / "model.safetensors").read_bytes()[:1000])
    torch.save({"model": Trap(sprung)}, hostile)
    for file in (text, cut, hostile):
        refused(cli.call(*cli.refine(shapes, file, out), "--quiet"), out, file.name)
    assert not sprung.exists()


def test_wrong_family_and_partial_checkpoints(cli, mae, shapes, tmp_path):
    out, other, partial = tmp_path / "run", tmp_path / "other.safetensors", tmp_path / "partial"
    save_file({"layer.weight": torch.ones(2, 2)}, other)
    refused(cli.call(*cli.refine(shapes, other, out), "--quiet"), out, "other.safetensors")
    shutil.copytree(mae.export, partial)
    tensors = load_file(partial / "model.safetensors")
    del tensors["blocks.1.attn.qkv.weight"]
    save_file(tensors, partial / "model.safetensors")
    refused(cli.call(*cli.refine(shapes, partial, out), "--quiet"), out, "blocks.1.attn.qkv.weight")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("views.local_size=7", ("multiple of the patch",)),
        ("batch_size=64 heads.queue_size=64", ("batch size 64", "48 images")),
        ("heads.queue_size=4", ("queue",)),
        ("heads.blocks=[9]", ("block 9", "out of range")),
        ("refinement.epoch=2", ("unknown recipe key", "did you mean 'refinement.epochs'")),
    ],
)
def test_impossible_settings(cli, mae, shapes, tmp_path, setting, words):
    out = tmp_path / "run"
    refused(cli.call(*cli.refine(shapes, mae.export, out, *setting.split()), "--quiet"), out, *words)


def test_unknown_recipe_architecture_and_image_size(cli, mae, shapes, tmp_path):
    out = tmp_path / "run"
    outcome = cli.call(*cli.refine(shapes, mae.export, out), "--recipe", "tinny", "--quiet")
    refused(outcome, out, "unknown recipe", "did you mean 'tiny'")
    refused(cli.call(*cli.pretrain(shapes, out, "image_size=15"), "--quiet"), out, "multiple of the patch")
    words = ["pretrain", "--data", str(shapes), "--out", str(out), "--quiet", "--arch"]
    refused(cli.call(*words, "vit_tinny_patch16_224"), out, "unknown architecture")
    for arch in ("swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224", "vit_capi"):
        refused(cli.call(*words, arch), out, arch, "plain ViT")


def test_an_output_folder_that_cannot_be(cli, mae, shapes, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    refused(
        cli.call(*cli.refine(shapes, mae.export, blocker / "run"), "--quiet"),
        blocker / "run",
        "is a file; choose another --out",
    )


def test_a_folder_of_something_else_is_refused_before_anything_is_read(cli, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for words in (cli.refine("no-data", "no-model", tmp_path), cli.pretrain("no-data", tmp_path)):
        outcome = cli.call(*words, "--quiet")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "not empty and not a run folder" in outcome.err
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_non_finite_loss_names_step_rate_and_checkpoint(cli, mae, shapes, tmp_path):
    settings = ("refinement.base_lr=1e30", "checkpoint_every=2", "precision=fp32", "refinement.epochs=3")
    outcome = cli.call(*cli.refine(shapes, mae.export, tmp_path / "run", *settings), "--quiet")
    assert outcome.code == 2, outcome.err
    line = outcome.err.splitlines()[-1]
    assert "of refinement (learning rate" in line
    assert "last good checkpoint: step-0000" in line
