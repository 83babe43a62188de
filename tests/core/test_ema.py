from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mim_refiner.core.ema import ExponentialMovingAverage


def part(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix + "/"): value for key, value in data.items() if key.startswith(prefix + "/")}


def linear_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_golden_update(golden_dir: Path, decay: float) -> None:
    data = load_file(golden_dir / "schedule" / "ema.safetensors")
    model = linear_norm()
    model.load_state_dict(part(data, "tgt_before"))
    average = ExponentialMovingAverage(model)
    model.load_state_dict(part(data, "src"))
    average.update(model, decay)
    expected = part(data, f"tgt_after_{decay}_copybuf1")
    assert expected.keys() == average.module.state_dict().keys()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)


def test_many_updates_equal_the_closed_form() -> None:
    model = nn.Linear(2, 2).double()
    average = ExponentialMovingAverage(model)
    history = [model.weight.detach().clone()]
    for _ in range(10):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2))
        history.append(model.weight.detach().clone())
        average.update(model, 0.8)
    expected = 0.8**10 * history[0] + sum(0.2 * 0.8 ** (10 - i) * w for i, w in enumerate(history) if i)
    torch.testing.assert_close(average.module.weight, expected, rtol=1e-12, atol=0)


def test_is_a_separate_frozen_copy_in_eval_mode() -> None:
    model = linear_norm()
    average = ExponentialMovingAverage(model)
    average.train()
    assert not average.module.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = average.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(average.module[0].weight, before)
    other = ExponentialMovingAverage(linear_norm())
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.module[0].weight, before)


def test_parameters_that_do_not_move_stay_exact() -> None:
    model = linear_norm()
    average = ExponentialMovingAverage(model)
    for _ in range(50):
        average.update(model, 0.9999)
    assert torch.equal(average.module[0].weight, model[0].weight)
