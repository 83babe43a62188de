"""Online k-NN in the head warm-up: features once, and what the last head makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mim_refiner.commands import monitor
from mim_refiner.commands.monitor import OnlineKnn
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.reporting import Reporter


class Heard(Reporter):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


@pytest.mark.parametrize("block", [1, 2])
def test_features_of_a_frozen_encoder_are_computed_once_and_read_by_the_last_head(
    tiny_run, monkeypatch, tmp_path, block
):
    made, passes = tiny_run(), []
    refiner, images = made.refiner, made.loader.images
    features = monitor.feature_sets
    monkeypatch.setattr(monitor, "feature_sets", lambda *given, **how: passes.append(how) or features(*given, **how))
    head = refiner.head(refiner.blocks[-1])
    monkeypatch.setattr(refiner, "head", lambda _: head)
    heard = Heard()
    knn = OnlineKnn(refiner.backbone, images, blocks=[0, block], pooling="mean", run=Run(reporter=heard),
                    refiner=refiner, draws=49_664)  # fmt: skip
    knn.warmed_up(tmp_path)
    assert heard.lines == []  # nothing was measured
    refiner.freeze_encoder()
    first = knn()
    with torch.no_grad():
        for parameter in head.projector.parameters():
            parameter.mul_(-1).add_(0.1 * torch.randn_like(parameter))
    second = knn()
    assert head.projector.training
    assert len(passes) == 2  # bank and test images, once
    assert [{**each, "knn_heads": 0} for each in (first, second)] == 2 * [{**first, "knn_heads": 0}]
    # by hand
    info, parts = refiner.backbone.info, []
    head.projector.eval()
    for rows in (knn.bank, knn.test):
        [(pixels, order)] = eval_batches(images, info.image_size, len(rows), indices=rows)
        assert np.array_equal(order, rows)
        with torch.no_grad():
            inputs = normalize(pixels, info.mean, info.std)
            [output] = refiner.backbone.eval().forward_blocks(inputs, [block], norm=block == info.depth - 1)
            parts.append((head.projector(output.pooled("mean")), torch.from_numpy(images.labels[rows])))
    (bank, labels), (test, truth) = parts
    expected = knn_predict(bank, labels, test, k=min(10, len(labels))).eq(truth).float().mean().item()
    assert second["knn_heads"] == pytest.approx(expected)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"total_step": 1} | second) + "\n")
    knn.warmed_up(tmp_path)
    [told] = heard.lines
    assert told.startswith("forecast: +")
    assert f"k-NN accuracy is {100 * second['knn_heads']:.1f} %, its block's {100 * second['knn_top1']:.1f} %" in told
    refiner.unfreeze_encoder()
    assert "knn_heads" not in knn()
    knn()
    assert len(passes) == 6
    assert {how["norms"] for how in passes[2:]} == {(False,)}
