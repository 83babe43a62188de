"""Images held out of training: which, and when none are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mim_refiner.commands.inputs import ended_run, run_fast, tell_trained_on, training_images
from mim_refiner.core.run import Run
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import refine_recipe


@pytest.fixture
def labelled(tmp_path):
    """Return a maker of a file with images of one colour each and so many of every class."""

    def make(*counts):
        labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
        pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
        np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
        return str(tmp_path / "images.npz")

    return make


def split(spec, share=0.1, seed=0):
    recipe = override(refine_recipe("tiny", image_size=8), [f"hold_out={share}"])
    return training_images(spec, recipe, (), None, Run(seed=seed), 3, None)


def numbers(images):
    return {int(images.load(index)[0, 0, 0]) for index in range(len(images))}


@pytest.mark.parametrize(
    ("counts", "settings", "told"),
    [((60, 40), ["hold_out=0.3"], False), ((100,), ["hold_out=0.3"], True), ((100,), ["batch_size=8"], False),
     ((1, 1), ["hold_out=0.3"], True), ((100,), ["hold_out=0"], False)],
)  # fmt: skip
def test_a_share_that_cannot_be_held_out_is_told_where_it_is_set(labelled, counts, settings, told):
    said = []
    reporter = Reporter()
    reporter.warning = said.append
    recipe = override(refine_recipe("tiny", image_size=8), settings)
    training_images(labelled(*counts), recipe, settings, None, Run(reporter=reporter), 3, None)
    assert [line.partition(":")[0] for line in said] == ["--set hold_out=0.3 has no effect"] * told


def test_a_share_of_every_class_is_held_out_by_the_seed(labelled):
    spec = labelled(60, 40, 20)
    train, test = split(spec)
    assert numbers(train) | numbers(test) == set(range(120))
    assert not numbers(train) & numbers(test)
    assert np.bincount(test.labels).tolist() == [6, 4, 2]
    assert numbers(split(spec)[1]) == numbers(test) != numbers(split(spec, seed=1)[1])
    assert train.source.fingerprint() != split(spec, seed=1)[0].source.fingerprint()


@pytest.mark.parametrize(("counts", "share"), [((40,), 0.1), ((1,) * 40, 0.1), ((1, 1), 0.1), ((20, 20), 0.0)])
def test_nothing_is_held_out_where_that_measures_nothing(labelled, counts, share):
    train, test = split(labelled(*counts), share)
    assert (len(train), test) == (sum(counts), None)


def test_images_held_out_that_cannot_be_read_stop_no_training(tmp_path):
    for number in range(20):
        file = tmp_path / f"class{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    _, test = split(tmp_path)
    for index in range(len(test)):
        (tmp_path / test.source.name(index)).write_bytes(b"no image")
    train, test = split(tmp_path)
    assert (len(train), len(train.unreadable), test) == (20, 2, None)


def test_no_more_than_enough_is_held_out(labelled, monkeypatch):
    monkeypatch.setattr("mim_refiner.commands.inputs.MOST_HELD_OUT", 8)
    train, test = split(labelled(60, 60), 0.5)
    assert (len(train), np.bincount(test.labels).tolist()) == (112, [4, 4])


def test_an_encoder_of_a_run_is_said_to_have_been_trained_on_its_data(tmp_path):
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"data: {tmp_path}/photos\n")
    for model in (run, run / "export"):
        said = tell_trained_on([str(model), "vit_base_patch16_224"], f"{tmp_path}/photos/", Reporter())
        assert [text.split(" ")[0] for text in said] == [str(model)]
    assert tell_trained_on([str(run)], f"{tmp_path}/others", Reporter()) == []
    (run / "recipe.yaml").write_text("]")
    assert tell_trained_on([str(run)], f"{tmp_path}/photos", Reporter()) == []


@pytest.mark.parametrize(("precision", "fused"), [("fp32", True), ("bf16", False)])
def test_only_bf16_attends_by_plain_products_on_a_cpu(precision, fused):
    """The fused kernel in bf16 takes five times as long there; in float32 it is the faster one."""
    backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16))
    run_fast(backbone, refine_recipe("tiny", image_size=16), Run(precision=precision))
    assert {block.attn.fused_attn for block in backbone.model.blocks} == {fused}


def test_a_run_whose_summary_cannot_be_read_has_not_ended(tmp_path):
    (tmp_path / "summary.json").mkdir()
    assert ended_run(tmp_path, {}, ()) is None
