"""A step can be read: the package's files that it enters from views to loss are those of the map in CONTRIBUTING.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import mim_refiner
from mim_refiner.commands.refine import refine as command
from mim_refiner.models.backbone import create_vit
from mim_refiner.training import refine

PACKAGE = Path(mim_refiner.__file__).parent
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"
MOST = 12  # files from refine() to the loss


class Entered:
    """The package's files in which functions are called between ``begin`` and ``end``, or wait for them to return."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def begin(self, frame: FrameType | None) -> None:
        while frame:
            if frame.f_code.co_name != "wrapped":  # of a decorator, which calls what stands below it
                self._note(frame, "call", None)
            frame = frame.f_back
        sys.setprofile(self._note)

    def end(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            self.files.add(path.relative_to(PACKAGE).as_posix())


def test_the_map_names_every_training_file_that_the_training_uses() -> None:
    section = CONTRIBUTING.read_text().split("## A step, file by file")[1].split("\n## ")[0]
    used = re.findall(r"mim_refiner\.training\.(\w+) import", (PACKAGE / "training" / "refine.py").read_text())
    missing = {f"`training/{name}.py`" for name in {*used, "sweep", "estimate"} - {"recipe"}}
    assert {name for name in missing if name not in section} == set()


def test_the_files_from_refine_to_the_loss_are_few_and_those_of_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, views, step = Entered(), refine.make_views, refine.forward_backward

    def make_views(*given: Any) -> Any:
        entered.begin(sys._getframe())
        return views(*given)

    def forward_backward(*given: Any) -> Any:
        step(*given)
        entered.end()
        raise KeyboardInterrupt

    monkeypatch.setattr(refine, "make_views", make_views)
    monkeypatch.setattr(refine, "forward_backward", forward_backward)
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 16, 3), dtype=np.uint8)
    settings = ["warmup.epochs=0", "batch_size=8", "views.local_size=8", "views.num_local=2", "guard.enabled=false"]
    settings += ["heads.projector_hidden=32", "heads.predictor_hidden=32", "heads.out_dim=16", "heads.queue_size=32"]
    with pytest.raises(KeyboardInterrupt):
        command(data=images, model=create_vit("vit_w32_d3_h2_p8", image_size=16), out=str(tmp_path), settings=settings)
    section = CONTRIBUTING.read_text().split("## A step, file by file")[1].split("\n## ")[0]
    assert entered.files == set(re.findall(r"`([a-z_]+/[a-z_]+\.py)`", section.split("After the loss")[0]))
    assert len(entered.files) <= MOST
