"""Features against one plain forward pass an image, and everything that must not change on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.features import extract_features, resolve_blocks, resolve_poolings
from mim_refiner.reporting import Reporter


@pytest.mark.parametrize("norm", [False, True])
def test_features_equal_one_image_at_a_time(make_backbone, make_images, norm):
    backbone, images = make_backbone().eval(), make_images(10)
    features = extract_features(backbone, images, norm=norm, batch_size=4)
    assert features.keys == tuple((block, pooling) for block in range(3) for pooling in ("cls", "mean"))
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (backbone.info.mean, backbone.info.std))
    for row in range(10):
        pixels = (images.load(row).transpose(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            tokens = backbone.model._pos_embed(backbone.model.patch_embed(torch.from_numpy(pixels).float()[None]))
            for block in range(3):
                tokens = backbone.model.blocks[block](tokens)
                shown = backbone.model.norm(tokens) if norm else tokens
                torch.testing.assert_close(features[block, "cls"][row], shown[0, 0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(features[block, "mean"][row], shown[0, 1:].mean(0), rtol=1e-4, atol=1e-5)


class Told(Reporter):
    """Remembers what it was told."""

    def __init__(self, divisor=1):
        self.seen, self.divisor = [], divisor

    def phase(self, name, total):
        self.seen.append((name, total))

    def progress(self, step, values):
        self.seen.append(step // self.divisor)


def test_one_forward_for_all_blocks_and_poolings(make_backbone, make_images, monkeypatch):
    backbone, calls = make_backbone(), []
    forward = backbone.forward_blocks
    monkeypatch.setattr(backbone, "forward_blocks", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    told = Told()
    extract_features(backbone, make_images(10), batch_size=4, run=Run(reporter=told), phase="features")
    assert calls == [4, 4, 2]
    assert told.seen == [("features", 10), 4, 8, 10]
    extract_features(backbone, make_images(10), run=Run(reporter=told))
    assert len(told.seen) == 4  # nothing without a phase


@pytest.mark.parametrize("norm", [False, True])
def test_patches_of_the_last_block_are_left_out_where_nobody_reads_them(make_backbone, make_images, norm):
    backbone, images, tokens = make_backbone(), make_images(6), []
    backbone.model.blocks[2].mlp.register_forward_pre_hook(lambda module, given: tokens.append(given[0].shape[1]))
    whole = extract_features(backbone, images, norm=norm)
    alone = extract_features(backbone, images, blocks="2,0", poolings=["cls"], norm=norm)
    mixed = extract_features(backbone, images, blocks="2", norm=norm)
    assert tokens == [17, 1, 17]
    for features in (alone, mixed):
        for key in features.keys:
            torch.testing.assert_close(features[key], whole[key], rtol=1e-5, atol=1e-6)


def test_deterministic_in_eval_mode_and_every_mode_restored(make_backbone, make_images):
    backbone = make_backbone(drop_path_rate=0.5, proj_drop_rate=0.5)
    backbone.train()
    backbone.model.blocks[0].eval()  # a frozen prefix
    before = [module.training for module in backbone.modules()]
    first, second = (extract_features(backbone, make_images(12)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first.keys)
    assert [module.training for module in backbone.modules()] == before
    with pytest.raises(ZeroDivisionError):  # restored after an error as well
        extract_features(backbone, make_images(12), run=Run(reporter=Told(0)), phase="features")
    assert [module.training for module in backbone.modules()] == before


def test_features_are_ordinary_tensors(make_backbone, make_images):
    features = extract_features(make_backbone(), make_images(6))
    x = features[-1, "cls"]
    assert (x.dtype, x.requires_grad, x.is_inference()) == (torch.float32, False, False)
    nn.Linear(32, 2)(x).sum().backward()  # inference tensors would refuse
    assert not features.indices.is_inference()
    assert features.labels is not None
    assert not features.labels.is_inference()


def test_indices_choose_rows_in_their_order(make_backbone, make_images):
    backbone, images = make_backbone(), make_images(12)
    every, some = extract_features(backbone, images), extract_features(backbone, images, indices=[7, 2, 5])
    assert some.indices.tolist() == [7, 2, 5]
    assert some.labels.tolist() == [1, 2, 2]
    torch.testing.assert_close(some[2, "mean"], every[2, "mean"][[7, 2, 5]])
    picked = every.select(torch.tensor([7, 2, 5]))
    assert picked.labels.tolist() == some.labels.tolist()
    torch.testing.assert_close(picked[-1, "cls"], some[2, "cls"])


def test_an_unreadable_image_has_no_row_and_labels_stay_aligned(make_backbone, tmp_path):
    for number in range(12):
        folder = tmp_path / "set" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(folder / f"{number:02d}.png")
    (tmp_path / "set" / "class0" / "04.png").write_bytes(b"no image")
    images = ImageSet(open_source(tmp_path / "set"))
    features = extract_features(make_backbone(), images, batch_size=4)
    assert len(features) == 11
    assert features[0, "cls"].shape == (11, 32)
    assert features.labels.tolist() == images.labels[features.indices.numpy()].tolist() == [0] * 5 + [1] * 6


def test_bf16_is_close_and_float32(make_backbone, make_images):
    backbone, images = make_backbone(), make_images(6)
    exact, rough = (extract_features(backbone, images, run=Run(precision=name))[2, "mean"] for name in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=0.1, atol=0.1)


def test_non_finite_features_are_refused(make_backbone, make_images):
    backbone = make_backbone()
    backbone.model.blocks[1].mlp.fc1.weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match="block 1 hold NaN"):
        extract_features(backbone, make_images(6))


def test_an_encoder_without_class_token_offers_the_mean_only(make_backbone, make_images):
    backbone = make_backbone(class_token=False, global_pool="avg")
    assert {key[1] for key in extract_features(backbone, make_images(6)).keys} == {"mean"}
    with pytest.raises(InputError, match="no class token; use pooling mean"):
        extract_features(backbone, make_images(6), poolings=("cls", "mean"))


def test_resolve_blocks():
    assert resolve_blocks("all", 3) == (0, 1, 2)
    assert resolve_blocks("-1", 12) == (11,)
    assert resolve_blocks("8, 9,-4", 12) == (8, 9)
    assert resolve_blocks([-1, 0], 4) == (3, 0)
    for wrong in ("12", [-13], "first", [], "1,,2"):
        with pytest.raises(InputError, match="block"):
            resolve_blocks(wrong, 12)


def test_resolve_poolings(make_backbone):
    info = make_backbone().info
    assert resolve_poolings(None, info) == ("cls", "mean")
    assert resolve_poolings("mean", info) == ("mean",)
    with pytest.raises(InputError, match="'max' is unknown; use cls or mean"):
        resolve_poolings(["max"], info)
