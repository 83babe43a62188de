"""The verbs from Python, with objects in place of paths."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import yaml

from mim_refiner import embed, evaluate, load_backbone, pretrain
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(24) % 2


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16))


def test_embed_returns_what_it_would_write(backbone, tmp_path):
    found = embed(model=backbone, data=(PIXELS, LABELS), batch_size=8, device="cpu")
    written = embed(model=backbone, data=(PIXELS, LABELS), out=str(tmp_path / "f.npy"), batch_size=8, device="cpu")
    assert np.array_equal(found["features"], np.load(tmp_path / "f.npy"))
    assert found["features"].shape == tuple(written["shape"]) == (24, 32)
    assert np.array_equal(found["indices"], np.arange(24))
    assert np.array_equal(found["labels"], LABELS)
    assert (found["block"], found["pooling"]) == (1, "cls")
    assert embed(model=backbone, data=PIXELS, device="cpu")["labels"] is None


def test_a_timm_module_loses_its_classifier_and_stays_as_it_is(backbone):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model.train()
    ours = load_backbone(model)
    assert ours.info.mean == tuple(model.pretrained_cfg["mean"])
    assert model.training
    assert model.num_classes == 1000
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval().forward_features(images)[:, 0]
        assert torch.equal(ours.forward_blocks(images, [-1], norm=True)[0].cls, expected)
    copied = load_backbone(backbone)
    assert copied is not backbone
    assert copied.info == backbone.info


def test_two_modules_are_compared(backbone):
    other = load_backbone(backbone)
    torch.nn.init.normal_(other.model.blocks[0].attn.qkv.weight)
    found = evaluate(
        model=backbone.model,
        compare=[other.model],
        data=(PIXELS, LABELS),
        protocols=("knn",),
        cache="off",
        device="cpu",
    )
    assert {row["model"] for row in found["results"]} == {
        "VisionTransformer in memory",
        "VisionTransformer in memory 1",
    }


def test_a_run_records_what_it_was_given(tmp_path, backbone):
    settings = ["training.epochs=1", "batch_size=8", "decoder_dim=16", "decoder_depth=1", "decoder_heads=2"]
    pretrain(data=list(PIXELS), model=backbone, out=str(tmp_path / "run"), settings=settings, device="cpu")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["data"] == "list in memory"
    assert recipe["data_images"] == 24
    again = pretrain(data=list(PIXELS), model=backbone, out=str(tmp_path / "run"), settings=settings, device="cpu")
    assert again["export"] == str(tmp_path / "run" / "export")


def test_a_wrong_model_is_one_line():
    with pytest.raises(InputError, match="model is a int; give a path, a model name, a timm module or a Backbone"):
        load_backbone(3)
    with pytest.raises(InputError, match="use a timm ViT instead"):
        load_backbone(torch.nn.Linear(2, 2))
