"""The sweep: each head as if it learnt alone, and what is chosen."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from mim_refiner.commands.measured_settings import SWEEP, sweep_in_recipe
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import augment
from mim_refiner.errors import InputError
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import RefinerHead, draw_choices
from mim_refiner.training import sweep
from mim_refiner.training.loop import step_generator
from mim_refiner.training.recipe import SweepSettings, override
from mim_refiner.training.refine import photometrics_of, view_specs
from mim_refiner.training.resolve import resolve
from mim_refiner.training.sweep import _hits, _of_images, choices_of, sweep_heads


@pytest.fixture
def given(tiny_run):
    """Recipe, encoder and loader of the tiny run; the whole set is an epoch of four steps."""
    made = tiny_run()
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16))
    return made.recipe, backbone, made.loader


def swept(given, *temperatures, poolings=(), labels=True):
    recipe, backbone, loader = given
    several = SweepSettings.model_construct(temperatures=list(temperatures), poolings=list(poolings))  # or one
    recipe = recipe.model_copy(update={"sweep": several})
    if not labels:
        loader = copy.copy(loader)
        loader.images = copy.copy(loader.images)
        loader.images.labels = None
    return sweep_heads(recipe, backbone, loader, Run())


def loader_views(recipe, backbone, loader):
    """The views of the sweep's first step."""
    batch = next(iter(loader.epoch(0)))
    generator = step_generator(0, sweep.SWEEP, 0)
    return augment(batch.views, photometrics_of(recipe, backbone.info), generator, torch.device("cpu"))


def test_a_head_learns_beside_others_as_it_does_alone(given):
    together = swept(given, 0.1, 1.0, poolings=("mean", "cls"))
    assert list(together["values"]) == [
        "temperature 0.1, pooling mean", "temperature 0.1, pooling cls",
        "temperature 1.0, pooling mean", "temperature 1.0, pooling cls",
    ]  # fmt: skip
    for pooling in ("cls", "mean"):
        for temperature in (0.1, 1.0):
            alone = swept(given, temperature, poolings=(pooling,))["values"]
            [(name, share)] = alone.items()
            assert together["values"][name] == pytest.approx(share, abs=1e-6)
    assert len(set(together["values"].values())) > 1  # they are not all one head
    best = max(together["values"], key=together["values"].get)
    assert best == "temperature {temperature}, pooling {pooling}".format(**together["chosen"])
    assert together["measure"] == "neighbour accuracy"
    assert together["reason"].startswith(f"{best}: nearest neighbours of the same class in ")


@pytest.mark.parametrize("block", [1, 2])
def test_a_swept_head_reads_what_the_head_of_a_run_reads(given, monkeypatch, block):
    """A block in the middle raw, the last one after the norm, and of the mean no prefix token."""
    recipe, backbone, loader = given
    seen = []
    monkeypatch.setattr(RefinerHead, "forward", lambda head, features, *_, **__: seen.append(features) or 1 / 0)
    recipe.heads.blocks = [block]
    for poolings in (("cls", "mean"), ("cls",), ("mean",)):
        with pytest.raises(ZeroDivisionError):
            swept((recipe, backbone, loader), 0.1, poolings=poolings)
    monkeypatch.undo()
    both, cls, mean = seen
    views = loader_views(recipe, backbone, loader)
    with torch.no_grad():
        for found, pooling in ((cls, "cls"), (mean, "mean")):
            [output] = backbone.forward_blocks(views[0], [block], norm=block == 2)
            torch.testing.assert_close(found[0], output.pooled(pooling))
    torch.testing.assert_close(both, cls)


def test_without_labels_the_two_views_have_to_agree(given):
    found = swept(given, 0.1, 0.5, labels=False)
    assert found["measure"] == "view agreement"
    ids = torch.tensor([3, 4, -1, 5, 3, 6, -1, 5])  # of four images in two views
    assert _hits([SimpleNamespace(neighbor_sample_ids=ids)], torch.arange(4), None).tolist() == [[1, 0, 0, 1]]


def test_each_image_counts_once_however_often_it_is_seen():
    labels = torch.tensor([0, 1, 0, 1])
    neighbours = [torch.tensor([2, -1, 0, 0, 3, 1]), torch.tensor([1, 3, 0, 0, 1, 1])]  # of images 0, 1, 2, two views
    outputs = [SimpleNamespace(neighbor_sample_ids=each) for each in neighbours]
    found = _hits(outputs, torch.arange(3), labels)
    assert found.tolist() == [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5]]
    assert found.dtype == torch.float32  # on the device, and Apple's have no doubles
    ids, hits = torch.tensor([7, 2, 7, 5, 7]), torch.tensor([[1.0, 0, 0, 1, 0.5], [0, 1, 0, 0.5, 0]])
    assert _of_images(ids, hits.double()).tolist() == [[0, 1, 0.5], [1, 0.5, 0]]


@pytest.mark.parametrize(("changed", "clear"), [((6, 4), False), ((6, 0), True)])
def test_the_reason_says_whether_the_best_one_is_clearly_better(given, monkeypatch, changed, clear):
    """Of 20 images the first head alone is right on ``changed[0]``, the second alone on ``changed[1]``."""
    won, lost = changed
    hits = torch.zeros(2, 20, dtype=torch.float64)
    hits[1, :won], hits[0, won : won + lost] = 1, 1
    monkeypatch.setattr(sweep, "_trained", lambda *_: (torch.arange(20), hits))
    found = swept(given, 0.1, 0.5)
    assert found["chosen"] == {"temperature": 0.5}  # the best one in any case
    difference = (won - lost) / 20
    error = math.sqrt(((won + lost) / 20 - difference**2) / 19)
    low, high = difference - 2.093 * error, difference + 2.093 * error  # Student's t, 19 degrees of freedom
    assert found["lead"]["over"] == "temperature 0.1"
    assert found["lead"]["value"] == pytest.approx(difference)
    assert found["lead"]["ci95"] == pytest.approx((low, high), abs=1e-4)
    said = (
        f"{'' if clear else 'not '}clearly better than temperature 0.1: {100 * difference:+.1f} points (95 % interval "
    )
    assert found["reason"].endswith(f"; {said}{100 * low:+.1f} to {100 * high:+.1f})")


def test_labels_of_one_class_tell_no_head_from_another(given):
    recipe, backbone, loader = given
    loader = copy.copy(loader)
    loader.images = copy.copy(loader.images)
    loader.images.labels, loader.images.class_names = loader.images.labels * 0, ("0",)
    found = swept((recipe, backbone, loader), 0.1, 0.5)
    assert found == swept(given, 0.1, 0.5, labels=False)
    assert found["measure"] == "view agreement"


def test_an_epoch_of_one_step_is_measured_on_queues_that_hold_images(given, monkeypatch):
    seen = []

    def hits(outputs, ids, labels):
        seen.append(outputs[0].neighbor_sample_ids)
        return _hits(outputs, ids, labels)

    monkeypatch.setattr(sweep, "_hits", hits)
    recipe, backbone, loader = given
    one = TrainLoader(loader.images, view_specs(recipe), 48, seed=0)
    assert one.steps_per_epoch == 1
    recipe = recipe.model_copy(update={"batch_size": 48})
    found = swept((recipe, backbone, one), 0.1, 0.5)
    assert found["chosen"]["temperature"] in (0.1, 0.5)
    assert list(found["values"]) == ["temperature 0.1", "temperature 0.5"]
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
    assert swept(given, 0.5)["values"]["temperature 0.5"] == together["temperature 0.5"]
    assert {int(value) for [choice] in drawn for value in choice} == {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["sweep.temperatures=[0.1, 0.5]"], {"temperature"}),
        (["sweep.poolings=[cls, mean]"], {"pooling"}),
        (["sweep.poolings=[cls, mean]", "heads.temperature=[0.1, 0.3]", "heads.blocks=[1, 2]"], {"pooling"}),
    ],
)
def test_the_run_takes_the_best_one_and_keeps_it(given, tmp_path, settings, names):
    recipe, backbone, loader = given
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), None) is None
    recipe = override(recipe, [*settings, "workers=0"])
    record = sweep_in_recipe(recipe, backbone, loader.images, Run(), None)
    assert set(record["chosen"]) == names
    for name, value in record["chosen"].items():
        assert getattr(recipe.heads, name) == value
    other = next(choice for choice in choices_of(recipe) if choice != record["chosen"])
    write_json(tmp_path / f"{SWEEP}.json", record | {"chosen": other})
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), tmp_path)["chosen"] == other
    assert {name: getattr(recipe.heads, name) for name in names} == other
    write_json(tmp_path / f"{SWEEP}.json", record | {"chosen": {"temperature": 7.0}})  # another sweep's: not taken
    assert sweep_in_recipe(recipe, backbone, loader.images, Run(), tmp_path)["chosen"] == record["chosen"]


def test_an_encoder_without_class_token_has_no_choice_of_poolings(given):
    recipe = override(given[0], ["sweep.poolings=[cls, mean]"])
    bare = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16, class_token=False, global_pool="avg"))
    with pytest.raises(InputError, match=r"sweep\.poolings: this encoder has no class token"):
        resolve(recipe, bare)
