"""The feature cache: found by content, never stale, bounded, and harmless when damaged or shared."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError
from mim_refiner.evaluation.cache import FeatureCache, data_identity, model_identity, parse_size
from mim_refiner.evaluation.features import ImageTransform, extract_features, feature_sets
from mim_refiner.files import cache_folder, cache_is_off


@pytest.fixture
def cache(tmp_path):
    return FeatureCache.open(tmp_path / "cache", "100MB")


@pytest.fixture
def forwards(monkeypatch):
    """Count the images that go through an encoder."""

    def count(backbone):
        calls = []
        forward = backbone.forward_blocks
        monkeypatch.setattr(backbone, "forward_blocks", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
        return calls

    return count


def test_a_hit_gives_the_same_features_without_a_forward_pass(make_backbone, make_images, cache, forwards):
    backbone, images = make_backbone(), make_images(10)
    calls = forwards(backbone)
    first = feature_sets(backbone, images, cache=cache)
    assert (calls, cache.hits, cache.misses) == ([10], 0, 12)  # 3 blocks, 2 poolings, 2 norms from one pass
    second = feature_sets(backbone, images, cache=cache)
    assert (calls, cache.hits, cache.misses) == ([10], 12, 12)
    for norm, features in first.items():
        assert torch.equal(features.labels, second[norm].labels)
        for key in features.keys:
            assert torch.equal(features[key], second[norm][key])
            plain = extract_features(backbone, images, norm=norm)[key]
            torch.testing.assert_close(features[key], plain)


def test_only_what_is_missing_is_computed(make_backbone, make_images, cache, forwards):
    backbone, images = make_backbone(), make_images(6)
    extract_features(backbone, images, blocks=[0, 1], poolings=["cls"], cache=cache)
    calls = forwards(backbone)
    features = extract_features(backbone, images, blocks=[1, 2], poolings=["cls", "mean"], cache=cache)
    assert (calls, cache.hits, cache.misses) == ([6], 1, 5)
    assert features.keys == ((1, "cls"), (1, "mean"), (2, "cls"), (2, "mean"))


def test_every_part_of_the_identity_counts(make_backbone, make_images, cache):
    backbone, images = make_backbone(), make_images(6)
    shifted = ImageTransform("shifted", lambda *a: ((batch // 2, rows) for batch, rows in eval_batches(*a[:3])))
    options = [
        {}, {"norm": True}, {"image_size": 48}, {"run": Run(precision="bf16")}, {"indices": [0, 1, 2]},
        {"transform": shifted},
    ]  # fmt: skip
    for number, changed in enumerate(options):
        extract_features(backbone, images, blocks=[2], poolings=["cls"], cache=cache, **changed)
        assert (cache.hits, cache.misses) == (0, number + 1)
    extract_features(make_backbone(1), images, blocks=[2], poolings=["cls"], cache=cache)
    extract_features(backbone, make_images(6, seed=1), blocks=[2], poolings=["cls"], cache=cache)
    assert (cache.hits, cache.misses) == (0, 8)
    extract_features(backbone, make_images(6), blocks=[2], poolings=["cls"], batch_size=2, cache=cache)
    assert (cache.hits, cache.misses) == (1, 8)


def test_the_number_of_heads_is_part_of_a_model(make_backbone):
    one, four = make_backbone(num_heads=1), make_backbone(num_heads=4)
    four.load_state_dict(one.state_dict())
    assert model_identity(one) != model_identity(four)
    assert model_identity(one) == model_identity(make_backbone(num_heads=1))


def test_data_is_known_by_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(5))
    np.savez(tmp_path / "b.npz", images=pixels)  # elsewhere, without labels: the same pixels
    changed = pixels.copy()
    changed[3, 2, 2, 1] ^= 1
    np.savez(tmp_path / "c.npz", images=changed, labels=np.arange(5))
    same, bare, other = (data_identity(ImageSet(open_source(tmp_path / f"{name}.npz"))) for name in "abc")
    assert same == bare != other
    streamed = data_identity(ImageSet(open_source(tmp_path / "a.npz"), cache=False))
    assert streamed == data_identity(ImageSet(open_source(tmp_path / "a.npz"), cache=False))
    assert streamed != data_identity(ImageSet(open_source(tmp_path / "c.npz"), cache=False))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage"])
def test_a_damaged_entry_is_a_miss_and_is_written_again(cache, damage):
    identity, tensors = {"what": damage}, {"features": torch.randn(20, 4)}
    cache.put(identity, tensors)
    path = cache.path_of(identity)
    whole = path.read_bytes()
    damaged = {"truncate": whole[:-7], "flip": whole[:-5] + bytes([whole[-5] ^ 8]) + whole[-4:], "empty": b""}
    path.write_bytes(damaged.get(damage, b"no tensors at all"))
    assert cache.get(identity) is None
    cache.put(identity, tensors)
    assert torch.equal(cache.get(identity)["features"], tensors["features"])
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = FeatureCache.open(tmp_path, 10_000)
    for number in range(3):
        cache.put({"n": number}, {"x": torch.zeros(700)})  # 2.8 kB each and a header
        os.utime(cache.path_of({"n": number}), (number, number))
    assert cache.get({"n": 0}) is not None  # now the most recent one
    cache.put({"n": 3}, {"x": torch.zeros(700)})
    assert [cache.get({"n": number}) is not None for number in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 10_000
    cache.put({"n": 4}, {"x": torch.zeros(5000)})
    assert "larger than the whole cache" in cache.summary()["problem"]
    assert cache.get({"n": 3}) is not None


def test_runs_that_share_a_folder_do_not_disturb_each_other(tmp_path):
    """Eight writers and readers of the same few entries in a cache that is too small for all of them."""
    wrong = []

    def work(seed):
        cache, rng = FeatureCache.open(tmp_path, 40_000), np.random.default_rng(seed)
        for number in rng.integers(0, 12, 60).tolist():
            found = cache.get({"n": number})
            if found is not None and not torch.equal(found["x"], torch.full((1500,), float(number))):
                wrong.append(number)
            cache.put({"n": number}, {"x": torch.full((1500,), float(number))})
            if cache.problem:
                wrong.append(cache.problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert list(tmp_path.glob("??/.*")) == []  # nothing half-written stays


def test_a_folder_that_cannot_be_written_costs_only_the_cache(make_backbone, make_images, tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache.open(tmp_path / "file", "1MB")
    extract_features(make_backbone(), make_images(6), blocks=[2], cache=cache)
    assert "cannot write" in cache.summary()["problem"]


def test_where_and_how_large(tmp_path, monkeypatch):
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path / "chosen"))
    monkeypatch.setenv("MIM_REFINER_CACHE_SIZE", "2 MB")
    assert FeatureCache.open() == FeatureCache(tmp_path / "chosen", 2_000_000)
    assert FeatureCache.open(tmp_path, "1GB") == FeatureCache(tmp_path, 10**9)
    assert FeatureCache.open("off") is FeatureCache.open(tmp_path, 0) is None
    monkeypatch.setenv("MIM_REFINER_CACHE", "off")
    assert FeatureCache.open() is None
    monkeypatch.delenv("MIM_REFINER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FeatureCache.open().folder == tmp_path / "mim-refiner" / "features"
    assert (parse_size("1.5kb"), parse_size(12), parse_size("3 TB")) == (1500, 12, 3 * 10**12)
    for text in ("much", "10,000MB", "1,5GB", "5GB junk", "5bit", "-1"):
        with pytest.raises(InputError, match="like 5GB"):
            parse_size(text)


@pytest.mark.parametrize("word", ["off", " OFF", "none", "0", "False", "no"])
def test_a_cache_that_is_off_is_no_folder(word, monkeypatch, tmp_path):
    """Neither for features nor for downloads, which go to the user's own folder, as without the variable."""
    monkeypatch.setenv("MIM_REFINER_CACHE", word)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert FeatureCache.open() is None
    assert cache_folder() == tmp_path / "user" / "mim-refiner"
    assert cache_is_off()
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert not cache_is_off()
    monkeypatch.setenv("MIM_REFINER_CACHE", "  ")
    assert FeatureCache.open().folder == cache_folder() / "features" == tmp_path / "user" / "mim-refiner" / "features"
