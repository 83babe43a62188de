"""The verbs from Python, with objects in place of paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from mim_refiner import embed, evaluate, export, load_backbone, pretrain, report
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.settings import as_list, setting_texts

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


def test_names_and_settings_are_taken_as_python_writes_them(backbone):
    how = {"model": backbone, "data": (PIXELS, LABELS), "cache": "off", "device": "cpu"}
    listed = evaluate(**how, protocols=["knn"], pooling=["cls"], settings=["knn_k=3", "test_share=0.25"])
    for settings in ({"knn_k": 3, "test_share": 0.25}, ["knn_k=3", "test_share=0.25"]):
        assert evaluate(**how, protocols="knn", pooling="cls", settings=settings)["results"] == listed["results"]
    assert setting_texts({"heads": {"blocks": [2, -1]}, "guidance": "none", "out": None}) == [
        "heads.blocks=[2, -1]", 'guidance="none"', "out=null",
    ]  # fmt: skip
    assert [as_list(given) for given in ("knn, linear", ("knn",), "knn")] == [["knn", "linear"], ("knn",), ["knn"]]
    arrays = {"low_shot.shots": np.array([1, 2]), "cluster_seeds": np.int64(3), "knn_temperature": torch.tensor(0.5)}
    assert setting_texts(arrays) == ["low_shot.shots=[1, 2]", "cluster_seeds=3", "knn_temperature=0.5"]
    for runs in ("runs/none", Path("runs/none"), [Path("runs/none")]):
        with pytest.raises(InputError, match="runs/none: no such run folder"):
            report(runs=runs)


def test_a_backbone_in_memory_is_exported(backbone, tmp_path):
    changed = load_backbone(backbone)
    torch.nn.init.zeros_(changed.model.norm.weight)
    export(model=changed, format="timm", out=str(tmp_path / "out"))
    assert not load_backbone(tmp_path / "out").model.norm.weight.any()


def odd_pictures(picture):
    """As phones and drawing programs make them: lying, see-through, of a palette with a hole, of 16 bits, of inks."""
    lying, hole = picture.copy(), picture.quantize(8)
    lying.getexif()[0x0112] = 6
    hole.info["transparency"] = 3
    glass = picture.copy()
    glass.putalpha(picture.convert("L"))
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    return [lying, glass, hole, deep, picture.convert("CMYK")]


def test_what_the_transform_gives_has_the_features_that_embed_gives(backbone):
    pictures = [Image.fromarray(pixels).resize((40 + row, 23)) for row, pixels in enumerate(PIXELS)]
    pictures[1] = pictures[1].convert("L")
    pictures[2:7] = odd_pictures(pictures[2])
    large = load_backbone(backbone)
    large.set_image_size((80, 80))  # above 64 px the centre is cut out
    for encoder in (backbone, large):
        images = torch.stack([encoder.transform(picture) for picture in pictures])
        with torch.no_grad():
            features = encoder.eval().forward_blocks(images, [-1])[0].cls
        written = embed(model=encoder, data=pictures, device="cpu")["features"]
        np.testing.assert_allclose(features.numpy(), written, atol=2e-3)
    with pytest.raises(InputError, match=r"images are torch.uint8; normalise them, for example by backbone.transform"):
        backbone.forward_blocks(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match="the picture holds float values; convert it to uint8 or uint16"):
        backbone.transform(Image.new("F", (20, 20), 0.5))


def test_a_run_records_what_it_was_given(tmp_path, backbone):
    settings = ["training.epochs=1", "batch_size=8", "decoder_dim=16", "decoder_depth=1", "decoder_heads=2"]
    pretrain(data=list(PIXELS), model=backbone, out=str(tmp_path / "run"), settings=settings, device="cpu")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["data"] == "list in memory"
    assert recipe["data_images"] == 24
    again = pretrain(data=list(PIXELS), model=backbone, out=str(tmp_path / "run"), settings=settings, device="cpu")
    assert again["export"] == str(tmp_path / "run" / "export")


def test_a_wrong_model_is_one_line():
    with pytest.raises(InputError, match="model is of type int; give a path, a model name, a timm module"):
        load_backbone(3)
    with pytest.raises(InputError, match="use a timm ViT instead"):
        load_backbone(torch.nn.Linear(2, 2))
