"""The format of the published MIM-Refiner checkpoints: written, it equals the published files to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.errors import InputError
from mim_refiner.export.refiner import REFINER
from mim_refiner.export.writing import write_export
from mim_refiner.models.backbone import Backbone, create_vit

HEADS = {"prenorm_d64": 4, "postnorm_d64": 4}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_published_files_survive_import_and_export_bit_by_bit(shared_dir: Path, tmp_path: Path, name: str) -> None:
    source = shared_dir / "golden" / "hub" / f"{name}.th"
    backbone = load_backbone(source, num_heads=HEADS[name])
    report = write_export(REFINER, backbone, tmp_path / "out", facts={"block": -1, "pooling": "cls", "norm": False})
    assert report["max_abs_difference"] == 0
    published = torch.load(source, weights_only=True)["state_dict"]
    written = torch.load(tmp_path / "out" / "model.th", weights_only=True)["state_dict"]
    assert written.keys() == published.keys()
    assert all(torch.equal(written[key], published[key]) for key in written)
    again = load_backbone(tmp_path / "out")
    golden = load_file(source.with_name(f"{name}_io.safetensors"))
    images = golden["32x32/images"]
    with torch.inference_mode():
        for block, output in enumerate(again.forward_blocks(images)):
            expected = golden[f"32x32/block{block}"]
            torch.testing.assert_close(output.patches, expected[:, 1:], rtol=0, atol=1e-5)
            torch.testing.assert_close(output.cls, expected[:, 0], rtol=0, atol=1e-5)


def make(**arguments: Any) -> Backbone:
    model = create_vit("vit_w32_d3_h4_p8", 32, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model.eval(), family="mae", licence="CC-BY-NC-4.0")


def test_a_refined_mae_in_the_published_format_and_its_snippet(tmp_path: Path) -> None:
    backbone = make()
    facts = {"block": 1, "pooling": "cls", "norm": False}
    assert write_export(REFINER, backbone, tmp_path / "out", facts=facts)["max_abs_difference"] <= 1e-6
    state = torch.load(tmp_path / "out" / "model.th", weights_only=True)["state_dict"]
    assert state["pos_embed.embed"].shape == (1, 4, 4, 32)
    assert torch.equal(state["cls_tokens.tokens"], backbone.model.cls_token + backbone.model.pos_embed[:, :1])
    text = (tmp_path / "out" / "README.md").read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    names: dict[str, Any] = {}
    exec(match[1].replace("PATH_OF_THIS_FOLDER", str(tmp_path / "out")), names)
    [output] = backbone.forward_blocks(names["images"], [1])
    torch.testing.assert_close(names["features"], output.cls, rtol=0, atol=1e-6)
    assert names["state_dict"].keys() == state.keys()
    again = load_backbone(tmp_path / "out")
    assert (again.info.family, again.info.licence, again.info.num_heads) == ("mae", "CC-BY-NC-4.0", 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"init_values": 0.1},
        {"final_norm": False},
    ],
)
def test_encoders_that_the_format_cannot_hold(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--format refiner"):
        write_export(REFINER, make(**arguments), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
