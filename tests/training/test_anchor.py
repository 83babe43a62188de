"""The dense anchor: its distance against a slow loop, its step in parts, and what it holds in a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.core.run import Run
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import DenseAnchor, Refiner, gram_distance
from mim_refiner.training.memory import measure_needs
from mim_refiner.training.metric_log import MetricLog
from mim_refiner.training.recipe import AnchorSettings
from mim_refiner.training.refine import anchor_backward, carries_anchor


def test_the_distance_is_that_of_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for width in (8, 6))
    total = 0.0
    for image in range(3):
        for i in range(5):
            for j in range(5):
                cosines = [F.cosine_similarity(tokens[image, i], tokens[image, j], dim=0) for tokens in (x, y)]
                total += float(cosines[0] - cosines[1]) ** 2
    assert gram_distance(x, y).item() == pytest.approx(total / (3 * 25), rel=1e-10)
    turned = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    assert gram_distance(3 * x @ turned, x).item() == pytest.approx(0, abs=1e-20)  # tokens may turn and grow


def moved(frozen_blocks: int = 0, blocks: tuple[int, ...] = (3,), drop: float = 0.4) -> Refiner:
    """A refiner whose encoder has left the START that its anchor holds."""
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=16, drop_path_rate=drop, attn_drop_rate=drop))
    refiner = Refiner(backbone, (2, 3), HeadConfig(24, 24, 16, 64), pooling="cls", frozen_blocks=frozen_blocks)
    refiner.anchor = DenseAnchor(backbone, blocks)
    refiner.unfreeze_encoder()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return refiner.double()


def gradients(refiner: Refiner, micro_batch: int | None, weight: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(10, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    refiner.zero_grad(set_to_none=True)
    found = anchor_backward(refiner, views, generator, Run(), weight, micro_batch)
    return found, {name: p.grad for name, p in refiner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"frozen_blocks": 2, "blocks": (2, 3)}], ids=str)
def test_parts_of_any_size_give_the_gradients_of_the_whole(options: dict) -> None:
    loss, expected = gradients(moved(**options), None)
    assert loss > 0
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    assert all(name.startswith("backbone.") for name in expected)
    for micro_batch in (1, 3, 9, 50):
        again, ours = gradients(moved(**options), micro_batch)
        assert again.item() == pytest.approx(loss.item(), rel=1e-6)
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_add_to_those_that_are_there() -> None:
    refiner = moved()
    _, alone = gradients(refiner, None)
    for parameter in refiner.parameters():
        parameter.grad = torch.ones_like(parameter)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(10, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    anchor_backward(refiner, views, generator, Run(), 2.0, 4)
    name, gradient = next(iter(alone.items()))
    torch.testing.assert_close(dict(refiner.named_parameters())[name].grad, gradient + 1)


def test_steps_on_the_distance_alone_lead_back_to_the_start() -> None:
    refiner = moved()
    optimizer = torch.optim.AdamW(refiner.backbone.parameters(), lr=2e-3)
    first, _ = gradients(refiner, None)
    for _ in range(30):
        last, _ = gradients(refiner, 5)
        optimizer.step()
    assert last < 0.5 * first


@pytest.mark.parametrize(("share", "of_twelve"), [(1.0, 12), (0.5, 6), (0.25, 3), (0.1, 1)])
def test_a_share_of_the_steps_is_spread_evenly(share: float, of_twelve: int) -> None:
    steps = [step for step in range(12) if carries_anchor(step, share)]
    assert len(steps) == of_twelve
    assert {b - a for a, b in itertools.pairwise(steps)} <= {math.floor(1 / share), math.ceil(1 / share)}


def test_a_log_line_has_the_mean_over_the_steps_that_carry_the_anchor() -> None:
    log = MetricLog(torch.device("cpu"))
    for step in range(4):
        carried = {"loss": torch.tensor(float(step)), "anchor": torch.tensor(10.0 * step)} if step % 2 else {}
        log.add(step, torch.tensor(float(step)) + carried.get("anchor", 0), carried, 8)
    assert log.means() == {"loss": 1.5, "anchor": 20.0}
    assert log.first_non_finite() is None
    log.add(4, torch.tensor(torch.nan), {"loss": torch.tensor(1.0)}, 8)  # of the anchor alone
    assert log.first_non_finite() == 4


def test_a_run_resumes_to_the_bit(tiny_run, tmp_path: Path) -> None:
    anchor = AnchorSettings(weight=1e3, blocks="heads", share=0.5)
    held = tiny_run(anchor=anchor)
    records = held.run(tmp_path / "held")
    assert ["anchor" in record for record in records] == [False] * 8 + [False, True] * 6
    assert records[-1]["loss"] == pytest.approx(records[-1]["loss/1"] + records[-1]["loss/2"])
    first = tiny_run(anchor=anchor)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path / "cut", stop_after=14)
    again = tiny_run(anchor=anchor)
    again.run(tmp_path / "cut")
    for name, tensor in held.refiner.state_dict().items():
        torch.testing.assert_close(again.refiner.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    start = tiny_run().refiner.backbone.state_dict()
    for name, tensor in again.refiner.anchor.start.state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=0, msg=name)


def test_the_planner_counts_the_start() -> None:
    refiner = moved(drop=0.0).float()
    options = {"precision": "fp32"}
    with_start = measure_needs(refiner, [(16, 2)], 4, **options)
    size = sum(tensor.nbytes for tensor in (*refiner.anchor.parameters(), *refiner.anchor.buffers()))
    refiner.anchor = None
    without = measure_needs(refiner, [(16, 2)], 4, **options)
    assert with_start.state - without.state == size
    assert with_start.encoder_image == without.encoder_image
