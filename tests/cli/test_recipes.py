"""The verb recipes: a list, a recipe that can be given back, and every setting explained."""

from __future__ import annotations

import pytest
import yaml

from mim_refiner.commands.recipes import meaning, recipes
from mim_refiner.files import dotted
from mim_refiner.training.recipe import PretrainRecipe, RefineRecipe
from mim_refiner.training.recipes import PRETRAIN_RECIPES, REFINE_RECIPES, refine_recipe, tiny


def test_the_list_has_every_recipe_with_its_command(cli):
    listed = {row["name"]: row["command"] for row in cli.call("recipes", "--json").json["recipes"]}
    assert listed == dict.fromkeys(REFINE_RECIPES, "refine") | dict.fromkeys(PRETRAIN_RECIPES, "pretrain")
    shown = cli.call("recipes")
    assert shown.code == 0, shown.err
    assert "k-NN accuracy 42.5 -> 58.0" in shown.out


def test_what_is_printed_is_a_recipe_file(cli, tmp_path):
    shown = cli.call("recipes", "tiny")
    assert shown.code == 0, shown.err
    (tmp_path / "mine.yaml").write_text(shown.out)
    assert yaml.safe_load(shown.out)["batch_size"] == tiny().batch_size
    assert refine_recipe(str(tmp_path / "mine.yaml"), image_size=32) == tiny()


def test_a_key_is_explained_with_its_values(cli):
    told = cli.call("recipes", "--key", "refinement.top_k", "--json").json
    assert told["meaning"] == "neighbours to draw from: 1 in head warm-up, 20 in refinement"
    assert told["values"]["tiny"] == 20
    assert told["values"].keys() == REFINE_RECIPES.keys()
    one = recipes(name="tiny", key="export_weights")
    assert one["meaning"].startswith("What export/ holds: the weights, their average")  # the comment above the field
    assert one["takes"] == "auto or model or ema"
    assert recipes(key="anchor.weight")["part_of"].startswith("Dense anchor")
    shown = cli.call("recipes", "--key", "hold_out").out
    assert "takes: a number from 0 below 1" in shown
    assert "0.1 in mae_l16, dbot_l16" in shown  # names as they are
    for words in (("recipes", "tinny"), ("recipes", "--key", "refinement.epoch"), ("recipes", "--key", "top_k"),
                  ("recipes", "anchor.weigt")):  # fmt: skip
        outcome = cli.call(*words)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert "did you mean" in outcome.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("anchor.weight",), "use mim-refiner recipes --key anchor.weight"),
        (("--key", "tiny"), "use mim-refiner recipes tiny"),
        (("tiny_mae", "--key", "anchor.weight"), "recipe 'tiny_mae' has no such setting"),
        (("nothing like it",), "--key KEY explains a setting"),
    ],
)
def test_a_key_in_the_place_of_a_name_and_the_reverse_are_told(cli, words, told):
    outcome = cli.call("recipes", *words)
    assert outcome.code == 2
    assert told in outcome.err


@pytest.mark.parametrize("name", ["tiny", "mae_l16"])
def test_a_printed_recipe_fits_a_terminal(cli, name):
    assert max(map(len, cli.call("recipes", name).out.splitlines())) <= 80


def test_every_setting_has_an_explanation():
    trees = {RefineRecipe: tiny(), PretrainRecipe: PRETRAIN_RECIPES["tiny_mae"]()}
    for kind, recipe in trees.items():
        assert [key for key in dotted(recipe.model_dump()) if not meaning(kind, key)] == []
