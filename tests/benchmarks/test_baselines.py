"""``benchmarks/baselines.py``: every formula against a slow loop, and both baselines from images to numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.source_objects import ObjectSource
from mim_refiner.evaluation.features import Features
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import refine_recipe
from mim_refiner.training.resolve import resolve

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import baselines

    return baselines


@pytest.fixture
def encoder() -> Backbone:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return Backbone.wrap(
        VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=0)
    )


@pytest.fixture
def photos() -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    pixels = rng.integers(0, 100, (24, 16, 16, 3)) + 120 * labels[:, None, None, None]
    return ImageSet(ObjectSource(pixels.astype(np.uint8), labels.tolist()))


def softmax(values: Tensor) -> list[float]:
    exponentials = [math.exp(float(value)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_diet_loss_spreads_the_smoothing_over_all_images(baselines: Any) -> None:
    torch.manual_seed(1)
    logits, ids, smoothing = torch.randn(3, 5), torch.tensor([4, 0, 2]), 0.8
    total = 0.0
    for row, own in zip(logits, ids.tolist(), strict=True):
        chances = softmax(row)
        for image, chance in enumerate(chances):
            wanted = smoothing / 5 + (1 - smoothing) * (image == own)
            total -= wanted * math.log(chance)
    assert float(baselines.diet_loss(logits, ids, smoothing)) == pytest.approx(total / 3, rel=1e-5)


def test_uniform_loss_is_the_divergence_of_the_uniform_distribution(baselines: Any) -> None:
    torch.manual_seed(2)
    latents = torch.randn(2, 7)
    for row, found in zip(latents, baselines.uniform_loss(latents), strict=True):
        slow = sum((1 / 7) * math.log((1 / 7) / chance) for chance in softmax(row))
        assert float(found) == pytest.approx(slow, rel=1e-5)


def test_dino_loss_sums_over_all_pairs_of_views(baselines: Any) -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 2, 6)
    for image, found in enumerate(baselines.dino_loss(student, teacher, 0.1, 0.07)):
        slow = 0.0
        for target in teacher[image]:
            for view in student[image]:
                chances = softmax(view / 0.1)
                slow -= sum(t * math.log(c) for t, c in zip(softmax(target / 0.07), chances, strict=True))
        assert float(found) == pytest.approx(slow, rel=1e-4)


def test_contrastive_loss_holds_each_patch_against_its_siblings(baselines: Any) -> None:
    torch.manual_seed(4)
    latents, negatives = torch.randn(2, 3, 5), torch.randn(4, 5)
    for image, found in zip(latents, baselines.contrastive_loss(latents, negatives, 0.5), strict=True):
        slow = 0.0
        for number, patch in enumerate(image):
            siblings = [other for place, other in enumerate(image) if place != number]
            everyone = [cosine(patch, other) / 0.5 for other in [*siblings, *negatives]]
            alike = [cosine(patch, other) / 0.5 for other in siblings]
            slow += math.log(sum(math.exp(value) for value in everyone)) - sum(alike) / len(alike)
        assert float(found) == pytest.approx(slow / 3, rel=1e-5)


def test_patches_are_windows_of_half_the_side(baselines: Any) -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    patches = baselines.quarter_patches(images, 0.5)
    assert patches.shape == (2, 9, 3, 8, 8)
    window = images[1:, :, 2:6, 4:8]  # second row, third column
    whole = torch.nn.functional.interpolate(window, 8, mode="bicubic", antialias=True)
    torch.testing.assert_close(patches[1, 5], whole[0])


def test_gradients_of_a_batch_are_those_of_each_image_alone(
    baselines: Any, encoder: Backbone, photos: ImageSet
) -> None:
    settings = baselines.FungiSettings(local_views=2, negatives=3, widths=(5, 6, 4))
    fungi = baselines.Fungi(encoder, photos, settings, Run(seed=5))
    views = torch.randn(3, 4, 3, 16, 16)
    layer = encoder.model.blocks[-1].attn.proj

    def loss(x: Tensor) -> Tensor:
        return baselines.contrastive_loss(fungi.heads["contrastive"](x), fungi.negatives, 0.07)

    encoder.eval()
    found = fungi.gradients(views, loss)
    assert not layer._forward_hooks
    layer.requires_grad_(True)
    for number, image in enumerate(views):
        embedded = torch.stack([encoder.forward_blocks(view[None], (-1,), norm=True)[0].cls[0] for view in image])
        weight, bias = torch.autograd.grad(loss(embedded[None]).sum(), [layer.weight, layer.bias])
        alone = torch.cat([weight, bias[:, None]], dim=1).flatten()
        torch.testing.assert_close(found[number], alone, rtol=1e-4, atol=1e-6)


def test_fungi_puts_embedding_and_projected_gradients_side_by_side(
    baselines: Any, encoder: Backbone, photos: ImageSet
) -> None:
    settings = baselines.FungiSettings(local_views=2, negatives=3, widths=(5, 6, 4), batch_size=5)
    fungi = baselines.Fungi(encoder, photos, settings, Run(seed=5))
    assert set(fungi.projection.unique().tolist()) == {-1.0, 1.0}
    features = fungi.features(photos)
    [found] = features.values.values()
    assert found.shape == (24, 4 * 12)
    torch.testing.assert_close(found.unflatten(1, (4, 12)).norm(dim=2), torch.ones(24, 4))
    assert features.labels is not None
    assert features.labels.tolist() == photos.labels.tolist()
    again = baselines.Fungi(encoder, photos, settings, Run(seed=5)).features(photos)
    assert torch.equal(again[-1, "cls"], found)
    other = baselines.Fungi(encoder, photos, settings, Run(seed=6)).features(photos)[-1, "cls"]
    assert torch.equal(other[:, :12], found[:, :12])  # the embedding knows no seed
    assert not torch.allclose(other[:, 12:], found[:, 12:], atol=0.1)
    alone = dataclasses.replace(settings, losses=())
    control = baselines.Fungi(encoder, photos, alone, Run(seed=5)).features(photos)
    torch.testing.assert_close(control[-1, "cls"], found[:, :12])
    correct = baselines.fungi_correct(encoder, photos, photos, ["knn", "linear"], settings, Run(seed=5))
    assert set(correct) == {"knn_top1 cls", "linear_top1 cls", "linear_top1_best cls"}
    assert correct["knn_top1 cls"].mean() == 1  # bright and dark images


@pytest.mark.parametrize("losses", [(), ("uniform",), ("dino", "contrastive"), ("uniform", "dino", "contrastive")])
@pytest.mark.parametrize("stride", [0.5, 0.25])
def test_cost_of_fungi_counts_the_images_that_pass(
    baselines: Any, encoder: Backbone, photos: ImageSet, monkeypatch: pytest.MonkeyPatch, losses: Any, stride: float
) -> None:
    settings = baselines.FungiSettings(local_views=3, negatives=3, widths=(5, 6, 4), stride=stride, losses=losses)
    fungi, passed = baselines.Fungi(encoder, photos, settings, Run(seed=5)), []
    encoder.model.blocks[0].register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    fungi.of_batch(torch.randn(1, 3, 16, 16), torch.randn(1, 5, 3, 16, 16))
    count = sum(passed)
    monkeypatch.setattr(baselines, "load_backbone", lambda _: encoder)
    one = baselines.flops_of_fungi("", dataclasses.replace(settings, losses=()))
    assert one > 0
    assert baselines.flops_of_fungi("", settings) == one * count


def test_reduced_keeps_the_principal_axes_of_the_bank(baselines: Any) -> None:
    rng = np.random.default_rng(7)
    bank, test = rng.normal(size=(20, 6)) * [5, 4, 3, 1, 1, 1], rng.normal(size=(4, 6))
    rows = {"labels": None, "depth": 1}
    sets = [Features({(0, "cls"): torch.from_numpy(x)}, indices=torch.arange(len(x)), **rows) for x in (bank, test)]
    found = [part[0, "cls"].numpy() for part in baselines.reduced(*sets, 3)]
    values, vectors = np.linalg.eigh(np.cov(bank.T))
    axes = vectors[:, np.argsort(values)[::-1][:3]]
    for x, part in zip((bank, test), found, strict=True):
        np.testing.assert_allclose(np.abs(part), np.abs((x - bank.mean(0)) @ axes), atol=1e-10)


def test_diet_learns_which_image_is_which(baselines: Any, encoder: Backbone, photos: ImageSet) -> None:
    changes = ["batch_size=8", "heads.blocks=[1]", "views.local_size=8", "heads.queue_size=16", "frozen_blocks=1",
               "refinement.top_k=1"]  # fmt: skip
    recipe = resolve(override(refine_recipe("tiny", image_size=16), changes), encoder)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    seen: list[float] = []

    class Listener:
        def phase(self, name: str, total: int) -> None:
            assert (name, total) == ("DIET", 60)

        def progress(self, step: int, metrics: dict[str, float]) -> None:
            seen.extend(metrics.values())

    settings = baselines.DietSettings(label_smoothing=0.1, lr=0.3)
    baselines.train_diet(encoder, photos, recipe, 20, settings, Run(seed=1, reporter=Listener()))  # type: ignore[arg-type]
    moved = {name for name, value in encoder.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("blocks.1") for name in moved)
    assert not any(name.startswith(("blocks.0", "patch_embed", "pos_embed")) for name in moved)
    assert seen[-1] < seen[0]
    assert seen[0] == pytest.approx(math.log(24), rel=0.2)
