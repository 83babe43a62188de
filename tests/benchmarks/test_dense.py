"""``benchmarks/dense.py`` compares each encoder with the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_encoder_is_compared_with_the_first(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dense

    assets = ROOT / "src" / "mim_refiner" / "assets"
    images = [f"{assets / 'cifar10_train.parquet'}[:20]", f"{assets / 'cifar10_test.parquet'}[:20]"]
    dense.main([*images, *(str(assets / name) for name in ("mae", "mae", "refined"))])
    same, other = capsys.readouterr().out.splitlines()
    assert "mae: no clear change" in same
    assert "+0.0 points (95 % interval +0.0 to +0.0)" in same
    assert "refined: " in other
    assert "patch-neighbour agreement" in other
    with pytest.raises(SystemExit, match="usage"):
        dense.main(images)
