"""Encoders that are not square or not RGB, refined by every domain's augmentations through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.types import height_width

IMAGES = 12
CASES = {  # name: domain, channels, size of the encoder, size of the images, bits
    "photographs": ("photographs", 3, (16, 16), (20, 24), 8),
    "panoramas": ("photographs", 3, (16, 48), (20, 70), 8),
    "retinas": ("medical", 3, (24, 24), (30, 30), 8),
    "radiographs": ("medical", 1, (16, 16), (24, 20), 16),
    "four bands": ("multispectral", 4, (16, 16), (16, 16), 8),
    "thirteen bands": ("multispectral", 13, (16, 16), (20, 20), 16),
    "time first": ("spectrogram", 1, (64, 16), (64, 16), 8),
    "frequency first": ("spectrogram", 1, (16, 40), (16, 80), 8),
    "pages": ("documents", 3, (32, 24), (60, 44), 8),
    "text lines": ("documents", 3, (8, 32), (12, 60), 8),
    "slides": ("microscopy", 3, (16, 16), (24, 24), 8),
    "fluorescence": ("microscopy", 5, (16, 16), (20, 20), 16),
}


@pytest.mark.parametrize("name", CASES)
def test_refined_exported_and_loaded_again(name: str, cli, tmp_path: Path) -> None:
    domain, channels, size, pixels, bits = CASES[name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2**bits, (IMAGES, *pixels, channels), dtype=f"uint{bits}")
    images[..., 0] //= 2  # channels differ
    np.save(tmp_path / "images.npy", images)
    torch.manual_seed(0)
    model = create_vit("vit_w32_d3_h2_p8", image_size=size, in_chans=channels)
    encoder = Backbone.wrap(model, family="mae", architecture="vit_w32_d3_h2_p8", licence="none", source="test")
    export_timm(encoder, tmp_path / "start", card={"base": "random"})

    settings = ["batch_size=6", f"domain={domain}", "normalization=data", "heads.blocks=[1,2]"]
    if max(size) <= 64:  # the default recipe's local size is made for squares of 32
        settings.append(f"views.local_size={'x'.join('8' for _ in size)}")
    arguments = cli.refine(tmp_path / "images.npy", tmp_path / "start", tmp_path / "run", *settings)
    outcome = cli.call(*arguments)
    assert outcome.code == 0, outcome.err

    refined = load_backbone(tmp_path / "run")
    assert refined.info.image_size == size
    assert refined.info.in_chans == channels
    scaled = images / (2**bits - 1)
    np.testing.assert_allclose(refined.info.mean, scaled.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(refined.info.std, scaled.std((0, 1, 2)), atol=1e-6)
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert f"domain: {domain}" in recipe

    embedded = cli.call("embed", "--model", tmp_path / "run", "--data", tmp_path / "images.npy", "--out",
                        tmp_path / "features.npy", "--device", "cpu")  # fmt: skip
    assert embedded.code == 0, embedded.err
    features = np.load(tmp_path / "features.npy")
    assert features.shape == (IMAGES, 32)

    again = cli.call("export", "--model", tmp_path / "run", "--format", "timm", "--out", tmp_path / "export")
    assert again.code == 0, again.err
    loaded = load_backbone(tmp_path / "export")
    inputs = torch.rand(2, channels, *height_width(size))
    for one, other in zip(refined.forward_blocks(inputs), loaded.forward_blocks(inputs), strict=True):
        assert torch.equal(one.patches, other.patches)
    assert (loaded.info.mean, loaded.info.std) == (refined.info.mean, refined.info.std)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(encoder.model.state_dict().values(), loaded.model.state_dict().values(), strict=True)
    )


def test_doctor_names_a_set(cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "lines.npy", rng.integers(0, 255, (6, 16, 64, 1), dtype=np.uint8))
    model = create_vit("vit_w32_d3_h2_p8", image_size=(16, 64), in_chans=1)
    encoder = Backbone.wrap(model, family="mae", architecture="vit_w32_d3_h2_p8", licence="none", source="test")
    export_timm(encoder, tmp_path / "start", card={"base": "random"})
    arguments = ("doctor", "--data", tmp_path / "lines.npy", "--model", tmp_path / "start")
    found = cli.call(*arguments, "--json")
    assert found.code == 0, found.err
    told = json.loads(found.out)
    assert told["augmentations"]["domain"] == "spectrogram"
    assert not any("enlarged" in note for note in told["model"]["notes"])  # high to high, wide to wide
    assert "--set domain=spectrogram --set normalization=data" in cli.call(*arguments).out
