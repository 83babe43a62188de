"""The model card: says what it must, and its usage snippet runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit

CARD = {
    "base": "mae_pretrain.pth",
    "data": "CIFAR-10 train | 50000 images",
    "recipe": {"epochs": 10, "heads": {"temperature": 0.2, "queue": None}},
    "command": "mim-refiner refine --data x --model y --out z",
    "before": {"knn_top1": 0.5, "rank": 10.25},
    "after": {"knn_top1": 0.75, "rank": 20.5, "nmi": 0.3},
    "notes": "Made for a test.",
}


def export(tmp_path: Path, facts: dict[str, Any] | None = None, **arguments: Any) -> tuple[Backbone, str]:
    backbone = Backbone.wrap(
        create_vit("vit_w32_d3_h4_p8", 32, **arguments), family="mae", licence="CC-BY-NC-4.0"
    ).eval()
    export_timm(backbone, tmp_path / "out", card=CARD, facts=facts)
    return backbone, (tmp_path / "out" / "README.md").read_text()


def test_content(tmp_path: Path) -> None:
    _, text = export(tmp_path, {"block": -1, "pooling": "cls", "norm": False})
    assert text.startswith("---\nlibrary_name: timm\n")
    for line in (
        "license: cc-by-nc-4.0",
        "| Base weights | mae_pretrain.pth |",
        "| Training data | CIFAR-10 train \\| 50000 images |",
        "| Recommended features | block -1, pooling cls, without the final norm |",
        "| k-NN accuracy | 50.0 % | 75.0 % |",
        "| effective rank (RankMe) | 10.25 | 20.5 |",
        "| cluster NMI | – | 30.0 % |",
        "| heads.temperature | 0.2 |",
        "| epochs | 10 |",
        "mim-refiner refine --data x --model y --out z",
        "Made for a test.",
    ):
        assert line in text.splitlines(), line
    assert "CC-BY-NC-4.0 (a refined encoder stays under the licence of its base weights; no commercial use)" in text
    assert "heads.queue" not in text
    assert "| Verified | largest difference to the encoder 0 " in text


@pytest.mark.parametrize(
    ("facts", "arguments"),
    [
        ({"block": -2, "pooling": "cls", "norm": True}, {}),
        ({"block": 1, "pooling": "mean"}, {"reg_tokens": 2}),
        ({}, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_the_snippet_gives_the_recommended_features(
    tmp_path: Path, facts: dict[str, Any], arguments: dict[str, Any]
) -> None:
    backbone, text = export(tmp_path, facts, **arguments)
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    names: dict[str, Any] = {}
    exec(match[1].replace("PATH_OF_THIS_FOLDER", str(tmp_path / "out")), names)
    [output] = backbone.forward_blocks(names["images"], [facts.get("block", -1)], norm=facts.get("norm", False))
    pooling = facts.get("pooling", "mean")
    torch.testing.assert_close(names["features"], output.pooled(pooling), rtol=0, atol=1e-5)


def test_a_bare_export_says_what_is_not_recorded(tmp_path: Path) -> None:
    backbone = Backbone.wrap(create_vit("vit_w32_d3_h4_p8", 32))
    export_timm(backbone, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: other" in text
    assert "| Training data | not recorded |" in text
    assert "## Measured" not in text
