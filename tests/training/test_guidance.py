"""Guidance in a run: more neighbours of the image's class, the same bits after a resume, and a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mim_refiner.errors import DataError, InputError
from mim_refiner.training import refine
from mim_refiner.training.resolve import check_guidance


def accuracy(records: list[dict]) -> float:
    values = [record[f"neighbor_accuracy/{block}"] for record in records[-6:] for block in (1, 2)]
    return sum(values) / len(values)


def test_guided_heads_take_neighbours_of_the_class_and_a_run_resumes(tiny_run, tmp_path: Path) -> None:
    plain = accuracy(tiny_run().run(tmp_path / "plain"))
    whole = tiny_run(guidance="restrict")
    assert plain < 0.6 < accuracy(whole.run(tmp_path / "restrict")) == 1.0
    few = accuracy(tiny_run(guidance="restrict", guidance_share=0.5).run(tmp_path / "few"))
    assert plain < few < 1.0

    cut = tiny_run(guidance="restrict")
    with pytest.raises(KeyboardInterrupt):
        cut.run(tmp_path / "cut", stop_after=10)
    again = tiny_run(guidance="restrict")
    again.run(tmp_path / "cut")
    for name, tensor in whole.refiner.state_dict().items():
        torch.testing.assert_close(again.refiner.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_guidance_without_labels_is_refused(tiny_run, tiny_images) -> None:
    made = tiny_run()
    images = object.__new__(type(tiny_images))  # a copy would leave the source behind
    images.__dict__.update(tiny_images.__dict__)
    images.labels = None
    recipe = made.recipe.model_copy(update={"guidance": "prefer"})
    with pytest.raises(DataError, match=r"no labels .*guidance=prefer needs some; give labelled images"):
        check_guidance(recipe, images)
    images.labels, images.class_names = tiny_images.labels * 0, ("0",)
    with pytest.raises(
        DataError, match=r"labels of one class, and guidance=prefer needs several; give labelled images"
    ):
        check_guidance(recipe, images)
    made.loader.images = images  # nor is the neighbours' accuracy told by them
    assert refine.build(made.recipe, made.refiner, made.loader, made.refinement.run).labels is None
    images.labels = None
    alone = recipe.model_copy(update={"heads": recipe.heads.model_copy(update={"swap_positive": False})})
    with pytest.raises(InputError, match=r"guidance=prefer chooses among neighbours.*leave one of them out"):
        check_guidance(alone, tiny_images)
    made.loader.images = images
    with pytest.raises(DataError, match="guidance=prefer"):
        refine.build(recipe, made.refiner, made.loader, made.refinement.run)
