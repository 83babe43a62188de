"""transformers' own models at several sizes: equal outputs at two resolutions, and back to their names bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.checkpoints.families import hf
from mim_refiner.checkpoints.load import inspect_checkpoint, load_backbone

transformers = pytest.importorskip("transformers")
SHARED, OWN = {"use_shared_relative_position_bias": True}, {"use_relative_position_bias": True}
ABSOLUTE = {"use_absolute_position_embeddings": True, "use_mean_pooling": False}

# model, family, width, heads, patch, image size, further settings
CASES = [
    ("Beit", "BeitModel", "hf_beit", 48, 3, 16, (48, 48), OWN),
    ("Beit", "BeitModel", "hf_beit", 24, 2, 8, (64, 32), SHARED | {"use_mean_pooling": False}),
    ("Beit", "BeitModel", "hf_beit", 24, 2, 8, (32, 32), OWN | {"layer_scale_init_value": 0.0}),
    ("Beit", "BeitForMaskedImageModeling", "hf_beit", 48, 4, 8, (40, 40), SHARED | {"use_mask_token": True}),
    ("Beit", "BeitForImageClassification", "hf_beit", 40, 5, 8, (24, 24), ABSOLUTE),
    ("Data2VecVision", "Data2VecVisionModel", "hf_data2vec_vision", 48, 6, 8, (32, 32), ABSOLUTE),
    ("Data2VecVision", "Data2VecVisionForImageClassification", "hf_data2vec_vision", 24, 2, 16, (64, 32), OWN),
    ("IJepa", "IJepaModel", "hf_ijepa", 48, 6, 16, (64, 64), {}),
    ("IJepa", "IJepaModel", "hf_ijepa", 24, 2, 4, (32, 16), {"layer_norm_eps": 1e-3}),
    ("ViTMAE", "ViTMAEModel", "hf_vitmae", 64, 8, 4, (16, 16), {"mask_ratio": 0.0, "num_channels": 4}),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def tokens(backbone: Any, images: Tensor) -> list[Tensor]:
    outputs = backbone.forward_blocks(images)
    return [o.patches if o.cls is None else torch.cat([o.cls[:, None], o.patches], dim=1) for o in outputs]


def hidden(model: Any, images: Tensor, patch: int, **kwargs: Any) -> list[Tensor]:
    if type(model).__name__ == "ViTMAEModel":  # an order of the patches that shuffles nothing
        count = images.shape[2] * images.shape[3] // patch**2
        kwargs["noise"] = torch.arange(count).expand(len(images), -1).float()
    return list(model(images, output_hidden_states=True, **kwargs).hidden_states[1:])


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("config", "kind", "family", "width", "heads", "patch", "size", "settings"), CASES)
def test_every_block_and_back(
    tmp_path: Path,
    config: str,
    kind: str,
    family: str,
    width: int,
    heads: int,
    patch: int,
    size: tuple[int, int],
    settings: dict[str, Any],
) -> None:
    image_size = size[0] if size[0] == size[1] else list(size)
    made = getattr(transformers, f"{config}Config")(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=2,
        intermediate_size=2 * width,
        patch_size=patch,
        image_size=image_size,
        **settings,
    )
    model = getattr(transformers, kind)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "hf")
    backbone = load_backbone(tmp_path / "hf")
    info = backbone.info
    assert (info.family, info.coverage, info.num_heads, info.image_size) == (family, 1.0, heads, size)
    with torch.no_grad():
        images = torch.randn(2, info.in_chans, *size)
        for got, wanted in zip(tokens(backbone, images), hidden(model, images, patch), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        # transformers resizes absolute tables of square images only
        if (
            "use_absolute_position_embeddings" not in settings
            or math.isqrt(size[0] * size[1]) ** 2 == size[0] * size[1]
        ):
            other = torch.randn(2, info.in_chans, patch * 6, patch * 2)
            resized = load_backbone(tmp_path / "hf", image_size=(patch * 6, patch * 2))
            if config != "IJepa" or size[0] == size[1]:
                wanted = hidden(model, other, patch, interpolate_pos_encoding=True)
                for loaded in (backbone, resized):
                    for got, expected in zip(tokens(loaded, other), wanted, strict=True):
                        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # what transformers writes, and the names it has in memory, mean the same
    square = size[0] == size[1]
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    again = load_backbone(tmp_path / "memory.pth", num_heads=heads, image_size=None if square else size)
    assert same_tensors(again.model.state_dict(), backbone.model.state_dict())
    written = load_file(tmp_path / "hf" / "model.safetensors")
    keys = hf.VIT_KEYS if family in ("hf_ijepa", "hf_vitmae") else hf.BEIT_KEYS
    back = keys.from_timm(backbone.model.state_dict())
    prefix = next(iter(written)).split(".")[0] + "." if config.lower() in next(iter(written)) else ""
    for name, tensor in back.items():
        place = next(start + name for start in (prefix, "beit.", "data2vec_vision.", "") if start + name in written)
        assert torch.equal(written[place], tensor)


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_mean_and_std_of_the_preprocessor(tmp_path: Path) -> None:
    made = transformers.IJepaConfig(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, patch_size=8, image_size=16
    )
    transformers.IJepaModel(made).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    report = inspect_checkpoint(tmp_path)
    assert (report.mean, report.std, report.norm_eps) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1e-12)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("kind", ["VitPoseBackbone", "ViTMSN"])
def test_other_vits_of_masked_pretraining(tmp_path: Path, kind: str) -> None:
    size, name = ((64, 48), "VitPoseBackbone") if kind == "VitPoseBackbone" else ((64, 64), "ViTMSNModel")
    made = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=48, patch_size=16,
        image_size=list(size), layer_norm_eps=1e-4,
    )  # fmt: skip
    model = getattr(transformers, name)(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    backbone, images = load_backbone(tmp_path), torch.randn(2, 3, *size)
    assert (backbone.info.coverage, backbone.info.num_heads, backbone.info.image_size) == (1.0, 3, size)
    with torch.no_grad():
        for got, wanted in zip(tokens(backbone, images), hidden(model, images, 16), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_dinov2_with_swiglu(tmp_path: Path) -> None:
    """The giant DINOv2's MLP."""
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7, use_swiglu_ffn=True
    )
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "folder")
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected, got = hidden(model, images, 7), tokens(load_backbone(tmp_path / "folder"), images)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
