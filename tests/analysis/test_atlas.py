"""Atlas: the right cell is found, and recommended only when that is more than the luck of the best of many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mim_refiner.analysis.atlas import Atlas, label_free_atlas, labelled_atlas, place_heads, recommend, ridge_probe
from mim_refiner.analysis.label_free import PairedViews
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.metrics import effective_rank
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import Features

DEPTH, CLASSES, DIM = 4, 5, 6
DEFAULT = (3, "cls", False)


def features(signal, seed, count, labels=True):
    """{norm: Features}; ``signal``: {(block, pooling, norm): how far the classes lie apart}, 1 where not named."""
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(np.arange(count) % CLASSES)
    centres = np.random.default_rng(9).normal(size=(CLASSES, DIM))
    found = {}
    for norm in (False, True):
        values = {}
        for block in range(DEPTH):
            for pooling in ("cls", "mean"):
                x = signal.get((block, pooling, norm), 0.3) * centres[y.numpy()] + rng.normal(size=(count, DIM))
                values[block, pooling] = torch.from_numpy(x).float()
        found[norm] = Features(values, y if labels else None, torch.arange(count), DEPTH)
    return found


def test_the_best_cell_is_recommended():
    signal = {(2, "mean", True): 2.0}
    atlas = labelled_atlas(features(signal, 0, 300), features(signal, 1, 200), default=DEFAULT)
    assert len(atlas.record["cells"]) == DEPTH * 3 * 2  # class, mean and both
    found = atlas.record["recommendation"]
    assert found["gain"]["ci95"][0] > 0
    assert (found["block"], found["norm"]) == (2, True)
    assert found["pooling"] in ("mean", "both")
    assert "is better than" in found["reason"]
    bank, queries = features(signal, 0, 300), features(signal, 1, 200)
    cell = next(c for c in atlas.record["cells"] if (c["block"], c["pooling"], c["norm"]) == (1, "both", False))
    x, q = (torch.cat([part[False][1, "cls"], part[False][1, "mean"]], 1) for part in (bank, queries))
    hits = knn_predict(x, bank[False].labels, q) == queries[False].labels
    assert cell["knn_top1"] == pytest.approx(hits.float().mean().item())
    assert cell["rank"] == pytest.approx(effective_rank(x), abs=1e-3)
    assert cell["dimensions"] == 2 * DIM


def test_the_usual_features_stay_when_nothing_is_clearly_better():
    atlas = labelled_atlas(features({}, 0, 200), features({}, 1, 150), default=DEFAULT, probe=False, both=False)
    found = atlas.record["recommendation"]
    assert (found["block"], found["pooling"], found["norm"]) == DEFAULT
    assert "not clearly better" in found["reason"] or "No other block" in found["reason"]
    assert {c["pooling"] for c in atlas.record["cells"]} == {"cls", "mean"}
    assert "probe_top1" not in atlas.record["cells"][0]


def test_a_best_cell_that_loses_on_the_held_out_halves_is_told_plainly():
    """Rows best on one half are the worst on the other; over all images the third is best."""
    order = np.random.default_rng(3).permutation(400)  # as the halves are drawn
    even, odd = np.zeros(400), np.zeros(400)
    even[order[::2]], odd[order[1::2]] = 1, 1
    scores = {(0, "cls", False): even, (1, "cls", False): odd, (2, "cls", False): (np.arange(400) % 5 < 3) * 1.0,
              (3, "cls", False): (np.arange(400) % 5 < 2) * 1.0}  # fmt: skip
    cells = [
        {"block": b, "pooling": p, "norm": n, "knn_top1": s.mean(), "rank": 1.0} for (b, p, n), s in scores.items()
    ]
    found = recommend("knn_top1", cells, scores, (3, "cls", False), 3)
    assert (found["best"]["block"], found["block"]) == (2, 3)
    assert found["gain"]["value"] == pytest.approx(-0.4)  # nothing right on the halves, against two in five
    assert found["reason"].startswith(
        "block 3, cls pooling, no norm. Over all images the best k-NN accuracy is that of block 2, cls pooling, no "
        "norm, but it is not clearly better: what is best on one half of them differs from the usual features on the "
        "other half by -40.0 points (95 %"
    )


def test_the_best_of_many_equal_cells_is_rarely_recommended():
    """Without cross-fitting the best of 60 equal cells beats the default in most trials."""
    wrong = naive = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = {(block, "cls", False): (rng.random(150) < 0.5).astype(float) for block in range(60)}
        cells = [
            {"block": b, "pooling": p, "norm": n, "knn_top1": s.mean(), "rank": 1.0} for (b, p, n), s in scores.items()
        ]
        found = recommend("knn_top1", cells, scores, (59, "cls", False), seed)
        wrong += found["block"] != 59
        naive += max(s.mean() for s in scores.values()) - scores[59, "cls", False].mean() > 1.96 * (0.5 / 150) ** 0.5
    assert wrong <= 4
    assert naive > 3 * max(1, wrong)


def noisy_views(noise, count=120):
    rng = np.random.default_rng(0)
    parts = [{}, {}, {}]
    for norm in (False, True):
        clean = {(b, p): rng.normal(size=(count, DIM)) for b in range(DEPTH) for p in ("cls", "mean")}
        for part, on in zip(parts, (0, 1, 1), strict=True):
            values = {
                key: torch.from_numpy(x + on * noise.get((*key, norm), 1.5) * rng.normal(size=x.shape)).float()
                for key, x in clean.items()
            }
            part[norm] = Features(values, None, torch.arange(count), DEPTH)
    return PairedViews(*parts)


def test_without_labels_the_most_consistent_cell_is_recommended():
    atlas = label_free_atlas(noisy_views({(1, "mean", False): 0.3}), default=DEFAULT, both=False)
    found = atlas.record["recommendation"]
    assert (found["block"], found["pooling"], found["norm"]) == (1, "mean", False)
    assert found["measure"] == "consistency"


def test_collapsed_cells_are_not_recommended_without_labels():
    views = noisy_views({})
    for part in (views.clean, views.first, views.second):
        part[False].values[2, "cls"][:] = views.clean[False][2, "cls"][:, :1] * torch.ones(
            DIM
        )  # one direction, no noise
    atlas = label_free_atlas(views, default=DEFAULT, both=False)
    assert atlas.scores[2, "cls", False].mean() == 1
    assert atlas.record["recommendation"]["block"] != 2


def test_labels_are_needed_for_k_nn():
    with pytest.raises(DataError, match="no labels"):
        labelled_atlas(features({}, 0, 50, labels=False), features({}, 1, 50), default=DEFAULT)


def test_ridge_probe_equals_the_closed_form():
    """One-hot targets of -1 and 1 with an intercept; the penalty of the least leave-one-out error by a loop."""
    parts = features({(0, "cls", False): 1.0}, 0, 60), features({(0, "cls", False): 1.0}, 1, 60)
    x, q = (part[False][0, "cls"].double().numpy() for part in parts)
    y, truth = (part[False].labels.numpy() for part in parts)
    mean, std = x.mean(0), x.std(0, ddof=1) + 1e-6
    x, q = (x - mean) / std, (q - mean) / std
    targets = np.where(y[:, None] == np.arange(CLASSES), 1.0, -1.0)

    def weights(rows, alpha):
        a, t = x[rows], targets[rows]
        centred = a - a.mean(0)
        w = np.linalg.solve(centred.T @ centred + alpha * np.eye(DIM), centred.T @ (t - t.mean(0)))
        return w, t.mean(0) - a.mean(0) @ w

    def left_out(alpha):
        total = 0.0
        for i in range(len(x)):
            w, b = weights([j for j in range(len(x)) if j != i], alpha)
            total += ((x[i] @ w + b - targets[i]) ** 2).sum()
        return total

    w, b = weights(np.arange(len(x)), min((10.0**p for p in range(-1, 6)), key=left_out))
    expected = float(((q @ w + b).argmax(1) == truth).mean())
    got = ridge_probe(
        *(torch.from_numpy(v) for v in (parts[0][False][0, "cls"].numpy(), y, parts[1][False][0, "cls"].numpy(), truth))
    )
    assert got == pytest.approx(expected)


def atlas_of(rates, count=600):
    rng = np.random.default_rng(0)
    draws = rng.random(count)
    scores = {(b, "cls", False): (draws < rate).astype(float) for b, rate in enumerate(rates)}
    return Atlas({"measure": "knn_top1", "samples": {"queries": count}}, scores)


@pytest.mark.parametrize(
    ("rates", "blocks", "best"),
    [
        ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, 0.5], [5, 6, 7], 5),  # from the peak to the last block
        ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.7], [5, 6, 7], 5),  # a plateau: from its start
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [6, 7], 7),  # still rising: the last quarter
        ([0.2, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2], [4, 5, 6, 7], 1),  # an early peak: the last half
    ],
)
def test_placement_rule(rates, blocks, best):
    found = place_heads(atlas_of(rates), pooling="cls", recipe_blocks=[6, 7])
    assert (found["blocks"], found["best_block"]) == (blocks, best)
    assert f"heads on blocks {blocks[0]} to 7" in found["reason"]
    assert "the recipe's choice: 6 to 7" in found["reason"]
    assert found["scores"] == pytest.approx([float(s.mean()) for s in atlas_of(rates).scores.values()])
