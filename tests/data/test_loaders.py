from __future__ import annotations

import os
import signal
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from mim_refiner.data import loaders
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader, eval_batches, resize_center_crop
from mim_refiner.data.photometric import normalize
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec, multi_crop_views
from mim_refiner.data.workers import watched
from mim_refiner.errors import DataError, InputError, WorkerError
from mim_refiner.types import default_crop_ratio

VIEWS = multi_crop_views(8, 4, 2)


def equal(left, right):
    return (
        torch.equal(left.sample_ids, right.sample_ids)
        and torch.equal(left.labels, right.labels)
        and all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))
    )


def test_shapes_order_and_labels(array_set):
    loader = TrainLoader(array_set(), VIEWS, 6, seed=0)
    assert loader.steps_per_epoch == 3
    batches = list(loader.epoch(0))
    assert len(batches) == 3
    for batch in batches:
        assert [tuple(view.shape) for view in batch.views] == [(6, 3, 8, 8)] * 2 + [(6, 3, 4, 4)] * 2
        assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in batch.views)
        assert batch.sample_ids.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, batch.sample_ids % 3)
        assert batch.skipped == []
        assert not torch.equal(batch.views[0], batch.views[1])
        assert not torch.equal(batch.views[2], batch.views[3])
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert len(set(ids)) == 18
    assert ids != sorted(ids)


def test_view_shows_its_own_image(array_set):
    images = array_set(height=8, width=8)
    whole = [ViewSpec("v", 8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)]
    for batch in TrainLoader(images, whole, 5, seed=0).epoch(0):
        for view, sample in zip(batch.views[0], batch.sample_ids.tolist(), strict=True):
            np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), images.load(sample))


def test_unlabelled_images_give_no_labels(image_folder):
    images = ImageSet(open_source(image_folder(["a.png", "b.png"])))
    (batch,) = TrainLoader(images, [ViewSpec("mae", 8)], 2, seed=0).epoch(0)
    assert batch.labels is None


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(array_set, workers):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    reference = TrainLoader(array_set(), VIEWS, 4, seed=3)
    loader = TrainLoader(array_set(cache=False), VIEWS, 4, seed=3, workers=workers)
    for epoch, start in ((0, 0), (1, 3), (0, 2)):
        pairs = list(zip(reference.epoch(epoch, start), loader.epoch(epoch, start), strict=True))
        assert len(pairs) == 5 - start
        assert all(equal(left, right) for left, right in pairs)
    assert torch.equal(torch.get_rng_state(), state)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


def test_middle_of_an_epoch_and_abandoned_epochs(array_set):
    loader = TrainLoader(array_set(), VIEWS, 4, seed=3)
    whole = list(loader.epoch(2))
    assert all(equal(a, b) for a, b in zip(whole[3:], loader.epoch(2, start_step=3), strict=True))
    before = threading.active_count()
    for batch in loader.epoch(2):
        assert equal(batch, whole[0])
        break
    again = loader.epoch(2)
    next(again)
    again.close()
    assert threading.active_count() == before
    assert list(loader.epoch(2, start_step=5)) == []


def test_seed_and_epoch_change_the_batches(array_set):
    base = next(TrainLoader(array_set(), VIEWS, 4, seed=0).epoch(0))
    assert equal(base, next(TrainLoader(array_set(), VIEWS, 4, seed=0).epoch(0)))
    assert not equal(base, next(TrainLoader(array_set(), VIEWS, 4, seed=1).epoch(0)))
    assert not equal(base, next(TrainLoader(array_set(), VIEWS, 4, seed=0).epoch(1)))


def test_ranks_share_the_batch(array_set):
    whole = next(TrainLoader(array_set(), VIEWS, 8, seed=0).epoch(1))
    parts = [next(TrainLoader(array_set(), VIEWS, 8, seed=0, rank=r, world_size=2).epoch(1)) for r in range(2)]
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), whole.sample_ids)
    for view, expected in enumerate(whole.views):
        assert torch.equal(torch.cat([part.views[view] for part in parts]), expected)


def test_batch_larger_than_the_set(array_set):
    with pytest.raises(DataError, match=r"batch size 21 is larger than the data set of 20 images.*20 or less"):
        TrainLoader(array_set(), VIEWS, 21, seed=0)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"workers": -1}, {"views": []}, {"batch_size": 5, "world_size": 2}]
)
def test_unusable_sizes(array_set, arguments):
    with pytest.raises(InputError):
        TrainLoader(array_set(), **{"views": VIEWS, "batch_size": 4, "seed": 0, **arguments})


def damage(root, count):
    for path in sorted(root.glob("*.png"))[:count]:
        path.write_bytes(b"damaged")
    return open_source(root)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [True, False])
def test_damaged_images_are_replaced_and_reported_once(image_folder, workers, cache):
    source = damage(image_folder([f"{i:02d}.png" for i in range(20)]), 2)
    images = ImageSet(source, cache=cache)
    loader = TrainLoader(images, [ViewSpec("mae", 8)], 5, seed=0, workers=workers)
    batches = list(loader.epoch(0)) + list(loader.epoch(1))
    loader.close()
    skipped = [item for batch in batches for item in batch.skipped]
    assert sorted(name for name, _ in skipped) == ["00.png", "01.png"]
    assert [index for index, *_ in images.unreadable] == [0, 1]
    shown = torch.cat([batch.sample_ids for batch in batches[:4]])
    assert sorted(shown.tolist()) == [2, 2, 2, *range(3, 20)]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_stop_the_epoch(image_folder, workers):
    source = damage(image_folder([f"{i:02d}.png" for i in range(20)]), 3)
    with pytest.raises(DataError, match="3 of 20 images cannot be read") as caught:
        list(TrainLoader(ImageSet(source, cache=True), [ViewSpec("mae", 8)], 5, seed=0, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_on_the_way_is_one_line(image_folder, workers):
    names = [f"{i:03d}.png" for i in range(100)]
    images = ImageSet(open_source(root := image_folder(names)), cache=False)
    damage(root, 30)
    with pytest.raises(DataError, match="images cannot be read, more than 10 %") as caught:
        list(TrainLoader(images, [ViewSpec("mae", 8)], 5, seed=0, workers=workers).epoch(0))
    assert "\n" not in str(caught.value)


# evaluation


def test_eval_batches_in_order(array_set):
    images = array_set(count=7, height=8, width=8)
    batches = list(eval_batches(images, 8, 3))
    assert [len(part) for part, _ in batches] == [3, 3, 1]
    assert torch.cat([index for _, index in batches]).tolist() == list(range(7))
    pixels = torch.cat([part for part, _ in batches])
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), images.array)
    ((part, index),) = eval_batches(images, 8, 10, indices=torch.tensor([5, 1]))
    assert index.tolist() == [5, 1]
    np.testing.assert_array_equal(part[1].permute(1, 2, 0).numpy(), images.load(1))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), WorkerError),
        (ConnectionResetError(104, "Connection reset by peer"), WorkerError),  # killed while its batch is fetched
        (ConnectionRefusedError(111, "Connection refused"), WorkerError),
        (EOFError(), WorkerError),
        (ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0."), ConnectionResetError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_a_process_that_died_is_told_from_an_error_in_it(error, told):
    def batches():
        yield 1
        raise error

    got = watched(batches())
    assert next(got) == 1
    with pytest.raises(told) as caught:
        next(got)
    assert type(caught.value) is told


def test_eval_batches_are_stacked_in_the_background(array_set, monkeypatch):
    """While an encoder works on the one before; 256 images of 224 px take some 0.1 s."""
    names = []
    monkeypatch.setattr(
        loaders, "common_type", lambda images: names.append(threading.current_thread().name) or list(images)
    )
    assert len(list(eval_batches(array_set(count=7, height=8, width=8), 8, 3))) == 3
    assert len(names) == 3
    assert all(name.startswith("mim-refiner-loader") for name in names)


@pytest.mark.parametrize("cache", [True, False])
def test_eval_leaves_unreadable_images_out(image_folder, cache):
    source = damage(image_folder([f"{i:02d}.png" for i in range(20)]), 2)
    indices = torch.cat([index for _, index in eval_batches(ImageSet(source, cache=cache), 8, 6)])
    assert indices.tolist() == list(range(2, 20))


@pytest.mark.parametrize(("height", "width"), [(40, 53), (53, 40), (37, 37), (20, 90)])
@pytest.mark.parametrize("ratio", [1.0, 0.875])
def test_resize_center_crop_equals_torchvision(pixels, height, width, ratio):
    image = Image.fromarray(pixels(1, height, width))
    resized = tv.resize(image, [round(28 / ratio)], interpolation=tv.InterpolationMode.BICUBIC)
    expected = np.asarray(tv.center_crop(resized, [28, 28]))
    np.testing.assert_array_equal(resize_center_crop(np.asarray(image), 28, ratio), expected)


@pytest.mark.parametrize("shape", [(7, 90, 3), (90, 7, 3), (1, 500, 3), (60, 999, 3), (2, 3000, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_view_of_an_elongated_image_is_that_of_the_whole(monkeypatch, shape, dtype):
    smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) * 40 % 250
    image = (np.stack([smooth] * shape[2], axis=2) * (257 if dtype == np.uint16 else 1)).astype(dtype)
    for size, ratio in ((32, 1.0), (28, 0.875)):
        view = resize_center_crop(image, size, ratio)
        monkeypatch.setattr(loaders, "_ELONGATED", 10**9)
        whole = resize_center_crop(image, size, ratio)
        monkeypatch.undo()
        assert view.shape == whole.shape == (size, size, shape[2])
        assert np.abs(view.astype(int) - whole).max() <= (2 if dtype == np.uint8 else 300)


@pytest.mark.parametrize("shape", [(1, 20_000_000, 3), (20_000_000, 1, 3), (1, 30_000_000, 1)])
def test_an_elongated_image_costs_no_more_than_its_view(shape):
    image = np.zeros(shape, np.uint8)
    tracemalloc.start()
    view = resize_center_crop(image, 224, 0.875)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert view.shape == (224, 224, shape[2])
    assert peak < 2**20


def test_default_crop_ratio():
    assert [default_crop_ratio(size) for size in (32, 64, 65, 224)] == [1.0, 1.0, 0.875, 0.875]


def test_bad_eval_arguments(array_set):
    for arguments in ((0, 4), (8, 0)):
        with pytest.raises(InputError):
            list(eval_batches(array_set(), *arguments))


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = tv.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(normalize(images, mean, std), expected)
    with pytest.raises(InputError, match="3 channels, 1 mean and 1 standard deviation"):
        normalize(images, (0.5,), (0.5,))


def test_batches_of_the_loader_thread_are_page_locked_too(array_set, monkeypatch):
    locked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor)
    for pinned in (True, False):
        loader = TrainLoader(array_set(), VIEWS, 6, seed=0, pin_memory=pinned)
        shown = [tensor for batch in loader.epoch(0) for tensor in (*batch.views, batch.sample_ids, batch.labels)]
        assert len(locked) == (len(shown) if pinned else 0)
        locked.clear()


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no such signal here")
def test_the_news_of_a_dead_process_that_come_late_interrupt_nothing():
    """Its connection breaks first, its signal comes when torch's handler might be back, which raises."""
    told = threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGCHLD)))

    class Dead:
        _workers = (SimpleNamespace(kill=lambda: None, join=told.join),)

        def __iter__(self):
            return self

        def __next__(self):
            told.start()
            raise EOFError

    def raising(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    theirs = signal.signal(signal.SIGCHLD, raising)
    try:
        with pytest.raises(WorkerError, match="was killed"):
            next(watched(Dead()))
        time.sleep(0.4)
        assert signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, theirs)
