"""Test images that are training images: refused when all are, said when some are."""

from __future__ import annotations

import numpy as np
import pytest

from mim_refiner.data import duplicates
from mim_refiner.data.duplicates import check_overlap
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


@pytest.fixture
def arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)

    def make(name, rows):
        np.savez(tmp_path / name, images=images[list(rows)])
        return open_source(tmp_path / f"{name}.npz")

    return make


def test_the_same_images_are_refused_in_any_order(arrays):
    train = arrays("train", range(20))
    for rows in (range(20), range(19, -1, -1), [*range(20), *range(5)]):
        with pytest.raises(DataError, match=r"the test images are the training images .*; give other test images"):
            check_overlap(train, arrays("test", rows))


def test_some_common_images_are_counted(arrays):
    train, test = arrays("train", range(20)), arrays("part", (3, 4))
    assert check_overlap(train, test).count == 2
    test = arrays("test", [30, 19, 31, 7, 32])
    shared = check_overlap(train, test)
    assert (shared.count, shared.compared, shared.first) == (2, 5, "test.npz[1] is train.npz[19]")
    assert test.facts()["also_in_train"] == {"count": 2, "compared": 5, "first": shared.first}
    assert check_overlap(train, arrays("other", range(20, 30))).count == 0
    assert "also_in_train" not in arrays("other", range(20, 30)).facts()


def test_a_copy_of_a_large_set_is_found_in_a_sample(arrays, monkeypatch):
    monkeypatch.setattr(duplicates, "_TEST_LIMIT", 10)
    monkeypatch.setattr(duplicates, "_TRAIN_LIMIT", 20)
    assert check_overlap(arrays("train", range(40)), arrays("test", range(39, -1, -1))).count > 0


def test_damaged_images_are_passed_over(image_folder):
    root = image_folder(["a.png", "b.png", "c.png"])
    (root / "b.png").write_bytes(b"")
    (root / "c.png").unlink()
    (root / "c.png").symlink_to("nowhere")
    with pytest.raises(DataError, match="the test images are the training images"):
        check_overlap(open_source(root), open_source(root))
