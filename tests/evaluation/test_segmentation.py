"""The segmentation probe: windows, targets, training against autograd, and scores against scikit-learn."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn

from mim_refiner.core.metrics import class_iou, mean_iou
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.masks import MaskSet, has_masks
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.segmentation import (
    DenseProbe,
    SegmentationSettings,
    Windows,
    confusion,
    patch_targets,
    segmentation_blocks,
    segmentation_protocol,
    window_places,
)
from mim_refiner.training.traces import LiveBytes


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_masked(tmp_path):
    """Return a maker of parquet files: blocks of 8 px in three colours, the mask says which; a border is ignored."""

    def make(name, count, seed, *, side=(48, 64)):
        rng = np.random.default_rng(seed)
        colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]])
        rows = []
        for _ in range(count):
            mask = rng.integers(0, 3, (side[0] // 8, side[1] // 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            image = (colours[mask] + rng.integers(-25, 25, (*side, 3))).clip(0, 255).astype(np.uint8)
            mask[:2] = 9
            rows.append({"image": png(image), "mask": png(mask)})
        table = pa.Table.from_pylist(rows)
        notes = {"class_names": json.dumps(["red", "green", "blue"]), "ignore_index": "9"}
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table.replace_schema_metadata(notes), path)
        return path

    return make


def test_windows_cover_every_pixel():
    for height, width, window, stride in [(180, 240, 96, 64), (32, 32, 32, 21), (50, 33, 32, 32), (97, 96, 96, 64)]:
        seen = np.zeros((height, width), int)
        places = window_places(height, width, window, stride)
        for top, left in places:
            assert 0 <= top <= height - window
            assert 0 <= left <= width - window
            seen[top : top + window, left : left + window] += 1
        assert seen.min() >= 1
        assert len(set(places)) == len(places)


def test_patch_targets_count_labelled_pixels():
    mask = np.random.default_rng(0).integers(0, 5, (16, 24)).astype(np.uint8)
    counts = patch_targets(mask, (8, 8), 4, ignore=2)
    for number in range(6):
        tile = mask[8 * (number // 3) :, 8 * (number % 3) :][:8, :8]
        assert counts[number].tolist() == [int((tile == c).sum()) if c != 2 else 0 for c in range(4)]


def test_the_probe_trains_as_the_same_network_under_autograd():
    """Windows of 2 x 2 patches of 2 px; the reference repeats the logits over the patch's pixels."""
    settings = SegmentationSettings(epochs=3, batch_size=6)
    torch.manual_seed(1)
    tokens = torch.randn(12, 4, 5).half()
    masks = torch.randint(0, 4, (12, 4, 4))  # class 3 is ignored
    targets = torch.stack([patch_targets(mask.numpy().astype(np.uint8), (2, 2), 3, ignore=3) for mask in masks])
    probe = DenseProbe(5, 3, settings, Run())
    model = nn.Sequential(nn.BatchNorm2d(5, affine=False, eps=1e-6), nn.Conv2d(5, 3, 1)).double()
    model[1].weight.data, model[1].bias.data = probe.weight.T[..., None, None].double(), torch.zeros(3).double()
    held = Windows.__new__(Windows)
    held.held, held.places, held.run = (tokens, targets), tokens, Run()
    probe.fit(held)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    total, warmup, peak = 6, 1, 0.1 * 6 / 256
    for step in range(total):
        if step % 2 == 0:
            order = torch.randperm(12, generator=generator)
        rows = order[step % 2 * 6 :][:6]
        cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
        optimizer.param_groups[0]["lr"] = peak / 2 if step < warmup else 1e-6 + (peak - 1e-6) * cosine
        images = tokens[rows].double().transpose(1, 2).unflatten(2, (2, 2))
        logits = F.interpolate(model(images), size=(4, 4), mode="nearest")
        optimizer.zero_grad()
        F.cross_entropy(logits, masks[rows], ignore_index=3).backward()
        optimizer.step()
    torch.testing.assert_close(probe.weight.T.double(), model[1].weight.data[..., 0, 0], rtol=1e-3, atol=1e-5)
    expected = model.eval()(tokens.double().transpose(1, 2).unflatten(2, (2, 2))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(probe.logits(tokens).double(), expected, rtol=1e-3, atol=1e-4)


def test_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, (20, 30)).astype(np.uint8), rng.integers(0, 4, (20, 30))
    counts = confusion(truth, predicted, 4, ignore=4)
    labelled = truth != 4
    assert (counts == confusion_matrix(truth[labelled], predicted[labelled], labels=range(4))).all()
    expected = jaccard_score(truth[labelled], predicted[labelled], average=None, labels=range(4))
    np.testing.assert_allclose(class_iou(counts), expected)
    assert mean_iou(counts) == pytest.approx(expected.mean())
    absent = np.pad(counts, ((0, 1), (0, 1)))  # a class that never occurs is left out
    assert mean_iou(absent) == pytest.approx(expected.mean())


def test_end_to_end_and_cached(make_backbone, make_masked, tmp_path):
    backbone = make_backbone()
    train, test = (ImageSet(open_source(make_masked(name, n, n))) for name, n in (("train", 10), ("test", 4)))
    cache = FeatureCache.open(tmp_path / "cache", "1GB")
    settings = SegmentationSettings(epochs=60, batch_size=8, lr=2.0)
    assert segmentation_blocks(3, settings) == (2,)
    found = segmentation_protocol(backbone, train, test, settings, cache=cache)
    assert mean_iou(found.sum(0)) > 0.5  # colours show through a random encoder; chance is about 0.2
    assert found.shape == (4, 3, 3)
    assert found.sum() == 4 * 46 * 64  # without the ignored border
    assert (cache.hits, cache.misses) == (0, 2)
    again = segmentation_protocol(backbone, train, test, settings, cache=cache)
    assert (cache.hits, cache.misses) == (2, 2)
    assert (again == found).all()


def test_tokens_that_do_not_fit_are_computed_by_batch_to_the_same_effect(make_backbone, make_masked):
    """Images of several sizes, more windows in one than a batch holds."""
    backbone = make_backbone()
    sides = {"a": ((48, 64), 5), "b": ((96, 136), 10), "c": ((32, 32), 1)}
    paths = [make_masked(name, count, count, side=side) for name, (side, count) in sides.items()]
    train = ",".join(map(str, paths))
    settings = SegmentationSettings(epochs=1, batch_size=8, lr=2.0, window=16)
    peaks, scores = [], []
    for memory_gb in (1.0, 1e-6):
        chosen = settings.model_copy(update={"memory_gb": memory_gb})
        images = [ImageSet(open_source(train), cache=False), ImageSet(open_source(paths[0]), cache=False)]
        with LiveBytes() as live:
            scores.append(segmentation_protocol(backbone, *images, chosen, batch_size=8))
        peaks.append(live.peak)
    assert (scores[0] == scores[1]).all()
    held = sum(len(window_places(*side, 16, 11)) * count for side, count in sides.values()) * 4 * (32 + 3) * 2
    assert peaks[0] > held > 1.5 * peaks[1]


def test_an_image_that_cannot_be_read_has_no_windows(make_backbone, make_masked, tmp_path):
    table = pq.read_table(make_masked("a", 12, 5))
    rows = table.to_pylist()
    rows[4]["image"] = rows[4]["image"][:200]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata), tmp_path / "d.parquet")
    scores = [
        segmentation_protocol(
            make_backbone(),
            *(ImageSet(open_source(tmp_path / "d.parquet"), cache=False) for _ in range(2)),
            SegmentationSettings(epochs=2, memory_gb=memory_gb),
        )
        for memory_gb in (1.0, 1e-6)
    ]
    assert scores[0].shape == scores[1].shape == (11, 3, 3)


def test_blocks_of_deeper_encoders():
    assert segmentation_blocks(12, SegmentationSettings()) == (3, 7, 11)
    assert segmentation_blocks(24, SegmentationSettings()) == (11, 15, 19, 23)


def test_masks_in_folders_slices_and_joined_sources(tmp_path, make_masked):
    for number in range(3):
        for folder, suffix in (("images", "jpg"), ("masks", "png")):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8) if folder == "masks" else (8, 8, 3), number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / folder / f"{number}.{suffix}")
    source = open_source(tmp_path / "set" / "images")
    masks = MaskSet(source)
    assert [int(masks.load(index)[0, 0]) for index in range(3)] == [0, 1, 2]
    assert (masks.class_numbers().tolist(), masks.ignore_index) == ([0, 1, 2], 255)
    path = make_masked("a", 3, 0)
    whole = MaskSet(open_source(path))
    sliced = MaskSet(open_source(f"{path}[1:]"))
    joined = MaskSet(open_source(f"{path},{make_masked('b', 2, 1)}"))
    assert (whole.ignore_index, whole.class_names) == (9, ("red", "green", "blue"))
    assert (sliced.load(0) == whole.load(1)).all()
    assert (joined.load(2) == whole.load(2)).all()
    assert len(joined) == 5


def write_masked(root, numbers):
    """Six images of two halves; the halves' class numbers are ``numbers``."""
    rng = np.random.default_rng(0)
    for number in range(6):
        picture = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        picture[:, 8:] += 120
        mask = np.full((16, 16), numbers[0], np.uint8)
        mask[:, 8:] = numbers[1]
        for folder, pixels in (("images", picture), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return ImageSet(open_source(root / "images"))


def test_class_numbers_are_those_that_occur(tmp_path, make_backbone):
    settings = SegmentationSettings(epochs=2)
    scores = [
        segmentation_protocol(make_backbone(), images, images, settings)
        for images in (write_masked(tmp_path / str(n), numbers) for n, numbers in enumerate([(0, 1), (7, 200)]))
    ]
    assert scores[0].shape == (6, 2, 2)
    assert (scores[0] == scores[1]).all()


def test_a_class_of_the_test_masks_alone_is_said_and_missed(tmp_path, make_backbone, caplog):
    train, test = (write_masked(tmp_path / name, numbers) for name, numbers in (("train", (0, 1)), ("test", (0, 5))))
    with caplog.at_level("WARNING", logger="mim_refiner"):
        score = segmentation_protocol(make_backbone(), train, test, SegmentationSettings(epochs=2))
    assert "its masks hold class 5, which no training mask holds: counted as missed" in caplog.text
    assert score.shape == (6, 3, 3)
    assert score[:, 2].sum() == 6 * 16 * 8  # by the order: the known ones first


def test_what_has_no_masks_is_refused(tmp_path, make_images, make_backbone, make_masked):
    images = make_images(6)
    assert not has_masks(images.source)
    with pytest.raises(DataError, match="has no masks"):
        segmentation_protocol(make_backbone(), images, images)
    pq.write_table(pa.table({"image": [png(np.zeros((8, 8, 3), np.uint8))]}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="no column 'mask'"):
        MaskSet(open_source(tmp_path / "bare.parquet"))
    masked = ImageSet(open_source(make_masked("c", 2, 0)))
    with pytest.raises(InputError, match="multiple of the patch size"):
        segmentation_protocol(make_backbone(), masked, masked, SegmentationSettings(window=30))
