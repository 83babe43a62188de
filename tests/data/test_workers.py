from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mim_refiner.core.run import Run
from mim_refiner.data import workers
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec, crop_batch, draws
from mim_refiner.data.workers import own_cores, worker_count
from mim_refiner.evaluation.linear_probe import LinearProbeSettings
from mim_refiner.evaluation.protocols import augmented
from mim_refiner.evaluation.settings import EvaluationSettings


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("cores")
def test_the_processes_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (own_cores(), worker_count(-1, cached=False)) == (64, workers.MOST_WORKERS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (own_cores(), worker_count(-1, cached=False)) == (8, 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert (worker_count(-1, cached=False), worker_count(-1, cached=True)) == (1, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert own_cores() == 1
    assert worker_count(5, cached=True) == 5


@pytest.mark.parametrize("count", [0, 2])
def test_given_rows_keep_their_order_and_none_is_dropped(tmp_path: Path, count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (10, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    rows, spec = np.array([7, 2, 2, 9, 0]), ViewSpec("probe", 8)
    loader = TrainLoader(ImageSet(open_source(tmp_path / "images.npz")), [spec], 2, 5, count, rows=rows)
    assert loader.steps_per_epoch == 3
    for epoch in (0, 3):
        batches = list(loader.epoch(epoch))
        assert torch.cat([batch.sample_ids for batch in batches]).tolist() == rows.tolist()
        for start, batch in zip((0, 2, 4), batches, strict=True):
            chosen = [pixels[row] for row in rows[start : start + 2]]
            expected = crop_batch(chosen, spec, draws(5, epoch, 0, start, len(chosen)))
            assert torch.equal(batch.views[0], expected)
    loader.close()


def test_augmented_probes_see_the_crops_of_their_epoch_in_the_order_of_the_rows(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (10, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    images, rows = ImageSet(open_source(tmp_path / "images.npz")), np.array([4, 1, 8])
    job = SimpleNamespace(
        settings=EvaluationSettings(batch_size=2, linear=LinearProbeSettings(crop_scale=(0.2, 1.0))),
        train=SimpleNamespace(indices=torch.from_numpy(rows)),
        train_images=images,
        image_size=8,
        run=Run(seed=5),
        features_of=lambda of, chosen, *, transform, **_: list(transform.batches(of, 8, 2, chosen)),
    )
    spec = ViewSpec("probe", 8, scale=(0.2, 1.0), jitter_prob=0.0, gray_prob=0.0)
    of_epoch = augmented(job, [((2, "cls"),)])
    for epoch in (0, 1):
        for start, (batch, positions) in zip((0, 2), of_epoch(epoch), strict=True):
            assert positions.tolist() == rows[start : start + 2].tolist()
            chosen = [pixels[row] for row in rows[start : start + 2]]
            expected = crop_batch(chosen, spec, draws(5, epoch, 0, start, len(chosen)))
            assert torch.equal(batch, expected)
