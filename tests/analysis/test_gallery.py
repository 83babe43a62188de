"""The gallery record against slow loops, and end to end on a tiny encoder."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mim_refiner.analysis.gallery import (
    GallerySettings,
    cluster_images,
    feature_maps,
    make_gallery,
    neighbor_lists,
)
from mim_refiner.core.metrics import standardized
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.data.thumbnails import thumbnail_sheet
from mim_refiner.errors import DataError
from mim_refiner.models.backbone import Backbone, create_vit


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    centres = 4 * rng.normal(size=(3, 16))
    return standardized(torch.from_numpy(centres[labels] + rng.normal(size=(36, 16)))).numpy(), labels


def test_neighbours_are_those_of_a_loop(features):
    x, labels = features
    found = neighbor_lists(x, labels, 4)
    hits = 0
    for i in range(len(x)):
        ranked = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(np.dot(x[i], x[j])))[:4]
        assert found["neighbors"][i] == ranked
        assert found["similarity"][i] == pytest.approx([float(x[i] @ x[j]) for j in ranked], abs=6e-4)
        hits += sum(labels[j] == labels[i] for j in ranked)
    assert found["same_label"] == pytest.approx(hits / (4 * len(x)))


def test_clusters_come_in_the_order_of_their_classes(features):
    x, labels = features
    found = cluster_images(x, labels, GallerySettings(examples=5), seed=0)
    assert found["confusion"]["counts"] == [[12, 0, 0], [0, 12, 0], [0, 0, 12]]
    assert [len(row) for row in found["examples"]] == [5, 5, 5]
    assert all(labels[row] == cluster for cluster, rows in enumerate(found["examples"]) for row in rows)
    alone = cluster_images(x, None, GallerySettings(clusters=3), seed=0)
    assert alone["confusion"] is None
    assert sum(alone["sizes"]) == 36


def test_maps_are_principal_components_and_alike(features):
    x, _ = features
    first = feature_maps(x, 0, umap=False)["pca"]
    centred = x - x.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    assert first["explained"] == pytest.approx((values[:2] / values.sum()).tolist())
    assert (first["points"] ** 2).sum(0) == pytest.approx(values[:2])
    again = feature_maps(x, 0, -first["points"], umap=False)["pca"]
    np.testing.assert_allclose(again["points"], -first["points"], atol=1e-12)


def test_umap_where_it_is_installed(features):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    assert feature_maps(features[0], 0)["umap"]["points"].shape == (36, 2)


def write_set(tmp_path, count=30, labelled=True):
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = {"labels": np.arange(count) % 3} if labelled else {}
    np.savez(tmp_path / "set.npz", images=images, **labels)
    return ImageSet(open_source(tmp_path / "set.npz"))


def encoder():
    return Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16), family="mae")


@pytest.mark.parametrize("labelled", [True, False])
def test_the_record_is_complete_and_json(tmp_path, labelled):
    images = write_set(tmp_path, labelled=labelled)
    models = {"before": encoder(), "after": encoder()}
    settings = GallerySettings(images=20, queries=5, neighbors=3, patch_images=2, umap=False)
    record = make_gallery(models, images, pooling="cls", settings=settings)
    assert record == make_gallery(models, images, pooling="cls", settings=settings)
    assert json.loads(json.dumps(record)) == record
    assert (record["block"], record["data"]["shown"]) == (2, 20)
    assert record["queries"] == [0, 4, 9, 14, 19]
    assert len(record["items"]["name"]) == 20
    for model in record["models"].values():
        assert [len(row) for row in model["neighbors"]] == [3] * 5
        assert len(model["maps"]["pca"]["points"]) == 20
        with Image.open(io.BytesIO(base64.b64decode(model["patches"]["png"][1]))) as picture:
            assert picture.size == (2, 2)
    assert (record["items"]["label"] is None) is not labelled
    with Image.open(io.BytesIO(base64.b64decode(record["thumbnails"]["jpeg"]))) as picture:
        assert picture.size == (5 * 32, 4 * 32)


def test_too_few_images(tmp_path):
    with pytest.raises(DataError, match="too few"):
        make_gallery({"before": encoder()}, write_set(tmp_path, count=2), pooling="cls")


def test_thumbnails_of_other_channels_and_sixteen_bits(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 2**16, (5, 32, 32, 4), dtype=np.uint16))
    images = ImageSet(open_source(str(tmp_path / "images.npy")), channels=4)
    sheet = thumbnail_sheet(images, [0, 2, 4])
    assert (sheet["tile"], sheet["columns"], sheet["count"]) == (32, 2, 3)
    assert Image.open(io.BytesIO(base64.b64decode(sheet["jpeg"]))).size == (64, 64)
