"""Patch features before and after: agreement without masks, k-NN segmentation with them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mim_refiner.commands.dense import dense_change, knn_segmentation, patch_agreement
from mim_refiner.core.metrics import mean_iou
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.models.backbone import Backbone, create_vit


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=32))


@pytest.fixture
def blind(encoder):
    """The same encoder, to which all images look alike but for noise of the 7th digit: its features tell the place."""
    torch.manual_seed(0)
    made = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=32))
    with torch.no_grad():
        made.model.patch_embed.proj.weight.mul_(1e-7)
    return made


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def masked(tmp_path):
    """Return a maker of images of 8 px squares in three colours with their masks; the first row is not labelled."""

    def make(count, seed):
        rng, rows = np.random.default_rng(seed), []
        colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])
        for _ in range(count):
            mask = rng.integers(0, 3, (4, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (colours[mask] + rng.integers(-25, 25, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            mask[:8] = 9
            rows.append({"image": png(image), "mask": png(mask)})
        table = pa.Table.from_pylist(rows)
        notes = {"class_names": json.dumps(["red", "green", "blue"]), "ignore_index": "9"}
        pq.write_table(table.replace_schema_metadata(notes), tmp_path / f"{seed}.parquet")
        return ImageSet(open_source(tmp_path / f"{seed}.parquet"))

    return make


@pytest.fixture
def plain(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "plain.npz", images=images)
    return ImageSet(open_source(tmp_path / "plain.npz"))


def test_agreement_is_paired_and_falls_with_the_patches(encoder, blind, plain):
    same = dense_change({"before": encoder, "after": encoder}, plain, None, Run())
    assert (same["measure"], same["verdict"]) == ("patch_agreement", "no clear change")
    assert same["before"] == same["after"] == patch_agreement(encoder, plain, Run()).mean()
    found = dense_change({"before": encoder, "after": blind, "full": encoder}, plain, None, Run())
    assert found["verdict"] == "worse"
    assert found["change"][0] == pytest.approx(found["after"] - found["before"])
    assert found["reason"].startswith("worse: ")
    assert f"{100 * found['after']:.1f} after" in found["reason"]


def test_with_masks_patches_get_the_class_of_their_nearest(encoder, blind, masked):
    bank, test = masked(16, 1), masked(6, 2)
    counts = knn_segmentation(encoder, bank, test, Run())
    assert counts.shape == (6, 3, 3)
    assert counts.sum() == 6 * 24 * 32  # pixels below the first row of squares
    assert mean_iou(counts.sum(0)) > 0.9
    found = dense_change({"before": encoder, "after": blind}, bank, test, Run())
    assert (found["measure"], found["verdict"]) == ("knn_miou", "worse")
    assert found["before"] == mean_iou(counts.sum(0))
