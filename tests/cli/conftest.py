"""Everything that runs of the whole command line need: tiny data, a tiny model, and a way to call the command."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from quick import HERE, quickly

from mim_refiner.cli.app import main

ARCH = "vit_w32_d3_h2_p8"
SIDE = 16  # pixels
CLASSES = ("circle", "square", "triangle")
IMAGES_A_CLASS = 16
BATCH = 8

PRETRAIN_SETTINGS = (
    "training.epochs=1",
    f"batch_size={BATCH}",
    "decoder_dim=16",
    "decoder_depth=1",
    "log_every=2",
    "knn_every=1",
)
REFINE_SETTINGS = (
    "warmup.epochs=1",
    "refinement.epochs=1",
    f"batch_size={BATCH}",
    "views.local_size=8",
    "views.num_local=2",
    "heads.projector_hidden=32",
    "heads.predictor_hidden=32",
    "heads.out_dim=16",
    "heads.queue_size=32",
    "log_every=2",
    "hold_out=0",
)


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def call(*arguments: object) -> Outcome:
    """Call the command in this process, by the entry that turns errors into a line and an exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quickly():
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def command(words: Sequence[object]) -> str:
    """Python code that is the command line, as quick as in :func:`call`."""
    words = [str(word) for word in words]
    return f"{HERE}import sys\nfrom mim_refiner.cli.app import main\nsys.exit(main({words!r}))\n"


def with_settings(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def pretrain_arguments(data: object, out: object, *settings: str, arch: str = ARCH) -> list[str]:
    base = ["pretrain", "--data", str(data), "--arch", arch, "--out", str(out), "--device", "cpu"]
    return [*base, *with_settings((*PRETRAIN_SETTINGS, *settings))]


def refine_arguments(data: object, model: object, out: object, *settings: str) -> list[str]:
    base = ["refine", "--data", str(data), "--model", str(model), "--out", str(out), "--device", "cpu"]
    return [*base, *with_settings((*REFINE_SETTINGS, *settings))]


def draw(shape: str, rng: np.random.Generator) -> Image.Image:
    """A light shape of random colour and place on a dark ground."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in rng.integers(0, 80, 3)))
    left, top = (int(value) for value in rng.integers(0, 5, 2))
    box, pen = (left, top, left + 10, top + 10), ImageDraw.Draw(image)
    colour = tuple(int(value) for value in rng.integers(120, 256, 3))
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(left, top + 10), (left + 10, top + 10), (left + 5, top)], fill=colour)
    return image


def write_shapes(root: Path, *, flat: bool = False) -> Path:
    """48 images of three shapes: a folder a class, or (``flat``) all in one folder and so without labels."""
    rng = np.random.default_rng(0)
    for shape in CLASSES:
        folder = root if flat else root / shape
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES_A_CLASS):
            draw(shape, rng).save(folder / f"{shape}-{number:02d}.png")
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content, to see that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def cli(forked: Callable[..., Any]) -> SimpleNamespace:
    """The helpers above, under one name."""

    def start(*words: object, **environment: object) -> Any:
        """Start the command as a process of its own."""
        return forked(command(words), **environment)

    def processes(words: Sequence[object], count: int = 2, *, code: str = "", **environment: object) -> list[Outcome]:
        """What became of the command in ``count`` processes; "{rank}" is theirs, ``code`` is run in each first."""
        started = forked(f"{code}\n{command(words)}", count, **environment)
        return [Outcome(code, *started.said(rank)) for rank, code in enumerate(started.wait())]

    return SimpleNamespace(
        call=call,
        command=command,
        start=start,
        processes=processes,
        pretrain=pretrain_arguments,
        refine=refine_arguments,
        files_of=files_of,
        write_shapes=write_shapes,
        arch=ARCH,
        images=len(CLASSES) * IMAGES_A_CLASS,
        steps_per_epoch=len(CLASSES) * IMAGES_A_CLASS // BATCH,
    )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 labelled images, 16 px, three classes."""
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in one flat folder."""
    return write_shapes(tmp_path_factory.mktemp("data") / "flat", flat=True)


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, the arguments that made it, and what the command said."""

    path: Path
    arguments: list[str]
    outcome: Outcome

    @property
    def export(self) -> Path:
        return self.path / "export"

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())


@pytest.fixture(scope="session")
def finish() -> Callable[[list[str]], FinishedRun]:
    """Run a command to its end; it must succeed."""

    def run(arguments: list[str]) -> FinishedRun:
        torch.set_num_threads(1)
        outcome = call(*arguments)
        assert outcome.code == 0, outcome.err
        return FinishedRun(Path(arguments[arguments.index("--out") + 1]), arguments, outcome)

    return run


@pytest.fixture(scope="session")
def mae(shapes: Path, tmp_path_factory: pytest.TempPathFactory, finish: Callable[[list[str]], FinishedRun]):
    """A tiny masked autoencoder, made by ``pretrain``. Tests read it only."""
    return finish(pretrain_arguments(shapes, tmp_path_factory.mktemp("runs") / "mae"))


@pytest.fixture(scope="session")
def refined(mae, shapes: Path, tmp_path_factory: pytest.TempPathFactory, finish: Callable[[list[str]], FinishedRun]):
    """The tiny model refined. Tests read it only, or copy it."""
    return finish(refine_arguments(shapes, mae.export, tmp_path_factory.mktemp("runs") / "refined"))
