"""The temperature sweep: each head as if it learnt alone, and what is chosen."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from mim_refiner.commands.measured_settings import SWEEP, sweep_in_recipe
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import draw_choices
from mim_refiner.training import sweep
from mim_refiner.training.recipe import SweepSettings, override
from mim_refiner.training.refine import view_specs
from mim_refiner.training.sweep import _shares, sweep_temperatures


@pytest.fixture
def given(tiny_run):
    """Recipe, encoder and loader of the tiny run; the whole set is an epoch of four steps."""
    made = tiny_run()
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16))
    return made.recipe, backbone, made.loader


def swept(given, *temperatures, labels=True):
    recipe, backbone, loader = given
    recipe = recipe.model_copy(update={"sweep": SweepSettings(temperatures=list(temperatures))})
    if not labels:
        loader = copy.copy(loader)
        loader.images = copy.copy(loader.images)
        loader.images.labels = None
    return sweep_temperatures(recipe, backbone, loader, Run())


def test_a_head_learns_beside_others_as_it_does_alone(given):
    together = swept(given, 0.1, 0.3, 1.0)
    assert list(together["values"]) == ["0.1", "0.3", "1.0"]
    for temperature in (0.1, 0.3, 1.0):
        assert swept(given, temperature)["values"][str(temperature)] == together["values"][str(temperature)]
    best = max(together["values"], key=together["values"].get)
    assert together["temperature"] == float(best)
    assert together["measure"] == "neighbour accuracy"
    assert together["reason"].startswith(f"temperature {best}: nearest neighbours of the same class in ")


def test_without_labels_the_two_views_have_to_agree(given):
    found = swept(given, 0.1, 0.5, labels=False)
    assert found["measure"] == "view agreement"
    ids = torch.tensor([3, 4, -1, 5, 3, 6, -1, 5])  # of four images in two views
    assert _shares([SimpleNamespace(neighbor_sample_ids=ids)], torch.arange(4), None).tolist() == [0.5]


def test_an_epoch_of_one_step_is_measured_on_queues_that_hold_images(given, monkeypatch):
    seen = []

    def shares(outputs, ids, labels):
        seen.append(outputs[0].neighbor_sample_ids)
        return _shares(outputs, ids, labels)

    monkeypatch.setattr(sweep, "_shares", shares)
    recipe, backbone, loader = given
    one = TrainLoader(loader.images, view_specs(recipe), 48, seed=0)
    assert one.steps_per_epoch == 1
    recipe = recipe.model_copy(update={"batch_size": 48})
    found = swept((recipe, backbone, one), 0.1, 0.5)
    assert found["temperature"] in (0.1, 0.5)
    assert list(found["values"]) == ["0.1", "0.5"]
    assert len(seen) == sweep.STEPS // 2
    assert all((ids >= 0).float().mean() > 0.9 for ids in seen)  # not what the queue began with


def test_heads_draw_among_as_many_neighbours_as_in_the_warm_up(given, monkeypatch):
    recipe, backbone, loader = given
    warmup = recipe.warmup.model_copy(update={"top_k": 3})
    given = recipe.model_copy(update={"warmup": warmup}), backbone, loader
    drawn = []

    def draw(*given):
        drawn.append(draw_choices(*given))
        return drawn[-1]

    monkeypatch.setattr(sweep, "draw_choices", draw)
    together = swept(given, 0.1, 0.5)["values"]
    assert swept(given, 0.5)["values"]["0.5"] == together["0.5"]
    assert {int(value) for [choice] in drawn for value in choice} == {0, 1, 2}


def test_the_run_takes_the_best_one_and_keeps_it(given, tmp_path, monkeypatch):
    recipe, backbone, loader = given
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), None) is None
    recipe = override(recipe, ["sweep.temperatures=[0.1, 0.5]", "workers=0"])
    record = sweep_in_recipe(recipe, backbone, loader.images, Run(), None)
    assert recipe.heads.temperature == record["temperature"]
    other = 0.6 - record["temperature"]
    write_json(tmp_path / f"{SWEEP}.json", record | {"temperature": other})
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), tmp_path)["temperature"] == other
    assert recipe.heads.temperature == other
    write_json(tmp_path / f"{SWEEP}.json", record | {"temperature": 7.0})  # of another sweep: measured again
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), tmp_path) == record
