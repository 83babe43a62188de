from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.errors import InputError, RecipeError
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.settings import changed, known_keys
from mim_refiner.training.recipe import RefineRecipe, override
from mim_refiner.training.recipes import PRETRAIN_RECIPES, REFINE_RECIPES, pretrain_recipe, refine_recipe, tiny
from mim_refiner.training.resolve import resolve
from mim_refiner.training.state import RunFolder

# method.md, section 5: blocks, temperature, batch, warm-up and refinement epochs and rates, local px, frozen blocks
PAPER_ROWS = {
    "mae_l16": (range(16, 24), 0.2, 1024, 20, 30, 96, 0, "cls"),
    "dbot_l16": (range(16, 24), 0.2, 1024, 20, 30, 96, 0, "cls"),
    "data2vec2_l16": (range(16, 24), 0.2, 1024, 20, 20, 96, 0, "cls"),
    "crossmae_l16": (range(16, 24), 0.2, 1024, 20, 30, 96, 0, "mean"),
    "mae_h14": (range(20, 32), 0.3, 512, 20, 30, 98, 0, "cls"),
    "dbot_h14": (range(20, 32), 0.3, 512, 20, 30, 98, 0, "cls"),
    "data2vec2_h14": (range(20, 32), 0.3, 512, 20, 20, 98, 0, "cls"),
    "mae_2b14": (range(16, 24), 0.35, 512, 20, 20, 98, 6, "cls"),
}


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_recipes_are_the_rows_of_the_paper(name: str) -> None:
    blocks, temperature, batch, warmup, epochs, local, frozen, pooling = PAPER_ROWS[name]
    recipe = REFINE_RECIPES[name]()
    assert recipe.heads.blocks == list(blocks)
    assert recipe.heads.temperature == temperature
    assert recipe.heads.pooling == pooling
    assert recipe.heads.queue_size == 65_536
    assert recipe.batch_size == batch
    assert (recipe.warmup.epochs, recipe.warmup.base_lr, recipe.warmup.top_k) == (warmup, 2e-4, 1)
    assert (recipe.refinement.epochs, recipe.refinement.base_lr, recipe.refinement.top_k) == (epochs, 4e-4, 20)
    assert recipe.refinement.layer_decay == 0.65
    assert recipe.refinement.warmup_epochs == recipe.warmup.warmup_epochs == 4
    assert (recipe.views.local_size, recipe.views.num_local, recipe.views.global_size) == (local, 10, 224)
    assert recipe.views.global_scale == (0.25, 1.0)
    assert recipe.views.local_scale == (0.05, 0.25)
    assert recipe.frozen_blocks == frozen
    assert (recipe.weight_decay, recipe.head_weight_decay, recipe.ema_decay) == (0.05, 1e-5, 0.9999)


def test_peak_rate_scales_with_the_batch() -> None:
    recipe = REFINE_RECIPES["mae_l16"]()
    assert peak_learning_rate(recipe.refinement.base_lr, recipe.batch_size) == pytest.approx(1.6e-3)


def test_override_reads_numbers_lists_and_nested_keys() -> None:
    recipe = override(
        refine_recipe("tiny", image_size=32), ["refinement.base_lr=4e-4", "heads.blocks=[2, 3]", "batch_size=8"]
    )
    assert (recipe.refinement.base_lr, recipe.heads.blocks, recipe.batch_size) == (4e-4, [2, 3], 8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("refinement.epoch=3", "unknown recipe key 'refinement.epoch'; did you mean 'refinement.epochs'"),
        ("base_lr=3", "did you mean '(warmup|refinement).base_lr'"),
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("batch_size", "no '='"),
        ("heads.view_pairing=wrong", "cross"),
        ("heads.temperature=-1", r"heads\.temperature: must be a number above 0"),
        ("heads.temperature=[0.1, 0]", r"list of numbers above 0 \(got \[0\.1, 0\]\)"),
        ("heads.pooling=[cls, all]", r"must be auto, cls, mean or a list of such \(got"),
    ],
)
def test_bad_settings_name_key_and_remedy(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        override(refine_recipe("tiny", image_size=32), [setting])
    assert "\n" not in str(caught.value)


def resolved(*settings: str) -> RefineRecipe:
    backbone = Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=16))
    return resolve(override(tiny(), ["views.local_size=8", *settings]), backbone)


def test_what_the_recipe_says_of_each_head_follows_its_block() -> None:
    said = ["heads.blocks=[-1, 0, 2]", "heads.temperature=[0.3, 0.1, 0.2]", "heads.pooling=[mean, auto, cls]"]
    recipe = resolved(*said)
    assert recipe.heads.blocks == [0, 2, 3]
    assert recipe.heads.temperature == [0.1, 0.2, 0.3]
    assert recipe.heads.pooling == ["cls", "cls", "mean"]
    assert recipe.heads.measured_pooling == "mean"
    again = resolve(recipe, Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=16)))
    assert again == recipe
    assert RefineRecipe.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
    assert (resolved().heads.temperature, resolved().heads.pooling) == (0.2, "cls")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["heads.blocks=[1, 2]", "heads.temperature=[0.1]"], r"heads\.temperature has 1 value for 2 heads"),
        (["heads.blocks=[2, 2]", "heads.pooling=[cls, mean]"], r"heads\.pooling has 2 values for 1 head"),
        (["heads.pooling=[]"], r"heads\.pooling has 0 values for 1 head"),
    ],
)
def test_one_value_for_each_head_or_one_for_all(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolved(*settings)


@pytest.mark.parametrize(("name", "values"), [("temperature", [0.1, 0.3]), ("pooling", ["cls", "mean"])])
def test_a_recipe_of_each_head_is_not_swept(name: str, values: list[Any]) -> None:
    """A recipe that has one for each head, and a sweep laid over it."""
    recipe = override(refine_recipe("tiny", image_size=32), ["heads.blocks=[1, 2]", f"heads.{name}={values}"])
    recipe = override(recipe, [f"sweep.{name}s={values}"])
    with pytest.raises(InputError, match=rf"sweep\.{name}s chooses one {name} for all heads"):
        resolve(recipe, Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=16)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sweep.temperatures=[0.1, 0.3, 0.1]", r"sweep\.temperatures: .*must be different ones"),
        ("sweep.temperatures=[0.1]", r"sweep\.temperatures: .*one is no choice; set heads\.temperature=0\.1 instead"),
        ("sweep.poolings=[mean]", r"sweep\.poolings: .*one is no choice; set heads\.pooling=mean instead"),
        ("sweep.poolings=[cls, cls]", r"sweep\.poolings: .*must be different ones"),
        ("sweep.poolings=[cls, max]", r"sweep\.poolings"),
        ("refinement.layer_decay=1.5", r"refinement\.layer_decay"),
        ("warmup.layer_decay=0.5", r"unknown recipe key 'warmup\.layer_decay'; did you mean 'refinement\.layer_decay'"),
    ],
)
def test_what_is_no_choice_is_refused(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolved(setting)


OFF = {  # (what turns it off), what has no effect then
    (): ["lora.rank=4", "lora.alpha=2", "lora.targets=[fc1]", "anchor.share=0.5", "anchor.blocks=heads",
         "guidance_share=0.5", "views.blur_sigma=[1, 2]"],
    ("guard.enabled=false",): ["guard.every=5", "guard.min_rank=0.5", "guard.max_knn_drop=0.1"],
    ("heads.swap_positive=false",): ["warmup.top_k=2", "refinement.top_k=2", "heads.swap_negatives=true"],
    ("knn_every=0",): ["guard.max_knn_drop=0.1"],
    ("refinement.layer_decay=1",): ["freeze_below=0.1"],
    ("views.jitter_prob=0",): ["views.jitter=[0, 0, 0, 0]", "views.jitter_strength=0.5"],
    ("views.num_local=0",): ["views.local_size=8", "views.local_scale=[0.1, 0.2]"],
    ("workers=0",): ["loader_timeout=5"],
}  # fmt: skip
OFF[("sweep.temperatures=[0.1, 0.3]",)] = ["heads.temperature=0.1", "heads.temperature=[0.2]"]
OFF[("sweep.poolings=[cls, mean]",)] = ["heads.pooling=mean"]
IDLE = [(list(off), idle) for off, settings in OFF.items() for idle in settings]
ON = {"lora": "adapter=lora", "anchor": "anchor.weight=1", "guidance_share": "guidance=prefer",
      "views.blur_sigma": "views.blur_prob=[1, 0, 0]"}  # fmt: skip


@pytest.mark.parametrize(("off", "idle"), IDLE)
def test_a_setting_without_effect_is_refused(off: list[str], idle: str) -> None:
    tiny, key = refine_recipe("tiny", image_size=32), idle.partition("=")[0]
    message = rf"{re.escape(key)} has no effect with .*=.*; set .*, or leave {re.escape(key)} out"
    with pytest.raises(RecipeError, match=f"--set {message}"):
        override(override(tiny, off), [idle])
    tree: dict[str, Any] = {}
    *groups, leaf = key.split(".")
    place = tree
    for group in groups:
        place = place.setdefault(group, {})
    place[leaf] = yaml.safe_load(idle.partition("=")[2])
    with pytest.raises(RecipeError, match=f"file: {message}"):
        override(override(tiny, off), [], ("file", tree))
    if off and "sweep" not in off[0]:  # said in the same breath
        override(tiny, [*off, idle])
    remedy = [on for part, on in ON.items() if key.startswith(part)] if not off else []
    assert override(tiny, [*remedy, idle]) != tiny
    if remedy:  # --set gives what a file says its effect
        assert override(tiny, remedy, ("file", tree)) == override(tiny, [*remedy, idle])


@pytest.mark.parametrize(("off", "idle"), [*IDLE, (["domain=spectrogram"], "views.blur_sigma=[0.1, 1]")])
def test_the_remedy_for_a_setting_without_effect_helps(off: list[str], idle: str) -> None:
    base = override(refine_recipe("tiny", image_size=32), off)
    with pytest.raises(RecipeError) as caught:
        override(base, [idle])
    remedy = re.findall(r"; set (.*), or leave ", str(caught.value))[0]
    for words, value in {" above 0": "=1", " below 1": "=0.5", " or restrict": ""}.items():
        remedy = remedy.replace(words, value)
    assert override(base, [remedy, idle]) != base


def test_who_turns_a_setting_off_knows_that_others_rest(tmp_path: Path) -> None:
    """Said in the same place or a later one; what is said earlier cannot know."""
    tiny, file = refine_recipe("tiny", image_size=32), tmp_path / "mine.yaml"
    file.write_text("guard: {enabled: false, every: 5}\nlora: {rank: 4}\n")
    both = refine_recipe(str(file), ["adapter=lora"], image_size=32)
    assert both == override(tiny, ["guard.enabled=false", "guard.every=5", "adapter=lora", "lora.rank=4"])
    with pytest.raises(RecipeError, match=r"mine\.yaml: lora\.rank has no effect with adapter=none"):
        refine_recipe(str(file), image_size=32)
    with pytest.raises(RecipeError, match=r"--set guard\.min_rank has no effect with guard\.enabled=false"):
        refine_recipe(str(file), ["adapter=lora", "guard.min_rank=0.5"], image_size=32)
    later = ["adapter=none", "guard.enabled=true"]  # the file's rank rests, and --set says so
    assert refine_recipe(str(file), later, image_size=32).guard.every == 5
    first, last = {"domain": "documents", "views": {"flip": 0.3}}, ["views.jitter_prob=0", "domain=medical"]
    in_turn = override(override(tiny, ["domain=documents", "views.flip=0.3"]), last)
    assert override(tiny, last, ("file", first)) == in_turn  # each domain under what its own place says beside


@pytest.mark.parametrize("file", [{"domain": "multispectral"}, "run folder"])
@pytest.mark.parametrize("domain", ["photographs", "medical"])
@pytest.mark.parametrize("base", ["tiny", "demo"])
def test_a_changed_domain_takes_the_place_of_the_one_before(file: Any, domain: str, base: str) -> None:
    """Also where the file writes out all views of its domain, as a run folder does; what else it says of them stays."""
    recipe = refine_recipe(base, image_size=32)
    if file == "run folder":
        file = override(recipe, ["domain=multispectral"]).model_dump(mode="json")
    assert override(recipe, [f"domain={domain}"], ("file", file)) == override(recipe, [f"domain={domain}"])
    mine = {**file, "views": {**file.get("views", {}), "noise": 0.3, "jitter": [0.1, 0.1, 0.1, 0.1]}}
    views = override(recipe, [f"domain={domain}"], ("file", mine)).views
    assert (views.noise, views.jitter, views.vflip, views.gain) == (0.3, (0.1,) * 4, recipe.views.vflip, 0)
    again = override(override(recipe, ["domain=multispectral"]), [f"domain={domain}"])
    assert again.views.vflip == again.views.gain == 0


def test_a_domain_said_twice_says_nothing_new() -> None:
    file = ("file", {"views": {"rotate": 3}, "domain": "medical"})
    assert override(tiny(), ["domain=medical"], file) == override(tiny(), [], file)
    assert override(tiny(), ["domain=medical"], ("file", {"domain": "nonsense"})).views.rotate == 10


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("guard", "'guard.enabled'"), ("anchor", "'anchor.weight'"), ("lora", "'lora.rank'"),
        ("sweep", "'sweep.temperatures'"), ("heads", "'heads.blocks'"), ("views", "'views.global_size'"),
        ("refinement", "'refinement.epochs'"), ("enabled", "'guard.enabled'"), ("adapter.rank", "'lora.rank'"),
        ("epochs", "'warmup.epochs' or 'refinement.epochs'"), ("guard.enable", "'guard.enabled'"),
    ],
)  # fmt: skip
def test_a_group_or_a_last_name_is_answered_with_the_right_key(key: str, names: str) -> None:
    for call in (lambda: override(tiny(), [f"{key}=0.5"]), lambda: override(tiny(), [], ("mine", {key: 4}))):
        with pytest.raises(RecipeError, match=rf"unknown recipe key '{key}'; did you mean {names}\?"):
            call()


def test_a_temperature_beside_a_sweep_of_them_is_refused() -> None:
    for settings in (["heads.temperature=[0.2]", "sweep.temperatures=[0.1, 0.3]"],
                     ["sweep.poolings=[cls, mean]", "heads.pooling=cls"]):  # fmt: skip
        with pytest.raises(
            RecipeError, match=r"heads\.\w+ has no effect with sweep\.\w+=.*; set sweep\.\w+=\[\], or leave"
        ):
            resolved(*settings)


def test_every_setting_that_rests_is_in_the_table() -> None:
    tried = {idle.partition("=")[0] for _, idle in IDLE}
    keys = known_keys(refine_recipe("tiny", image_size=32))
    for rule in RefineRecipe.idle:
        assert rule.switch in keys
        for name in rule.keys:
            assert {key for key in tried if rule.of(key) and f"{key}.".startswith(f"{name}.")}
            assert any(rule.of(key) for key in keys if f"{key}.".startswith(f"{name}."))


def test_a_recipe_that_lists_all_settings_is_taken_as_it_is(tmp_path: Path) -> None:
    """As `mim-refiner recipes NAME` prints it, and as a run folder has it."""
    for name in ("tiny", "demo", "mae_l16"):
        recipe = refine_recipe(name, image_size=0)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        assert refine_recipe(str(file), image_size=0) == recipe
    run = override(refine_recipe("tiny", image_size=0), ["views.num_local=0"])
    run = resolve(run, Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=32)))
    file.write_text(yaml.safe_dump({"command": "refine", **run.model_dump(mode="json")}))
    assert refine_recipe(str(file), image_size=0) == run
    with pytest.raises(RecipeError, match=r"views\.local_size has no effect"):
        override(run, ["views.local_size=8"])


UNIONS = {
    "checkpointing": "true, false or selective",
    "kept_graphs": "a whole number from 0 to 1000000000 or auto",
    "heads.blocks": "a list of whole numbers, last_third or auto",
    "heads.temperature": "a number above 0 or a list of numbers above 0",
    "heads.pooling": "auto, cls, mean or a list of such",
    "views.global_size": "a whole number from 1 to 16384 or HEIGHTxWIDTH",
    "views.local_size": "a whole number from 1 to 16384 or HEIGHTxWIDTH",
}


@pytest.mark.parametrize("value", ["nonsense", "-1", "[1, x]", "{a: 1}", "7.5"])
def test_a_setting_of_several_kinds_is_refused_in_one_line_that_names_them(value: str) -> None:
    for key, kinds in UNIONS.items():
        if (key, value) == ("heads.temperature", "7.5"):
            continue
        with pytest.raises(RecipeError) as caught:
            override(refine_recipe("tiny", image_size=32), [f"{key}={value}"])
        got = repr(yaml.safe_load(value))
        assert str(caught.value) == f"recipe: {key}: must be {kinds} (got {got}); correct by --set or in the file"


def test_no_setting_is_refused_in_the_words_of_the_library() -> None:
    bases = refine_recipe("tiny", image_size=32), pretrain_recipe(None, image_size=32), EvaluationSettings()
    messages = []
    for base, value in itertools.product(bases, ({"a": [1]}, "nonsense", -1)):
        for key in known_keys(base):
            try:
                changed(base, [(key, value)])
            except RecipeError as error:
                messages.append(str(error))
    assert len(messages) > 200
    assert not [
        text for text in messages if re.search(r"constrained|literal\[|[.](bool|int|float|list|tuple|str)\b", text)
    ]


@pytest.mark.parametrize("key", ["sweep.temperatures", "heads.temperature", "heads.blocks", "betas"])
def test_values_without_brackets_are_answered_with_the_list(key: str) -> None:
    values = "0.1,0.2" if key != "heads.blocks" else "1,2"
    with pytest.raises(RecipeError) as caught:
        override(tiny(), [f"{key}={values}"])
    assert f"(got '{values}'; write [{values}])" in str(caught.value)
    assert override(tiny(), [f"{key}=[{values}]"]) != tiny()


def test_an_empty_section_of_a_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: tiny\nlora:\nviews:\nguard: {}\nheads:\n  out_dim: 64\n")
    assert refine_recipe(str(file), image_size=32) == override(tiny(), ["heads.out_dim=64"])
    file.write_text("lora:\nlorra:\n")
    with pytest.raises(RecipeError, match="unknown recipe key 'lorra'"):
        refine_recipe(str(file), image_size=32)


def test_recipe_file_is_laid_over_its_named_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mae_h14", "batch_size": 128}))
    recipe = refine_recipe(str(path), image_size=224)
    assert (recipe.batch_size, recipe.heads.temperature) == (128, 0.3)


@pytest.mark.parametrize("content", ["[1, 2]", "unknown_key: 3", "{broken"])
def test_bad_recipe_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        refine_recipe(str(path), image_size=224)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'mae_l16'"):
        refine_recipe("mae_l6", image_size=224)


def test_a_resolved_recipe_survives_yaml() -> None:
    for make in (*REFINE_RECIPES.values(), *PRETRAIN_RECIPES.values()):
        recipe = make()
        again = override(recipe, [], ("test", yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))))
        assert again == recipe
        assert "batch_size" in known_keys(recipe)


def test_default_recipe_follows_the_image_size() -> None:
    assert refine_recipe(None, image_size=32).name == "tiny"
    assert refine_recipe(None, image_size=224).name == "default"
    assert pretrain_recipe(None, image_size=32).name == "tiny_mae"
    assert pretrain_recipe(None, image_size=224).name == "mae"


def test_defaults_fit_few_images_and_named_recipes_stay() -> None:
    few = refine_recipe(None, image_size=224, images=1034)
    assert (few.batch_size, few.heads.queue_size) == (256, 1024)
    assert pretrain_recipe(None, image_size=224, images=1034).batch_size == 256
    assert refine_recipe("mae_l16", image_size=224, images=1034).batch_size == 1024
    assert refine_recipe(None, image_size=32, images=50_000) == refine_recipe("tiny", image_size=32)
    smallest = refine_recipe(None, image_size=32, images=6)
    assert (smallest.batch_size, smallest.heads.queue_size) == (2, 32)


@pytest.mark.parametrize(
    "setting",
    [
        "betas=[0.9,1.0]", "betas=[-1,0.5]", "betas=[2,2]", "betas=[0.9]", "refinement.epochs=9999999999999",
        "refinement.epochs=-1", "refinement.epochs=1.5", "heads.temperature=.inf", "heads.temperature=.nan",
        "refinement.base_lr=1e999", "weight_decay=-.inf", "heads.queue_size=1000000000000", "batch_size=true",
        "heads.projector_hidden=99999999", "views.global_size=10000000", "views.flip=2", "views.blur_prob=[1,1,7]",
        "views.rotate=181", "views.gain=1", "views.noise=-0.1", "views.mask_rows=.nan",
        "ema_decay=1", "views.num_local=100000", "batch_size=" + "9" * 5000, "batch_size=[1,2]", "heads.blocks={a: 1}",
        "batch_size=" + "[" * 5000, "batch_size=&a [*a]", "batch_size=!!python/name:os.system", "batch_size=",
        "guard.every=" + "1" * 30, "batch_size=2024-13-77", "betas=\0", "domain=[a]", "domain={a: 1}",
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_key(setting):
    with pytest.raises(RecipeError) as caught:
        override(tiny(), [setting])
    text = str(caught.value)
    assert setting.partition("=")[0] in text
    assert len(text) < 500
    assert "\n" not in text


@pytest.mark.parametrize(
    "setting",
    [
        "heads.blocks=[true]", "heads.temperature=[0.1,true]", "sweep.temperatures=[true]", "kept_graphs=true",
        "views.global_size=[true,32]", "views.jitter=[0,0,0,false]", "views.global_scale=[0.1,true]",
        "betas=[false,0.9]",
    ],
)  # fmt: skip
def test_truth_is_no_number_in_lists_either(setting):
    with pytest.raises(RecipeError, match="true and false are no numbers"):
        override(tiny(), [setting])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("guidance=off", "'none', 'prefer' or 'restrict'"),
        ("heads.pooling=true", "auto, cls, mean"),
        ("heads.pooling=[true]", "auto, cls, mean"),
        ("name=true", "must be text"),
    ],
)
def test_truth_for_a_name_is_answered_with_the_names(setting, told):
    with pytest.raises(RecipeError, match=told):
        override(tiny(), [setting])


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x]\n" for i in range(30))


@pytest.mark.parametrize(
    "content",
    [
        BOMB, "name: &a\n  b: *a\n", "name: [" * 3000, "{" * 3000, "batch_size: " + "9" * 5000, "\0\1\2",
        "name: [a, b]\n",
        "- a\n- b\n", "", "!!python/object/apply:os.system ['true']", "a: b: c", "x" * 2_000_000, "batch_size: .nan",
        "heads: 3\n", "refinement: {epochs: {a: 1}}", "? [a]\n: b\n", "%YAML 9.9\n---\na",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)  # fmt: skip
def test_hostile_recipe_files(tmp_path, content):
    path = tmp_path / "bomb.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=r"bomb\.yaml|recipe: ") as caught:
        refine_recipe(str(path), image_size=32)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_recipe_yaml_of_a_run_folder_is_a_recipe_file(tmp_path):
    recipe = override(tiny(), ["heads.blocks=[1,3]", "heads.temperature=[0.1,0.3]", "domain=medical", "views.flip=0.1"])
    facts = {"command": "refine", "data": "images", "model": "m", "model_sha256": "0", "seed": 3, "exclude": "x.txt"}
    RunFolder(tmp_path / "run", facts | recipe.model_dump(mode="json"), overwrite=False)
    assert refine_recipe(str(tmp_path / "run" / "recipe.yaml"), image_size=32) == recipe


@pytest.mark.parametrize("name", ["x\0y.yaml", "x" * 5000, "x" * 5000 + ".yaml", "/dev/zero", "/", "."])
def test_names_that_are_no_recipe(name):
    with pytest.raises(RecipeError):
        refine_recipe(name, image_size=32)


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "p.yaml")
    with pytest.raises(RecipeError, match=r"p\.yaml.*no regular file"):
        refine_recipe(str(tmp_path / "p.yaml"), image_size=32)


def test_a_recipe_of_the_other_verb_is_called_so():
    for read, name, verb in ((refine_recipe, "mae", "pretrain"), (pretrain_recipe, "tiny", "refine")):
        with pytest.raises(RecipeError, match=f"^recipe '{name}' is for {verb}; use a YAML file or one of "):
            read(name, image_size=32)
