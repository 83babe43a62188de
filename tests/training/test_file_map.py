"""A step can be read: the package's files that it enters from views to loss are those of the map in CONTRIBUTING.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import mim_refiner
from mim_refiner.training import refine
from mim_refiner.training.loop import step_generator

PACKAGE = Path(mim_refiner.__file__).parent
CONTRIBUTING = PACKAGE.parents[1] / "CONTRIBUTING.md"
MOST = 12  # files from refine() to the loss


def files_entered(work: Callable[[], Any]) -> set[str]:
    """The package's files in which ``work`` calls a function, by a profile of the interpreter."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def test_the_map_names_every_training_file_that_the_training_uses() -> None:
    section = CONTRIBUTING.read_text().split("## A step, file by file")[1].split("\n## ")[0]
    used = re.findall(r"mim_refiner\.training\.(\w+) import", (PACKAGE / "training" / "refine.py").read_text())
    missing = {f"`training/{name}.py`" for name in {*used, "sweep", "estimate"} - {"recipe"}}
    assert {name for name in missing if name not in section} == set()


def test_the_files_of_a_step_are_few_and_those_of_the_map(tiny_run: Callable[..., Any]) -> None:
    job = tiny_run(drop_path=0.0)
    refine.begin_refinement(job.refinement)
    with closing(job.loader.epoch(0)) as batches:
        batch = next(batches)
    generator = step_generator(0, 1, 0)

    def step() -> None:
        views, sample_ids = refine.make_views(job.refinement, batch, generator)
        refine.forward_backward(job.refiner, views, sample_ids, generator, job.refinement.run)

    entered = files_entered(step) | {"commands/refine.py"}  # which calls training/refine.py
    section = CONTRIBUTING.read_text().split("## A step, file by file")[1].split("\n## ")[0]
    assert entered == set(re.findall(r"`([a-z_]+/[a-z_]+\.py)`", section.split("After the loss")[0]))
    assert len(entered) <= MOST
