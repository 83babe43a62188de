"""What all export formats share: a folder that is complete or absent, the facts kept with it, and a comparison.

Does the exported model compute what the encoder computes? Measured on real images at every export.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.checkpoints.store import OWN_FACTS
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.export.model_card import model_card
from mim_refiner.files import atomic_folder, errors_as, read_mapping
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of
from mim_refiner.types import BackboneInfo, side_or_pair

_CHECK_IMAGES = 4
_DEMO_IMAGES = "CIFAR-10 test images embedded in mim-refiner"
_OWN_FILES = {
    "config.json", "README.md", "preprocessor_config.json", "model.safetensors", "model.th", "model.onnx",
    "model.onnx.data",
}  # fmt: skip
Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Format:
    """One export format."""

    name: str
    tolerance: float
    reader: str  # who loads the result, for messages
    compared: str  # what the comparison covers
    write: Callable[[Backbone, Path, dict[str, Any]], dict[str, Any]]  # (encoder, folder, facts) -> config.json
    pairs: Callable[[Backbone, Path, Tensor, dict[str, Any]], Pairs]  # ... images -> (expected, exported) tensors


@dataclass(frozen=True)
class Parity:
    """Largest difference between the exported model and the encoder, over everything compared."""

    max_abs_difference: float
    largest_value: float  # largest absolute value compared
    tolerance: float  # allowed difference, times the largest value of the tensor where that is above 1
    images: int
    source: str
    compared: str

    def sentence(self) -> str:
        """One line for a model card."""
        return (
            f"largest difference to the encoder {self.max_abs_difference:.2g} (values up to {self.largest_value:.3g}, "
            f"tolerance {self.tolerance:.0e} of the largest value) over {self.compared} of "
            f"{number_of(self.images, 'images')}, {self.source}"
        )


@dataclass(frozen=True)
class CheckImages:
    """Images for the comparison, normalised [B, C, H, W], and where they come from, in words."""

    pixels: Tensor
    source: str


def write_export(
    format: Format,
    backbone: Backbone,
    out_dir: str | Path,
    *,
    card: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    images: CheckImages | None = None,
) -> dict[str, Any]:
    """Write the encoder's files, config.json and README.md, run the exported model, and compare it with the encoder.

    ``card``: what :func:`model_card` shows (base, data, recipe, before, after, ...); ``facts``: JSON-ready extras such
    as the recommended block, pooling and norm. Both are kept under "mim_refiner" in config.json, with the comparison.
    ``images``: what it is made on (default: images embedded in the package).
    The folder appears complete or not at all; an earlier export of ours there is replaced.
    Returns {"path", "format", "files", "parameters", "max_abs_difference", "tolerance", "checked"}. Raises InputError
    if the format cannot express the encoder, the exported model differs, or the folder is not ours or not writable.
    """
    out = Path(out_dir).absolute()
    backbone = copy.deepcopy(backbone).cpu().float().eval()  # the caller's keeps device and mode
    backbone.use_math_attention()
    info, card = backbone.info, dict(card or {})
    kept = ("architecture", "image_size", "mean", "std", "norm_eps", "position_rule")
    own: dict[str, Any] = {
        "version": __version__,
        "format": format.name,
        "family": info.family,
        "licence": info.licence,
        "base": Path(info.source).name if info.source else "",  # a folder of ours concerns nobody else
        **{name: getattr(info, name) for name in kept},
        "encoder_pooling": info.pooling,
        **(facts or {}),
        "card": card,
    }
    check_target(out)
    remedy = "free space or choose another --out"
    with errors_as(InputError, f"{out}: cannot be written", remedy, OSError), atomic_folder(out) as folder:
        config = format.write(backbone, folder, own)
        _write_config(folder, config, own)
        images = images or check_images(info)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():  # libraries draw weights before they load them
            parity = compare(format.pairs(backbone, folder, images.pixels, own), format, images)
        own["parity"] = asdict(parity)
        _write_config(folder, config, own)
        text = model_card(info, card, own, parity.sentence())
        (folder / "README.md").write_text(text, encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            (folder / name).chmod(0o644)
    return {
        "path": str(out.resolve()),
        "format": format.name,
        "files": names,
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "max_abs_difference": parity.max_abs_difference,
        "tolerance": format.tolerance,
        "checked": parity.sentence(),
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Exporters and readers talk on stdout and stderr, in logs and in warnings about their own parts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    quiet = warnings.catch_warnings(action="ignore")
    try:
        with quiet, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def every_block(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """The tokens after every block, and those after the final norm."""
    last, blocks = backbone.run_blocks(backbone.embed(images), 0, backbone.info.depth, range(backbone.info.depth))
    return [*blocks.values(), backbone.final_norm(last)]


def _write_config(folder: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    with errors_as(InputError, "export card, facts or model arguments are not plain JSON", "give others", TypeError):
        text = json.dumps({**config, OWN_FACTS: own}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def check_target(out: Path) -> None:
    """Raise InputError unless ``out`` is free: absent, empty, or an earlier export of ours (in a run even damaged)."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder for the export")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    of_a_run = out.name == "export" and (out.parent / "recipe.yaml").exists()
    if names and not (_OWN_FILES.issuperset(names) and (of_a_run or source_facts(out))):
        raise InputError(f"{out}: holds other files ({', '.join(names[:3])}); choose an empty or new folder")


def source_facts(source: str | Path) -> dict[str, Any]:
    """What an earlier export kept about itself, empty for any other source; run folders are asked for their export/."""
    folder = Path(str(source).removeprefix("local-dir:")).expanduser()
    own = (read_mapping(folder / "export" / "config.json") or read_mapping(folder / "config.json")).get(OWN_FACTS)
    return own if isinstance(own, dict) else {}


def check_images(info: BackboneInfo, images: ImageSet | None = None, source: str | None = None) -> CheckImages:
    """The first images of ``images`` (None: embedded) as the encoder wants them, colours in turn as its channels."""
    if images is None:
        with as_file(files("mim_refiner") / "assets" / "cifar10_test.parquet") as path:
            return check_images(info, ImageSet(open_source(f"{path}[:{_CHECK_IMAGES}]"), cache=False), _DEMO_IMAGES)
    size = side_or_pair(info.image_size)
    batch = next(eval_batches(images, size, _CHECK_IMAGES, indices=range(min(len(images), 64))), None)
    if batch is None:
        raise DataError(f"{images.description}: none of the first images can be read; give readable ones")
    pixels = batch[0][:, torch.arange(info.in_chans) % batch[0].shape[1]]
    return CheckImages(normalize(pixels, info.mean, info.std), source or images.description)


def compare(pairs: Iterable[tuple[Tensor, Tensor]], format: Format, images: CheckImages) -> Parity:
    """Compare (expected, exported) tensors; InputError for a difference above the tolerance x max(1, largest)."""
    worst, largest = 0.0, 0.0
    for expected, got in pairs:
        same, scale = expected.shape == got.shape, float(expected.abs().max())
        difference = float((expected - got).abs().max()) if same else float("inf")
        allowed = format.tolerance * max(1.0, scale)
        if not difference <= allowed:
            found = f"differs by {difference:.2g} (allowed {allowed:.2g})"
            found = found if same else f"gives shape {list(got.shape)} instead of {list(expected.shape)}"
            raise InputError(
                f"export: the model as {format.reader} loads it {found}: the format lacks parts of this encoder; "
                "choose another --format"
            )
        worst, largest = max(worst, difference), max(largest, scale)
    return Parity(worst, largest, format.tolerance, len(images.pixels), images.source, format.compared)
