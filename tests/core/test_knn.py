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

from mim_refiner.core.knn import knn_predict
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


@pytest.mark.parametrize("chunk_size", [1, 7, 128, 200, 256, 1000])
def test_chunk_size_never_changes_a_prediction(chunk_size: int) -> None:
    # every query is a palindrome and every train row has its mirror image in another class: equally near but for the
    # rounding, which depends on the order of summation and hence on the shape of the matrix product
    half, base = torch.randn(320, 12), torch.randn(40, 24)
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
        ({"k": 51}, "between 1 and the 50 train samples"),
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
