"""Files of public classes, made anew from names and shapes, against tokens that the classes themselves gave.

tests/golden/public_layouts.json: what the tool saves (every tensor's shape in its order; tensor number i is 0.2 x
torch.randn with seed i), the images (seed 1000), and of the first image's tokens after the last block, as the public
class gave them on these weights, the first and the mean of all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner.checkpoints.load import load_backbone

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden/public_layouts.json").read_text())


def numbers(shape: list[int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(skeleton: Any, count: list[int]) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    if skeleton.keys() == {"shape"}:
        count[0] += 1
        return 0.2 * numbers(skeleton["shape"], count[0] - 1)
    return {name: filled(value, count) for name, value in skeleton.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_of_the_public_class(tmp_path: Path, name: str) -> None:
    golden = GOLDEN[name]
    torch.save(filled(golden["file"], [0]), tmp_path / "weights.pth")
    backbone = load_backbone(tmp_path / "weights.pth", **golden["options"])
    images = numbers(golden["images"], 1000)
    depth = backbone.info.depth
    with torch.inference_mode():
        tokens, _ = backbone.run_blocks(
            backbone.embed(images), 0, depth, grid=backbone.grid_of(tuple(images.shape[-2:]))
        )
    assert (depth, tokens.shape[1], backbone.info.coverage) == (golden["blocks"], golden["tokens"], 1.0)
    torch.testing.assert_close(tokens[0, 0], torch.tensor(golden["first"]), rtol=0, atol=5e-5)
    torch.testing.assert_close(tokens[0].mean(0), torch.tensor(golden["mean"]), rtol=0, atol=5e-5)
