from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.analysis.label_free import augmented_view, paired_views, scaled_view
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.models.backbone import Backbone


@pytest.fixture
def images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 24, 3)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels)
    return ImageSet(open_source(tmp_path / "set.npz"))


def pixels_of(images, seed=0, number=0, batch=4, indices=None):
    parts = list(augmented_view(seed, number).batches(images, 16, batch, indices))
    return torch.cat([part for part, _ in parts]), torch.cat([rows for _, rows in parts]).tolist()


def test_views_depend_on_seed_and_number_alone(images):
    first, rows = pixels_of(images)
    assert (first.shape, first.dtype, rows) == ((10, 3, 16, 16), torch.uint8, list(range(10)))
    assert torch.equal(first, pixels_of(images)[0])
    for other in (pixels_of(images, number=1), pixels_of(images, seed=1)):
        assert not torch.equal(first, other[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_any_number_of_channels(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, channels)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels)
    views, _ = pixels_of(ImageSet(open_source(tmp_path / "set.npz"), channels=channels))
    assert views.shape == (3, channels, 16, 16)


def test_an_unreadable_image_leaves_the_others_as_they_are(images):
    whole, _ = pixels_of(images)
    images.add_unreadable([(2, "x.png", "broken")])
    some, rows = pixels_of(images)
    assert rows == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert torch.equal(some, whole[rows])


def test_blur_grows_with_the_image():
    assert scaled_view(32).blur_sigma == (0.1, 1.0)
    assert scaled_view(224).blur_sigma == (0.1, 7.0)
    assert scaled_view(224).size == 224


def test_three_sets_of_features_in_one_row_order(images):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    found = paired_views(Backbone.wrap(vit), images, Run(), indices=np.array([7, 1, 4]))
    for part in (found.clean, found.first, found.second):
        assert set(part) == {False, True}
        assert part[True].indices.tolist() == [7, 1, 4]
        assert part[False][1, "mean"].shape == (3, 16)
    assert not torch.equal(found.first[False][1, "cls"], found.second[False][1, "cls"])
