from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.errors import InputError


def test_golden_every_step(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "schedule" / "wupcos_epoch.json").read_text())
    cases.pop("resolved_template")
    assert len(cases) == 5
    for name, values in cases.items():
        match = re.fullmatch(r"upe(\d+)_ep(\d+)_wu(\d+)_max([\d.]+)", name)
        assert match
        per_epoch, epochs, warmup = (int(group) for group in match.groups()[:3])
        by_step = values if isinstance(values, dict) else dict(enumerate(values))
        for step, expected in by_step.items():
            rate = warmup_cosine(
                int(step),
                total_steps=per_epoch * epochs,
                warmup_steps=per_epoch * warmup,
                peak=float(match[4]),
                end=1e-6,
            )
            assert rate == pytest.approx(expected, rel=1e-12), (name, step)


def test_golden_rate_scaling(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "schedule" / "lr_scaler.json").read_text())["linear"]
    for name, expected in cases.items():
        base, batch = name.split("_")
        assert peak_learning_rate(float(base), int(batch)) == pytest.approx(expected, rel=1e-15)


def test_shape_and_ends() -> None:
    rates = [warmup_cosine(s, total_steps=20, warmup_steps=5, peak=1.0, end=0.1) for s in range(25)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[5] == 1.0
    assert all(a > b for a, b in pairwise(rates[5:20]))
    assert rates[19] > 0.1
    assert rates[20:] == [0.1] * 5
    assert warmup_cosine(0, total_steps=3, warmup_steps=0, peak=0.5) == 0.5


@pytest.mark.parametrize(("step", "warmup"), [(-1, 2), (0, 11), (0, -1)])
def test_unusable_input_is_refused(step: int, warmup: int) -> None:
    with pytest.raises(InputError, match="warmup_steps"):
        warmup_cosine(step, total_steps=10, warmup_steps=warmup, peak=1.0)
