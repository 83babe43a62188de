from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from mim_refiner.core import knn
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.search import Bank, nearest
from mim_refiner.errors import InputError


def clusters(train: int, test: int, dim: int = 12, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    x = centres[labels] + 1.5 * torch.randn(train + test, dim, generator=generator)
    return x[:train], labels[:train], x[train:]


@pytest.mark.parametrize("k", [1, 10, 20, 50])
@pytest.mark.parametrize("temperature", ["0.07", "1.0", "inf"])
@pytest.mark.parametrize("standardize", [False, True])
def test_golden_predictions(golden_dir: Path, standardize: bool, temperature: str, k: int) -> None:
    data = load_file(golden_dir / "knn" / "knn.safetensors")
    accuracies = json.loads((golden_dir / "knn" / "knn_accuracies.json").read_text())
    predicted = knn_predict(
        data["train_x"],
        data["train_y"],
        data["test_x"],
        k=k,
        temperature=float(temperature),
        standardize=standardize,
    )
    for in_place in (0, 1):
        key = f"bn{int(standardize)}_inplace{in_place}/k{k}_tau{temperature}"
        assert torch.equal(predicted, data[f"pred/{key}"])
        accuracy = float((predicted == data["test_y"]).float().mean())
        assert accuracy == pytest.approx(accuracies[key], abs=1e-7)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_scikit_learn(temperature: float) -> None:
    train_x, train_y, test_x = clusters(400, 150)
    mean, std = train_x.double().mean(0), train_x.double().std(0) + 1e-6
    oracle = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit((train_x.double() - mean) / std, train_y)
    expected = oracle.predict((test_x.double() - mean) / std)
    assert knn_predict(train_x, train_y, test_x, temperature=temperature).tolist() == expected.tolist()


@pytest.mark.parametrize("chunk_size", [1, 128, 256, 300, 600, 1000])
def test_chunk_size_never_changes_a_prediction(chunk_size: int) -> None:
    # every query is a palindrome and every train row has its mirror image in another class: equally near but for the
    # rounding, which depends on the order of summation and hence on the shape of the matrix product
    half, base = torch.randn(640, 12), torch.randn(40, 24)
    test_x = torch.cat([half, half.flip(1)], dim=1)
    train_x, train_y = torch.cat([base, base.flip(1)]), torch.arange(80)
    whole = knn_predict(train_x, train_y, test_x, k=1, standardize=False, chunk_size=10_000)
    chunked = knn_predict(train_x, train_y, test_x, k=1, standardize=False, chunk_size=chunk_size)
    assert torch.equal(chunked, whole)


def test_ties_go_to_the_smallest_class() -> None:
    train_x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 1.0]])
    train_y = torch.tensor([3, 1, 2, 0])
    test_x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for temperature in (0.07, math.inf):
        predicted = knn_predict(train_x, train_y, test_x, k=2, temperature=temperature, standardize=False)
        assert predicted.tolist() == [1, 0]


def test_weights_beat_the_majority_at_a_low_temperature() -> None:
    train_x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    train_y, test_x = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    near = knn_predict(train_x, train_y, test_x, k=3, temperature=1e-4, standardize=False)
    majority = knn_predict(train_x, train_y, test_x, k=3, temperature=math.inf, standardize=False)
    assert (near.tolist(), majority.tolist()) == ([1], [0])


def test_inputs_stay_untouched_and_no_test_rows_are_fine() -> None:
    train_x, train_y, test_x = clusters(50, 20)
    copies = train_x.clone(), test_x.clone()
    knn_predict(train_x, train_y, test_x)
    assert torch.equal(train_x, copies[0])
    assert torch.equal(test_x, copies[1])
    assert knn_predict(train_x, train_y, test_x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 51}, "k is 51, with 50 train images; set knn_k to 50"),
        (
            {"k": 2, "train_x": torch.zeros(1, 12), "train_y": torch.zeros(1, dtype=torch.long)},
            "k is 2, with 1 train image; set knn_k to 1$",
        ),
        ({"temperature": 0.0}, "temperature"),
        ({"train_y": torch.full((50,), -1)}, "class number"),
        ({"train_y": torch.zeros(49, dtype=torch.long)}, "class number"),
        ({"test_x": torch.zeros(3, 5)}, "features"),
    ],
)
def test_unusable_input_is_refused(change: dict, message: str) -> None:
    train_x, train_y, test_x = clusters(50, 20)
    arguments = {"train_x": train_x, "train_y": train_y, "test_x": test_x, **change}
    with pytest.raises(InputError, match=message):
        knn_predict(**arguments)


def slow_neighbors(train_x: Tensor, test_x: Tensor, k: int) -> Tensor:
    """The k nearest by cosine in float64, all at once, from the description."""
    train, test = train_x.double(), test_x.double()
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    cosines = (test / test.norm(dim=1, keepdim=True)) @ (train / train.norm(dim=1, keepdim=True)).T
    return cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("shape", [(9000, 300, 24, 10), (40_000, 60, 8, 3), (700, 40, 64, 100)])
def test_the_search_finds_exactly_the_nearest_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count, tests, dim, k = shape
    generator = torch.Generator().manual_seed(3)
    train_x = torch.randn(count, dim, generator=generator) * torch.linspace(0.1, 3, dim) + 5
    test_x = torch.randn(tests, dim, generator=generator) * torch.linspace(0.1, 3, dim) + 5
    found, cosines = nearest(Bank.of(train_x, True), test_x, k, dtype=dtype, chunk_size=256)
    expected = slow_neighbors(train_x, test_x, k)
    assert (found == expected).float().mean() > 0.999  # float32 cosines may swap two that differ in the 7th digit
    assert (cosines.diff(dim=1) <= 0).all()


def search_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "search_dtype", lambda _: dtype)


def test_search_in_8_bits_never_changes_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of nearly equal cosines: 8 bits alone would be wrong for most queries."""
    generator = torch.Generator().manual_seed(4)
    centre = torch.randn(32, generator=generator)
    train_x = centre + 0.01 * torch.randn(6000, 32, generator=generator)
    train_y = torch.randint(50, (6000,), generator=generator)
    test_x = centre + 0.01 * torch.randn(300, 32, generator=generator)
    arguments = {"k": 5, "standardize": False}
    found = []
    for dtype in (torch.float32, torch.int8):
        search_in(dtype, monkeypatch)
        found.append(knn_predict(train_x, train_y, test_x, **arguments))
    assert torch.equal(*found)


def test_collapsed_features_end_quickly_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    train_x, train_y = torch.ones(30_000, 16), torch.arange(30_000) % 3
    for dtype in (torch.float32, torch.int8):
        search_in(dtype, monkeypatch)
        predicted = knn_predict(train_x, train_y, torch.ones(40, 16))
        assert predicted.shape == (40,)
        assert len(predicted.unique()) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type(dtype: torch.dtype) -> None:
    train_x, train_y, test_x = (x.to(dtype) if x.is_floating_point() else x for x in clusters(400, 150))
    upcast = torch.float64 if dtype == torch.float64 else torch.float32
    expected = knn_predict(train_x.to(upcast), train_y, test_x.to(upcast))
    for chunk_size in (1, 300):
        assert torch.equal(knn_predict(train_x, train_y, test_x, chunk_size=chunk_size), expected)


def test_memory_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way is a tile, whatever the number of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result._is_view():
                self.elements = max(self.elements, result.numel())
            return result

    train_x, train_y = torch.randn(60_000, 8), torch.randint(4, (60_000,))
    test_x = torch.randn(1000, 8)
    search_in(torch.float32, monkeypatch)
    with Largest() as largest:
        knn_predict(train_x, train_y, test_x)
    assert largest.elements <= 256 * 16384 < 1000 * 60_000
