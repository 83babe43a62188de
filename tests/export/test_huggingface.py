"""Transformers folders: AutoModel gives the encoder's tokens, and reading the folder back gives its weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import InputError
from mim_refiner.export.huggingface import HUGGING_FACE, architecture
from mim_refiner.export.writing import write_export
from mim_refiner.models.backbone import Backbone, create_vit

transformers = pytest.importorskip("transformers")

VARIANTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "ijepa": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "dinov2": {"init_values": 0.1},
    "dinov2_with_registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
}


def shaken(model: Any, **facts: Any) -> Backbone:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model.eval(), licence="CC-BY-NC-4.0", **facts)


def make(image_size: int | tuple[int, int] = 32, family: str = "mae", **arguments: Any) -> Backbone:
    return shaken(create_vit("vit_w32_d3_h4_p8", image_size, **arguments), family=family, mean=(0.5, 0.4, 0.3))


def auto_model(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def check(backbone: Backbone, folder: Path) -> None:
    """AutoModel's tokens after every block and after the norm are the encoder's, on images of the test's own."""
    images = torch.randn(2, backbone.info.in_chans, *backbone.info.image_size)
    with torch.inference_mode():
        output = auto_model(folder)(images, output_hidden_states=True)
        prefix = backbone.info.num_prefix_tokens
        for number, expected in enumerate(backbone.forward_blocks(images)):
            tokens = output.hidden_states[number + 1]
            torch.testing.assert_close(tokens[:, prefix:], expected.patches, rtol=0, atol=1e-5)
            if expected.cls is not None:
                torch.testing.assert_close(tokens[:, 0], expected.cls, rtol=0, atol=1e-5)
        [final] = backbone.forward_blocks(images, [-1], norm=True)
        torch.testing.assert_close(output.last_hidden_state[:, prefix:], final.patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(VARIANTS))
def test_auto_model_gives_the_same_tokens_and_the_weights_come_back(tmp_path: Path, kind: str) -> None:
    backbone = make(**VARIANTS[kind])
    report = write_export(HUGGING_FACE, backbone, tmp_path / "out")
    assert report["max_abs_difference"] <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    check(backbone, tmp_path / "out")
    again = load_backbone(tmp_path / "out")
    assert (again.info.family, again.info.licence, again.info.mean) == ("mae", "CC-BY-NC-4.0", (0.5, 0.4, 0.3))
    write_export(HUGGING_FACE, again, tmp_path / "again")
    third = load_backbone(tmp_path / "again")
    for model in (again, third):
        images = torch.randn(2, 3, 32, 32)
        for ours, theirs in zip(backbone.forward_blocks(images), model.forward_blocks(images), strict=True):
            torch.testing.assert_close(ours.patches, theirs.patches, rtol=0, atol=1e-6)
    states = [model.model.state_dict() for model in (backbone, again, third)]
    for name, tensor in states[1].items():
        assert torch.equal(tensor, states[2][name]), name
        if name in states[0] and states[0][name].shape == tensor.shape:
            assert torch.equal(tensor, states[0][name]), name
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"no_embed_class": True},
        {"reg_tokens": 2},  # the table has entries for the registers
        {"in_chans": 1, "qkv_bias": False, "mlp_ratio": 2},
    ],
)
def test_variants_that_are_rewritten(tmp_path: Path, arguments: dict[str, Any]) -> None:
    backbone = make(**arguments)
    if "in_chans" in arguments:
        backbone = Backbone.wrap(backbone.model)
    write_export(HUGGING_FACE, backbone, tmp_path / "out")
    check(backbone, tmp_path / "out")


def test_an_image_that_is_no_square(tmp_path: Path) -> None:
    backbone = make((32, 48))
    write_export(HUGGING_FACE, backbone, tmp_path / "out")
    check(backbone, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "family", "kind"),
    [
        ({"use_rel_pos_bias": True, "init_values": 0.1}, "beit", "beit"),
        ({"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}, "hf_beit", "beit"),
        ({"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": None}, "beit", "beit"),
        ({"global_pool": "token", "init_values": 0.1}, "hf_data2vec_vision", "data2vec-vision"),
    ],
)
def test_beit(tmp_path: Path, arguments: dict[str, Any], family: str, kind: str) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("beit_base_patch16_224", **options, **arguments)
    backbone = shaken(model, family=family)
    write_export(HUGGING_FACE, backbone, tmp_path / "out")
    assert architecture(backbone) == kind
    check(backbone, tmp_path / "out")
    again = load_backbone(tmp_path / "out")
    write_export(HUGGING_FACE, again, tmp_path / "again")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert written[0] == written[1]


def test_the_pooler_is_the_class_token_and_not_random(tmp_path: Path) -> None:
    write_export(HUGGING_FACE, make(), tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        output = auto_model(tmp_path / "out")(images)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_the_image_processor_is_our_transform(tmp_path: Path) -> None:
    import numpy as np

    from mim_refiner.data.loaders import resize_center_crop
    from mim_refiner.data.photometric import normalize

    write_export(HUGGING_FACE, make(), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    theirs = processor(pixels, return_tensors="pt")["pixel_values"]
    ours = torch.from_numpy(resize_center_crop(pixels, 32, 1.0).copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(theirs, normalize(ours, (0.5, 0.4, 0.3), (0.229, 0.224, 0.225)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("facts", "arguments"),
    [
        ({"block": -1, "pooling": "cls", "norm": True}, {}),
        ({"block": 1, "pooling": "mean", "norm": True}, {}),
        ({"block": -2, "pooling": "mean", "norm": False}, VARIANTS["ijepa"]),
    ],
)
def test_the_snippet_gives_the_recommended_features(
    tmp_path: Path, facts: dict[str, Any], arguments: dict[str, Any]
) -> None:
    backbone = make(**arguments)
    write_export(HUGGING_FACE, backbone, tmp_path / "out", facts=facts)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    names: dict[str, Any] = {}
    exec(match[1].replace("PATH_OF_THIS_FOLDER", str(tmp_path / "out")), names)
    [output] = backbone.forward_blocks(names["images"], [facts["block"]], norm=facts["norm"])
    torch.testing.assert_close(names["features"], output.pooled(facts["pooling"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"final_norm": False}, "has no final norm"),
        ({"pre_norm": True}, "normalises its tokens before block 0"),
        ({"qk_norm": True}, "normalises queries and keys"),
        ({"class_token": False, "reg_tokens": 1, "global_pool": "avg", "fc_norm": False}, "registers and no class"),
    ],
)
def test_what_transformers_cannot_express_is_refused(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=f"{match}.*use --format timm or onnx"):
        write_export(HUGGING_FACE, make(**arguments), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    backbone = Backbone.wrap(timm.create_model("eva02_tiny_patch14_224", num_classes=0, img_size=56, depth=1))
    with pytest.raises(InputError, match="is a Eva, which no transformers model computes"):
        write_export(HUGGING_FACE, backbone, tmp_path / "out")
    relu = make()
    relu.model.blocks[1].mlp.act = torch.nn.ReLU()
    with pytest.raises(InputError, match="ReLU"):
        write_export(HUGGING_FACE, relu, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
