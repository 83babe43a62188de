"""Fine-tuning: what moves, how fast, and that it learns; long-tailed subsets; corruptions."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropPath

from mim_refiner.core.run import Run
from mim_refiner.evaluation.corruptions import CORRUPTIONS, corrupt
from mim_refiner.evaluation.finetune import (
    Classifier,
    FinetuneSettings,
    LabelledRows,
    _groups,
    _seeded,
    _train,
    finetune,
    published,
    share_of,
    training_transform,
)
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import LongTailSettings, class_groups, imbalanced_subset

SIMPLE = FinetuneSettings(
    epochs=8, batch_size=20, lr=5e-3, mixup=0.0, cutmix=0.0, erasing=0.0, randaugment="", warmup_epochs=1, drop_path=0.1
)


def rows_of(images):
    return LabelledRows(images, np.arange(len(images)), images.labels)


def test_it_learns_and_leaves_the_encoder_and_the_generators_alone(make_backbone, make_images):
    backbone, train, test = make_backbone(), rows_of(make_images(60)), rows_of(make_images(30, seed=1))
    before = copy.deepcopy(backbone.state_dict())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    score = finetune(backbone, train, test, SIMPLE, image_size=32, run=Run(seed=3))
    assert score.accuracy > 0.8
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_whole_recipe_is_reproducible(make_backbone, make_images):
    """With loader processes, however many, too."""
    train, logits = rows_of(make_images(24)), []
    for workers in (0, 0, 2):
        settings = FinetuneSettings(epochs=2, batch_size=10, workers=workers)  # mixup, cutmix, RandAugment, erasing
        with _seeded(1, ()):
            model = Classifier(make_backbone(), 3, "cls", 0.2)
            _train(model, train, settings, 32, Run(seed=1))
        logits.append(model.eval()(torch.ones(2, 3, 32, 32)))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_epochs_draw_other_crops_in_another_order(make_backbone, make_images):
    settings = FinetuneSettings(workers=0, epochs=2, batch_size=10, mixup=0, cutmix=0)
    model, seen = Classifier(make_backbone(), 3, "cls", 0.0), []
    model.register_forward_pre_hook(lambda _, images: seen.append(*images))
    _train(model, rows_of(make_images(24)), settings, 32, Run(seed=1))
    first, second = torch.cat(seen).chunk(2)
    assert first.shape == second.shape == (20, 3, 32, 32)
    assert not any(torch.equal(one, other) for one in first for other in second)


def test_the_strongest_augmentation_survives_every_draw():
    """timm posterises to 0 bits at full magnitude, an error in newer Pillow: about one image in 100 of the recipe."""
    settings = FinetuneSettings(randaugment="rand-m10-mstd2-inc1-n4")
    transform = training_transform(settings, 32, (0.5,) * 3, (0.25,) * 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for _ in range(300):
        assert transform(image).shape == (3, 32, 32)


def test_rates_fall_with_the_distance_from_the_output(make_backbone):
    model = Classifier(make_backbone(), 3, "cls", 0.2)
    settings = FinetuneSettings(layer_decay=0.5, weight_decay=0.1)
    scale = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in _groups(model, settings) for p in group["params"]
    }
    assert len(scale) == sum(1 for _ in model.parameters())
    encoder = model.backbone.model
    assert scale[id(model.head.weight)] == (1.0, 0.1)
    assert scale[id(model.head.bias)] == (1.0, 0.0)
    assert scale[id(encoder.blocks[2].mlp.fc1.weight)] == (0.5, 0.1)
    assert scale[id(encoder.blocks[0].norm1.weight)] == (0.125, 0.0)
    assert scale[id(encoder.patch_embed.proj.weight)] == (0.0625, 0.1)
    assert scale[id(encoder.cls_token)] == (0.0625, 0.0)
    paths = [block.drop_path1 for block in encoder.blocks]
    assert not isinstance(paths[0], DropPath)
    assert [path.drop_prob for path in paths[1:]] == pytest.approx([0.1, 0.2])


# epochs, batch, base rate, layer decay, drop path, weight decay, mixup, cutmix, erasing, RandAugment, frozen share:
# from finetune_1p and finetune_10p of ml-jku/MIM-Refiner and from amazon-science/semi-vit's FINETUNE.md (ViT-B)
PUBLISHED = {
    ("vit_b", 0.01): (100, 512, 5e-5, 0.65, 0.0, 0.05, 0.0, 0.0, 0.0, True, 0.0),
    ("vit_b", 0.1): (100, 512, 2.5e-4, 0.65, 0.1, 0.05, 0.8, 1.0, 0.25, True, 0.0),
    ("vit_l", 0.01): (50, 512, 3e-5, 0.75, 0.0, 0.05, 0.0, 0.0, 0.0, False, 0.0),
    ("vit_l", 0.1): (50, 512, 3e-5, 0.75, 0.0, 0.05, 0.0, 0.0, 0.0, True, 0.0),
    ("vit_h", 0.01): (50, 512, 3e-5, 0.75, 0.0, 0.4, 0.0, 0.0, 0.0, False, 0.0),
    ("vit_h", 0.1): (50, 256, 1e-3, 0.75, 0.2, 0.05, 0.8, 1.0, 0.25, True, 0.0),
    ("vit_2b", 0.01): (50, 512, 3e-5, 0.75, 0.0, 0.4, 0.0, 0.0, 0.0, False, 0.0),
    ("vit_2b", 0.1): (50, 256, 1e-3, 0.75, 0.2, 0.05, 0.8, 1.0, 0.25, True, 0.25),
}


@pytest.mark.parametrize(("row", "share"), PUBLISHED)
def test_few_labels_are_fine_tuned_as_published(row, share):
    found, name = published(FinetuneSettings(recipe=row), share, 0, ())
    values = (found.epochs, found.batch_size, found.lr, found.layer_decay, found.drop_path, found.weight_decay,
              found.mixup, found.cutmix, found.erasing, bool(found.randaugment), found.frozen_share)  # fmt: skip
    assert values == PUBLISHED[row, share]
    assert (found.warmup_epochs, found.label_smoothing) == (5.0, 0.1)
    assert name == f"{row} {100 * share:g} %"


def test_the_row_is_that_of_the_encoders_size_and_what_is_set_stays():
    settings = FinetuneSettings(recipe="published")
    rows = {768: "vit_b", 1024: "vit_l", 1152: "vit_l", 1280: "vit_h", 1408: "vit_h", 2560: "vit_2b"}
    for width, row in rows.items():
        assert published(settings, 0.01, width, ())[1] == f"{row} 1 %"
    changed = EvaluationSettings.from_overrides(["finetune.recipe=published", "finetune.epochs=50", "finetune.lr=1e-3"])
    given = changed.given("finetune")
    found, _ = published(changed.finetune, 0.01, 768, given)
    assert (found.epochs, found.lr, found.layer_decay) == (50, 1e-3, 0.65)
    assert published(settings, 1.0, 768, ()) == (settings, "mae")
    assert published(FinetuneSettings(), 0.01, 768, ()) == (FinetuneSettings(), "mae")


def test_a_share_of_the_blocks_stays_as_it_is(make_backbone, make_images):
    settings = FinetuneSettings(epochs=1, batch_size=10, lr=1e-2, frozen_share=0.7, warmup_epochs=0, workers=0)
    backbone = make_backbone()
    model = Classifier(backbone, 3, "cls", 0.5, settings.frozen_share)
    _train(model, rows_of(make_images(24)), settings, 32, Run(seed=1))
    before = backbone.model.state_dict()
    moved = {name for name, value in model.backbone.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("blocks")} == {"2"}
    assert not {name for name in moved if name.startswith(("patch_embed", "pos_embed", "cls_token"))}
    assert any(name.startswith("norm") for name in moved)
    model.train()
    assert not model.backbone.model.blocks[1].training
    assert model.backbone.model.blocks[2].training


def test_shares_are_stratified_and_nested(make_images):
    rows = rows_of(make_images(60))
    tenth, half = share_of(rows, 0.1, 0), share_of(rows, 0.5, 0)
    assert np.bincount(tenth.labels).tolist() == [2, 2, 2]
    assert np.bincount(half.labels).tolist() == [10, 10, 10]
    assert set(tenth.rows) <= set(half.rows)
    assert np.bincount(share_of(rows, 0.001, 0).labels).tolist() == [1, 1, 1]
    assert share_of(rows, 1.0, 0) is rows


def test_a_long_tail_falls_exponentially():
    labels = np.repeat(np.arange(5), 100)
    chosen = imbalanced_subset(labels, imbalance=100, seed=1)
    sizes = np.sort(np.bincount(labels[chosen]))[::-1].tolist()
    assert sizes == [100, 32, 10, 3, 1]
    assert len(set(chosen)) == len(chosen)
    assert not np.array_equal(chosen, imbalanced_subset(labels, imbalance=100, seed=2))
    assert np.array_equal(imbalanced_subset(labels, imbalance=1), np.arange(500))
    assert np.bincount(labels[imbalanced_subset(labels, imbalance=1, largest=7)]).tolist() == [7] * 5


def test_groups_follow_the_training_counts():
    train, test = np.repeat([0, 1, 2], [150, 50, 5]), np.array([0, 0, 1, 2, 3])
    groups = class_groups(train, test, LongTailSettings())
    assert groups["many"].tolist() == [True, True, False, False, False]
    assert groups["medium"].tolist() == [False, False, True, False, False]
    assert groups["few"].tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("kind", list(CORRUPTIONS))
def test_corruptions_grow_and_depend_on_the_image_alone(kind):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 6, 6, generator=generator), size=32, mode="bilinear")
    images = (smooth * 200 + 20 + 30 * torch.rand(4, 3, 32, 32, generator=generator)).clamp(0, 255).to(torch.uint8)
    rows = torch.arange(4)
    errors = []
    for severity in range(1, 6):
        result = corrupt(images, rows, kind, severity, seed=0)
        assert (result.dtype, result.shape) == (torch.uint8, images.shape)
        errors.append(float((result.float() - images.float()).pow(2).mean()))
    assert errors[0] > 1
    assert errors[4] > errors[0]
    assert all(later >= 0.7 * earlier for earlier, later in itertools.pairwise(errors))
    alone = corrupt(images[2:3], rows[2:3], kind, 3, seed=0)
    assert (alone.int() - corrupt(images, rows, kind, 3, seed=0)[2:3].int()).abs().max() <= 1
