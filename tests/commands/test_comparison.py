"""What a comparison needs is tried before the first step, and a finished training is always exported."""

from __future__ import annotations

import json
from itertools import chain, repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mim_refiner.commands import deadline, refine
from mim_refiner.commands.comparison import Measured, compare, measured
from mim_refiner.commands.deadline import Box
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipes import tiny


class Told(Reporter):
    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


@pytest.fixture
def labelled(tmp_path):
    """Return a maker of a set with so many images of every class."""

    def make(*counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
        path = tmp_path / f"{len(labels)}-{len(counts)}.npz"
        np.savez(path, images=pixels, labels=labels)
        return ImageSet(open_source(path))

    return make


def run() -> Run:
    return Run(torch.device("cpu"), seed=0, reporter=Told())


@pytest.mark.parametrize("counts", [(1,) * 64, (1, 1), (1,), (64,), (3,)])
def test_labels_that_do_not_suffice_are_left_aside_and_that_is_said(labelled, counts):
    bank, told = labelled(*counts), run()
    on = measured(bank, None, given=False, run=told)
    if bank.labels is not None:  # one class alone is no labels for some sources
        assert bank.classes is not None
        assert "are left aside" in told.reporter.said[0]
        with pytest.raises(DataError, match="--eval-data: "):
            measured(bank, None, given=True, run=run())
    assert on.bank.labels is None
    assert on.bank.classes is None
    assert len(on.bank) == len(bank)
    assert on.bank.source is bank.source


def test_k_fits_the_bank(labelled):
    assert measured(labelled(40, 40), None, given=False, run=run()).k == 10
    assert measured(labelled(5, 5), None, given=False, run=run()).k == 8
    assert measured(labelled(5, 5), labelled(7, 7), given=True, run=run()).k == 10
    assert measured(labelled(3, 3), labelled(7, 7), given=True, run=run()).k == 6


def test_few_labelled_images_are_compared_by_their_labels(labelled, tmp_path):
    """Four and five are no tenth of anything, but the probe holds each third of them out in turn."""
    for bank, test in ((labelled(2, 2), labelled(7, 7)), (labelled(3, 3), None)):
        told = run()
        on = measured(bank, test, given=True, run=told)
        assert on.tested.labels is not None
        encoder = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16), source="mae")
        recipe = tiny()
        recipe.heads.blocks, recipe.heads.pooling = [1], "cls"
        found = compare({"before": encoder, "after": encoder}, on, recipe, tmp_path / str(len(bank)), told)
        assert found["verdict"]["verdict"] == "no clear change"
        assert found["before"]["linear_top1"] is not None


def test_a_comparison_whose_time_runs_out_is_whole_on_fewer_images(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(deadline, "FEW_BANK", 40)
    monkeypatch.setattr(deadline, "FEW_TEST", 20)
    encoders = [Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=8), source=name) for name in ("mae", "run")]
    left = chain([1e6], repeat(-1.0))  # there seemed to be time enough
    told = run()
    recipe = tiny()
    recipe.heads.blocks, recipe.heads.pooling = [1], "cls"
    on, stages = Measured(labelled(60, 60), labelled(30, 30)), dict(zip(("before", "after"), encoders, strict=True))
    summary = compare(stages, on, recipe, tmp_path, told, Box(lambda: next(left)))
    assert "no time for more: the comparison is on 40 bank and 20 test images" in told.reporter.said
    assert not any(line.startswith("compared on") for line in told.reporter.said)  # that was said
    assert summary["recommendation"]["reason"] == "the usual features: there was no time to measure others"
    assert len(summary["after"]["knn_by_block"]["cls"]) == 2
    results = [json.loads(path.read_text()) for path in (tmp_path / "evaluation").glob("*-knn_top1-*.json")]
    assert len(results) == 8  # encoders, blocks, poolings
    assert {(found["data"]["train"]["images"], found["data"]["test"]["images"]) for found in results} == {(40, 20)}
    assert not (tmp_path / "evaluation" / "atlas-after.json").exists()


def test_the_export_is_written_when_measuring_fails(labelled, tmp_path, monkeypatch):
    encoder = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16), source="mae")

    def fails(*arguments, **options):
        raise DataError("the disk with the images is gone; mount it")

    monkeypatch.setattr(refine, "compare", fails)
    recipe = tiny()
    recipe.heads.blocks = [1]
    on = SimpleNamespace(bank=labelled(4, 4), test=None, k=3, says="")
    with pytest.raises(DataError, match="the disk with the images is gone"):
        refine.conclude({"before": encoder, "after": encoder}, on, recipe, tmp_path, {"data": "photos"}, run())
    assert {path.name for path in (tmp_path / "export").iterdir()} >= {"config.json", "model.safetensors"}
