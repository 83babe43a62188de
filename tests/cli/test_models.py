from __future__ import annotations

import json

import pytest

from mim_refiner.cli.app import main


def test_models_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "mae_l16" in table
    assert "CC-BY-NC-4.0" in table
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    assert {"name", "family", "address", "size", "licence", "sha256"} <= set(listed[0])
    assert main(["models", "simmim_b16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sha256"] == shown["size"] == "unknown"
    assert main(["models", "mae_l16"]) == 0
    assert "dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth" in capsys.readouterr().out


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "mae_l61"]) == 2
    assert "did you mean 'mae_l16'?" in capsys.readouterr().err


def test_offline_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("MIM_REFINER_OFFLINE", "1")
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path))
    assert main(["inspect", "mae_l16"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "mae_pretrain_vit_large.pth" in error
