from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import create_vit
from mim_refiner.models.mae import MaskedAutoencoder, patchify, sincos_position_table


def published_mae(folder: Path, name: str) -> MaskedAutoencoder:
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: dict[str, Tensor] = torch.load(folder / name, weights_only=True)["model"]
    encoder = create_vit("vit_w32_d3_h4_p8", image_size=32)
    depth = len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")})
    mae = MaskedAutoencoder(encoder, decoder_dim=state["mask_token"].shape[-1], decoder_depth=depth, decoder_heads=2)
    ours = {
        key if key.startswith(("decoder", "mask_token")) else f"encoder.{key}": value for key, value in state.items()
    }
    mae.load_state_dict(ours)  # the decoder's names are the published ones
    return mae


@pytest.mark.parametrize("name", ["mae_pretrain_full.pth", "mae_training_checkpoint-0.pth"])
def test_loss_prediction_and_mask_are_those_of_the_published_code(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "golden" / "checkpoints"
    expected = load_file(folder / "mae_expected.safetensors")
    with torch.no_grad():
        output = published_mae(folder, name)(expected["images"], noise=expected["mae_noise"])
    torch.testing.assert_close(output.loss, expected["mae_loss"][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.prediction, expected["mae_pred"], rtol=1e-5, atol=1e-5)
    assert torch.equal(output.mask, expected["mae_mask"])


def test_positions_are_those_of_the_published_files(shared_dir: Path) -> None:
    expected = load_file(shared_dir / "golden" / "checkpoints" / "mae_expected.safetensors")["pos_embed"]
    torch.testing.assert_close(sincos_position_table(32, 4, 4, 1), expected, rtol=0, atol=1e-6)


def test_positions_against_a_slow_loop() -> None:
    table = sincos_position_table(8, 2, 3, 1)
    assert table.shape == (1, 7, 8)
    assert (table[0, 0] == 0).all()
    for row in range(2):
        for column in range(3):
            slow = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                slow += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[0, 1 + row * 3 + column].tolist() == pytest.approx(slow, abs=1e-6)


def test_patchify_against_a_slow_loop() -> None:
    images = torch.randn(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    for b in range(2):
        for n in range(4):
            row, column = divmod(n, 2)
            slow = [
                images[b, c, row * 2 + y, column * 3 + x].item() for y in range(2) for x in range(3) for c in range(3)
            ]
            assert patches[b, n].tolist() == slow


def test_the_loss_is_the_error_of_normalised_pixels_on_masked_patches_only() -> None:
    torch.manual_seed(0)
    mae = MaskedAutoencoder(
        create_vit("vit_w32_d2_h2_p8", image_size=32), decoder_dim=16, decoder_depth=1, decoder_heads=2
    ).initialize()
    images = torch.randn(3, 3, 32, 32)
    output = mae(images, generator=torch.Generator().manual_seed(1))
    assert output.mask.sum(dim=1).tolist() == [12, 12, 12]  # 0.75 of 16 patches
    total, count = 0.0, 0
    for b in range(3):
        for n, patch in enumerate(patchify(images, (8, 8))[b]):
            if output.mask[b, n] == 1:
                target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
                total += (output.prediction[b, n] - target).square().mean().item()
                count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_hidden_patches_do_not_reach_the_encoder() -> None:
    mae = MaskedAutoencoder(
        create_vit("vit_w32_d2_h2_p8", image_size=32), decoder_dim=16, decoder_depth=1, decoder_heads=2
    ).initialize()
    images, noise = torch.randn(1, 3, 32, 32), torch.arange(16.0)[None]
    changed = images.clone()
    changed[..., 16:, :] = 7.0  # patches 8 to 15; only 0 to 3 are visible
    a, b = mae(images, noise=noise), mae(changed, noise=noise)
    assert torch.equal(a.prediction, b.prediction)
    assert a.loss != b.loss


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_other_prefix_tokens_train_too(options: dict[str, object]) -> None:
    encoder = create_vit("vit_w32_d2_h2_p8", image_size=32, **options)
    mae = MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2).initialize()
    output = mae(torch.randn(2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    assert output.prediction.shape == (2, 16, 192)
    without = [n for n, p in mae.named_parameters() if p.requires_grad and p.grad is None and "fc_norm" not in n]
    assert without == []


def test_decoder_width_must_fit_its_heads() -> None:
    with pytest.raises(InputError, match="not a multiple"):
        MaskedAutoencoder(create_vit("vit_w32_d1_h2_p8", image_size=32), decoder_dim=30, decoder_heads=4)
