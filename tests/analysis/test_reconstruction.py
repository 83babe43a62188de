"""Decoders on the blocks of a tiny frozen encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.analysis.reconstruction import BlockDecoders, ReconstructionSettings, reconstruction_by_block
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.models.backbone import Backbone

SETTINGS = ReconstructionSettings(dim=16, depth=1, head_dim=8, epochs=12, batch_size=16, learning_rate=5e-3)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0)
    return Backbone.wrap(vit)


@pytest.fixture
def images(tmp_path):
    """Smooth gradients: hidden patches follow from visible ones."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, 16)
    slopes = rng.normal(size=(80, 2, 3))
    plane = slopes[:, 0, None, None] * ramp[:, None, None] + slopes[:, 1, None, None] * ramp[None, :, None]
    np.savez(tmp_path / "set.npz", images=(128 + 40 * plane).clip(0, 255).astype(np.uint8))
    return ImageSet(open_source(tmp_path / "set.npz"))


def measure(backbone, images, seed=0, settings=SETTINGS):
    rows = np.arange(64), np.arange(64, 80)
    return reconstruction_by_block(
        backbone, images, images, train_rows=rows[0], test_rows=rows[1], settings=settings, run=Run(seed=seed)
    )


def test_error_of_a_block_equals_a_slow_loop(backbone):
    """Forward pass of the decoders, patch by patch, for one image."""
    decoders = BlockDecoders(backbone, SETTINGS, seed=0).eval()
    pixels, noise = torch.randn(1, 3, 16, 16), torch.rand(1, 16)
    with torch.no_grad():
        errors = decoders(pixels, noise)
        order = noise[0].argsort().tolist()
        shown, hidden = order[:4], order[4:]
        tokens = backbone.eval().embed(pixels)
        visible = torch.cat([tokens[:, :1], tokens[:, [1 + patch for patch in shown]]], dim=1)
        for block in range(3):
            visible = backbone.model.blocks[block](visible)
            decoder = decoders.decoders[block]
            embedded = decoder.embed(torch.nn.functional.layer_norm(visible, (24,)))
            sequence = [embedded[0, 0]]
            for patch in range(16):
                sequence.append(embedded[0, 1 + shown.index(patch)] if patch in shown else decoder.mask_token[0, 0])
            output = decoder.pixels(decoder.norm(decoder.blocks(torch.stack(sequence)[None] + decoder.positions)))[0]
            total = 0.0
            for patch in hidden:
                row, column = divmod(patch, 4)
                target = pixels[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total += float((output[1 + patch] - target).square().mean())
            assert float(errors[block, 0]) == pytest.approx(total / len(hidden), rel=1e-4)


def test_decoders_learn_and_the_encoder_stays(backbone, images):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    untrained = measure(
        backbone, images, settings=ReconstructionSettings(**{**SETTINGS.__dict__, "learning_rate": 1e-9})
    )
    trained = measure(backbone, images)
    assert trained.shape == (3, 16)
    assert (trained.mean(1) < 0.8 * untrained.mean(1)).all()
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert (measure(backbone, images) == trained).all()  # same seed, same bits
    assert not (measure(backbone, images, seed=1) == trained).all()
