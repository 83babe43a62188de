"""CKA against its definition in plain loops, and its invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mim_refiner.analysis.blocks import block_similarity, cka_matrix
from mim_refiner.errors import InputError
from mim_refiner.evaluation.features import Features


def linear_cka(x, y):
    return float(cka_matrix([x], [y])[0, 0])


def unbiased_hsic(x, y):
    """Song et al., JMLR 13 (2012), equation 5, term by term."""
    n = len(x)
    k = [[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    m = [[0.0 if i == j else float(y[i] @ y[j]) for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * sum(k[i][j] * m[j][q] for i in range(n) for j in range(n) for q in range(n))
    return (trace + sums - mixed) / (n * (n - 3))


def test_equals_the_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64) + 3
    y = x[:, :3] + torch.randn(12, 3, generator=generator, dtype=torch.float64)
    expected = unbiased_hsic(x, y) / math.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-5)


def test_rotation_scale_and_shift_change_nothing():
    x = torch.randn(60, 8)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)


def test_unrelated_features_are_not_alike_though_few_and_wide():
    values = [linear_cka(torch.randn(30, 200), torch.randn(30, 200)) for _ in range(20)]
    assert abs(np.mean(values)) < 0.03  # the biased estimator gives about 0.87 here


def test_bad_shapes_are_refused_and_constants_have_no_similarity():
    with pytest.raises(InputError, match="same images"):
        linear_cka(torch.randn(10, 2), torch.randn(11, 2))
    with pytest.raises(InputError, match="at least 4"):
        linear_cka(torch.randn(3, 2), torch.randn(3, 2))
    assert math.isnan(linear_cka(torch.randn(10, 2), torch.ones(10, 2)))


def test_blocks_of_two_models():
    blocks = [torch.randn(40, 6) for _ in range(3)]
    moved = [blocks[0], blocks[1] + 0.1 * torch.randn(40, 6), torch.randn(40, 6)]

    def features(values):
        return Features({(b, "cls"): v for b, v in enumerate(values)}, None, torch.arange(40), 3)

    record = block_similarity({"before": features(blocks), "after": features(moved)}, "cls")
    assert set(record["matrices"]) == {"before", "after", "before/after"}
    assert record["matrices"]["before/after"][1][1] == pytest.approx(linear_cka(blocks[1], moved[1]), abs=1e-6)
    change = record["change"]["after"]
    assert change[0] == pytest.approx(0, abs=1e-6)
    assert change[0] < change[1] < change[2]
    assert "least alike at block 2" in record["statements"][0]
    assert cka_matrix(blocks, blocks).diagonal().tolist() == pytest.approx([1, 1, 1])
